"""Products with the encoder's weights when no gradients are recorded: packed once, until somebody writes to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import register_flop_formula


def is_plain(layer: nn.Module) -> bool:
    """Whether reading ``layer``'s parameters is as good as calling it: no adapter, quantised or parametrised layer in
    place of a linear one, no subclass of tensors in it, no hook on it, no forward of its own, as offloading has it."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or _has_any_global_hook():
        return False
    if any(getattr(layer, f"_{kind}") for kind in _HOOKS):
        return False
    return all(type(t) in (nn.Parameter, torch.Tensor) for t in (layer.weight, layer.bias))


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def may_pack(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether a product may stand for ``layers``: all plain, of x's dtype and in eval mode (reentrant checkpointing
    trains without gradients), and nobody records gradients, traces, or has autocast choose dtypes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    return type(x) is torch.Tensor and all(
        is_plain(p) and not p.training and p.weight.dtype == p.bias.dtype == x.dtype for p in layers
    )


class PackedProduct:
    """One linear layer, or several over the same rows as one product: ``[N, in]`` -> ``[N, sum of out]``.

    On a CPU the weights are a second copy in oneDNN's own layout, as ``torch.compile`` has them when it freezes a
    model: the same bits in bf16, 4 to 10 % faster; in fp32 1.2 to 1.6 times as fast. It is kept until a parameter is
    replaced, moved or written to, or the layers are to be called again. Writes through ``.data`` count no version: one
    value of every row and column, and the whole bias, are compared at each call. Elsewhere the layers are called:
    to join their weights at each call is a copy, and to keep them would miss such writes or wait for the device.
    A copy, or a checkpoint, of the module that has one starts with none.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedProduct, ()

    def __call__(self, x: torch.Tensor, *layers: nn.Linear, with_bias: bool = True) -> torch.Tensor | None:
        """None unless :func:`may_pack` and oneDNN has a layout of its own: the layers are to be called.
        ``with_bias=False`` leaves the bias to what follows."""
        if not (may_pack(x, *layers) and _has_own_layout(x)):
            if not torch.compiler.is_compiling():
                self._made = None
            return None
        weights, biases = [p.weight for p in layers], [p.bias for p in layers if with_bias]
        made = self._made
        if made is None or not made.still_holds([*weights, *biases]):
            packed = torch.ops.mkldnn._reorder_linear_weight(_joined(weights))
            self._made = made = _Made([*weights, *biases], packed, _joined(biases))
        return torch.ops.mkldnn._linear_pointwise(x, made.weight, made.bias, "none", [], "")


class _Made:
    """What was made of which tensors. It holds the tensors, so that no other takes their id, and with them their
    storage under an alias, so that no other takes its address."""

    def __init__(self, tensors: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._tensors, self._aliases = tensors, [t.detach() for t in tensors]
        self._state, self._seen = self._state_of(tensors), [_some(t).clone() for t in tensors]

    def still_holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self._state == self._state_of(tensors) and all(
            torch.equal(_some(t), seen) for t, seen in zip(tensors, self._seen, strict=True)
        )

    @staticmethod
    def _state_of(tensors: Sequence[torch.Tensor]) -> list[Any]:
        # A tensor made under inference mode counts no writes.
        return [(id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


def _some(t: torch.Tensor) -> torch.Tensor:
    """A value of every row and of every column; all of a bias."""
    flat = t.detach().reshape(-1)
    return flat if t.dim() == 1 else flat[:: t.shape[1] + 1]


def _joined(tensors: Sequence[torch.Tensor]) -> Any:
    if not tensors:
        return None
    return torch.cat([t.detach() for t in tensors]) if len(tensors) > 1 else tensors[0].detach()


def _has_own_layout(x: torch.Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not public: torch may take it away
        return False
    if x.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.dtype == torch.float32


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: Sequence[int], w_shape: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x_shape) * w_shape[0]
