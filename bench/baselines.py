"""What the fused ops are measured against: plain torch as a careful user would write it, and every peer.

A :class:`Baseline` says which ops it can do, and why it is absent where it is. It returns the op's results or the
first of them; what depends on sequence lengths only (masks, the longest) is prepared once, as a model would.
"""

from __future__ import annotations

import abc
import functools
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F

import hulukern
from hulukern.ops.rope_attention.reference import angles, rope_attention_rotate
from hulukern.spec import Arguments, Op

P, M = 14, 2
Run = Callable[[Arguments], Any]


def normalise(frames: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 frames to normalised ones (mean and std 0.5)."""
    return ((frames.float() / 255 - 0.5) / 0.5).to(dtype)


def cut(frames: torch.Tensor) -> torch.Tensor:
    """[T, H, W, C] to [N, C*P*P] in merge-block order."""
    T, H, W, C = frames.shape
    grid = frames.reshape(T, H // (P * M), M, P, W // (P * M), M, P, C)
    return grid.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, C * P * P)


def score(patches: torch.Tensor, T: int) -> torch.Tensor:
    """Mean |difference| per cell to the frame before; the first frame +inf."""
    cells = patches.view(T, -1, M * M * patches.shape[1])
    difference = (cells[1:] - cells[:-1]).abs().mean(-1)
    return torch.cat([torch.full_like(cells[:1, :, 0], float("inf")), difference])


def frontend(
    frames: torch.Tensor, threshold: float = 0.1, score_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames to the bf16 patches that rule ``previous`` keeps, and its mask: normalise, reshape, permute,
    difference, mean, boolean index. Scores from bf16 patches are faster and round the mask."""
    patches = cut(normalise(frames, score_dtype))
    keep = score(patches, frames.shape[0]) > threshold
    few = ~keep.any(1)
    keep[few, :1] = True
    keep = keep.flatten()
    return patches.to(torch.bfloat16).view(keep.numel(), -1)[keep], keep


def patch_embed_frames(frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(cut(normalise(frames, weight.dtype)), weight, bias)


# --- steps in eager torch, where a spec's plain formulation is none or does more than its task needs ------------


def _normalised(pixels: torch.Tensor, a: Arguments, dtype: torch.dtype, axis: int = -1) -> torch.Tensor:
    shape = [-1 if i == axis % 4 else 1 for i in range(4)]
    mean, std = (torch.tensor(a[name], device=pixels.device).view(shape) for name in ("mean", "std"))
    return ((pixels.float() / 255 - mean) / std).to(dtype)


def _normalize(a: Arguments) -> torch.Tensor:
    x = a["patches"].view(a["patches"].shape[0], a["channels"], -1, 1)
    return _normalised(x, a, a["dtype"], 1).view_as(a["patches"])


def _cut(a: Arguments) -> Any:
    if a["frames"].dtype != torch.uint8:
        raise ValueError("intensity windows are not written in eager torch")
    patches = cut(_normalised(a["frames"], a, torch.float32))
    # Scores are in pixels: back from normalised units, where every channel has the same std.
    return patches.to(a["dtype"]), score(patches, a["frames"].shape[0]).flatten() * (255 * a["std"][0])


def _compact(a: Arguments) -> Any:
    return [x[a["keep"]] for x in a["tensors"]], a["keep"].nonzero().flatten()


def _scatter(a: Arguments) -> torch.Tensor:
    rows = a["grad"].new_zeros(a["n_rows"], *a["grad"].shape[1:])
    return rows.index_copy_(0, a["index"], a["grad"])


def _attend(a: Arguments) -> torch.Tensor:
    """Rotated in fp32, rounded, then attention sequence by sequence."""
    q, k = (rope_attention_rotate(a[x], a[f"positions_{x}"], a["sections"], a["theta"], False) for x in "qk")
    lengths = [a[f"cu_seqlens_{x}"].diff().tolist() for x in "qk"]
    parts = (x.transpose(0, 1).split(n, 1) for x, n in ((q, lengths[0]), (k, lengths[1]), (a["v"], lengths[1])))
    outs = [((x @ y.mT * a["scale"]).float().softmax(-1).to(x.dtype) @ z) for x, y, z in zip(*parts, strict=True)]
    return torch.cat(outs, 1).transpose(0, 1).contiguous()


def _layer_norm(a: Arguments) -> list[torch.Tensor]:
    """No statistics: a user of torch's LayerNorm need not ask for them."""
    x, weight, bias = a["x"], *(a[name].to(a["x"].dtype) for name in ("weight", "bias"))
    summed = x if a["residual"] is None else x + a["residual"]
    y = F.layer_norm(summed, x.shape[-1:], weight, bias, a["eps"])
    return [y] if a["residual"] is None else [y, summed]


def _merge(a: Arguments) -> torch.Tensor:
    """Kept cells first: what is dropped need not be normalised."""
    cells = a["x"].view(-1, a["merge_size"] ** 2, a["x"].shape[1])
    cells = cells if a["keep"] is None else cells[a["keep"]]
    if a["weight"] is not None:
        cells = F.layer_norm(cells, cells.shape[-1:], a["weight"], a["bias"], a["eps"])
    return cells.mean(1)


EAGER: Mapping[str, Run] = {
    "rope_attention": _attend,
    "layer_norm": _layer_norm,
    "spatial_merge": _merge,
    "patch_embed_normalize": _normalize,
    "patch_embed_cut": _cut,
    "token_compact": _compact,
    "token_compact_backward": _scatter,
    "token_score_frames": lambda a: _score_frames(a["frames"], a["windows"]),
}


def _score_frames(frames: torch.Tensor, windows: list[int]) -> torch.Tensor:
    """Mean |difference| of cells in pixels; in the window where they change most, which counts as 255."""
    x = cut(frames.float())
    if not windows:
        return score(x, frames.shape[0]).flatten()
    clipped = [
        ((x - low) / (high - low)).clamp(0, 1) * 255 for low, high in zip(windows[::2], windows[1::2], strict=True)
    ]
    return torch.stack([score(c, frames.shape[0]).flatten() for c in clipped]).amax(0)


def eager(op: Op) -> Run | None:
    """The op in eager torch; its results or the first of them. None for the backward of an op that has one: a plain
    formulation would run the forward first, which "bwd" of that op does not time."""
    if op.name in EAGER:
        return EAGER[op.name]
    plain = op.plain
    if plain is None or op.name.removesuffix("_backward") in set(hulukern.OPS) - {op.name}:
        return None
    return lambda a: plain(*(a[name] for name in op.argument_names))


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """torch.compile for a peer. A timed backward runs many times over one graph, whose buffers must outlive the
    first."""
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, **options)


# --- peers -----------------------------------------------------------------------------------------------------


class Baseline(abc.ABC):
    """A peer. ``ops``: what it can do. ``prepare`` may raise, and then was absent for those arguments. ``compiles``:
    whether its first call takes long."""

    name: str
    compiles = False
    ops: tuple[str, ...] = ("rope_attention",)

    def absent(self, device: str) -> str:
        """Why it cannot run here; empty when it can."""
        return ""

    @abc.abstractmethod
    def prepare(self, op: Op, a: Arguments) -> Run:
        """A call of the op for arguments of these shapes and lengths."""


def _missing(package: str, device: str) -> str:
    if device != "cuda":
        return "needs a GPU"
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


class Torch(Baseline):
    name = "torch"
    ops = tuple(name for name, o in hulukern.OPS.items() if eager(o.spec) is not None)

    def prepare(self, op: Op, a: Arguments) -> Run:
        run = eager(op)
        assert run is not None
        return run


class Compiled(Baseline):
    """torch.compile of the same, for these shapes. Gradients come from differentiating the compiled forward."""

    name = "torch.compile"
    compiles = True
    ops = tuple(name for name in Torch.ops if not name.endswith("_backward"))

    def absent(self, device: str) -> str:
        if device == "cuda":
            return "" if importlib.util.find_spec("triton") else "triton is not installed"
        return "" if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler on PATH"

    def prepare(self, op: Op, a: Arguments) -> Run:
        return compiled(Torch().prepare(op, a))  # dynamic from the second size on: what is kept differs from set to set


def _lengths(a: Arguments) -> list[int]:
    """Of the sequences; queries and keys alike, as in the encoder."""
    if not torch.equal(a["cu_seqlens_q"], a["cu_seqlens_k"]):
        raise ValueError("queries and keys of other lengths")
    return a["cu_seqlens_q"].diff().tolist()


def _rotated(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary in fp32, rounded; on a GPU compiled, or its traffic would be most of a peer's time."""
    rotate = _compiled_rotate() if a["q"].is_cuda else rope_attention_rotate
    return tuple(rotate(a[x], a[f"positions_{x}"], a["sections"], a["theta"], False) for x in "qk")  # type: ignore[return-value]


@functools.cache
def _compiled_rotate() -> Callable[..., torch.Tensor]:
    return compiled(rope_attention_rotate, dynamic=True)  # once for all cases


class Sdpa(Baseline):
    """Rotary, then scaled_dot_product_attention on one backend: a batch where lengths are equal, else one by one."""

    def __init__(self, name: str, backend: str, on_cpu: bool) -> None:
        self.name, self.backend, self.on_cpu = name, backend, on_cpu

    def absent(self, device: str) -> str:
        return "" if device == "cuda" or self.on_cpu else "needs a GPU"

    def prepare(self, op: Op, a: Arguments) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths, backend = _lengths(a), getattr(SDPBackend, self.backend)
        A, D = a["q"].shape[1:]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int, scale: float) -> torch.Tensor:
            q, k, v = (x.view(-1, n, A, D).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(-1, A, D)

        def run(a: Arguments) -> torch.Tensor:
            q, k = _rotated(a)
            with sdpa_kernel(backend):
                if len(set(lengths)) == 1:
                    return attend(q, k, a["v"], lengths[0], a["scale"])
                split = [x.split(lengths) for x in (q, k, a["v"])]
                parts = zip(*split, lengths, strict=True)
                return torch.cat([attend(q, k, v, n, a["scale"]) for q, k, v, n in parts])

        return run


class Flex(Baseline):
    name = "flex"
    compiles = True

    def absent(self, device: str) -> str:
        return Compiled().absent(device)

    def prepare(self, op: Op, a: Arguments) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        document = torch.repeat_interleave(torch.tensor(_lengths(a), device=a["q"].device))
        N = document.numel()
        mask = create_block_mask(
            lambda _b, _h, i, j: document[i] == document[j], None, None, N, N, device=str(a["q"].device)
        )
        attend = compiled(flex_attention, dynamic=False)

        def run(a: Arguments) -> torch.Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (*_rotated(a), a["v"]))
            return attend(q, k, v, block_mask=mask, scale=a["scale"])[0].transpose(0, 1)

        return run


class TorchVarlen(Baseline):
    name = "torch varlen"

    def absent(self, device: str) -> str:
        return _missing("torch.nn.attention.varlen", device)

    def prepare(self, op: Op, a: Arguments) -> Run:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(_lengths(a))
        return lambda a: varlen_attn(
            *_rotated(a), a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"], longest, longest, scale=a["scale"]
        )


class FlashAttention(Baseline):
    """Version 3 where it is installed, else 2."""

    name = "flash-attn"

    def absent(self, device: str) -> str:
        return _missing("flash_attn_interface", device) and _missing("flash_attn", device)

    def prepare(self, op: Op, a: Arguments) -> Run:
        newer = importlib.util.find_spec("flash_attn_interface")
        varlen = importlib.import_module("flash_attn_interface" if newer else "flash_attn").flash_attn_varlen_func
        longest = max(_lengths(a))

        def run(a: Arguments) -> torch.Tensor:
            ends = (a["cu_seqlens_q"], a["cu_seqlens_k"], longest, longest)
            found = varlen(*_rotated(a), a["v"], *ends, softmax_scale=a["scale"])
            return found[0] if isinstance(found, tuple) else found

        return run


class Xformers(Baseline):
    name = "xformers"

    def absent(self, device: str) -> str:
        return _missing("xformers", device)

    def prepare(self, op: Op, a: Arguments) -> Run:
        xops = importlib.import_module("xformers.ops")
        mask = xops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(_lengths(a))

        def run(a: Arguments) -> torch.Tensor:
            q, k, v = (x[None] for x in (*_rotated(a), a["v"]))
            return xops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=a["scale"])[0]

        return run


class Liger(Baseline):
    name = "liger-kernel"
    ops = ("layer_norm",)

    def absent(self, device: str) -> str:
        return _missing("liger_kernel", device)

    def prepare(self, op: Op, a: Arguments) -> Run:
        function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

        def run(a: Arguments) -> Any:
            summed = a["x"] if a["residual"] is None else a["x"] + a["residual"]
            y = function.apply(summed, a["weight"], a["bias"], a["eps"])
            return y, a["x"].new_empty(0) if a["residual"] is None else summed

        return run


class CuPy(Baseline):
    """Selection by CuPy's boolean index, which is CUB's scan; types it does not know as integers of their size."""

    name = "cupy"
    ops = ("token_compact",)

    def absent(self, device: str) -> str:
        return _missing("cupy", device)

    def prepare(self, op: Op, a: Arguments) -> Run:
        cupy: Any = importlib.import_module("cupy")
        sized = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

        def run(a: Arguments) -> Any:
            keep = cupy.from_dlpack(a["keep"].view(torch.uint8)).view(bool)
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                plain = [cupy.from_dlpack(x.view(sized[x.element_size()]))[keep] for x in a["tensors"]]
            return [torch.utils.dlpack.from_dlpack(x).view(t.dtype) for x, t in zip(plain, a["tensors"], strict=True)]

        return run


def _conv_embed(a: Arguments) -> torch.Tensor:
    """Already cut patches through a convolution whose stride is its kernel."""
    weight = a["weight"]
    x = a["patches"]
    if x.dtype == torch.uint8:
        x = _normalised(x.view(x.shape[0], a["channels"], -1, 1), a, weight.dtype, 1)
    side = round((weight.shape[1] // a["channels"]) ** 0.5)
    shape = (-1, a["channels"], side, side)
    return F.conv2d(x.reshape(shape), weight.view(shape), a["bias"], stride=side).flatten(1)


def _bilinear_merge(a: Arguments) -> torch.Tensor:
    """LayerNorm of all, back to a picture, bilinear to half, and the choice last."""
    x, m = a["x"], a["merge_size"]
    if a["weight"] is not None:
        x = F.layer_norm(x, x.shape[-1:], a["weight"], a["bias"], a["eps"])
    cells, E = x.shape[0] // m**2, x.shape[1]
    h = next(side for side in (64, 32, 16, 8, 4, 2, 1) if cells % side == 0)
    w = cells // h
    picture = x.view(h, w, m, m, E).permute(0, 2, 1, 3, 4).reshape(1, h * m, w * m, E).permute(0, 3, 1, 2)
    merged = F.interpolate(picture, size=(h, w), mode="bilinear").permute(0, 2, 3, 1).reshape(-1, E)
    return merged if a["keep"] is None else merged[a["keep"]]


def _cos_sin(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    half = angles(a["positions_q"], a["sections"], a["theta"], torch.float32)
    whole = torch.cat([half, half], -1)
    return whole.cos(), whole.sin()


class Transformers(Baseline):
    """Attention of transformers' port, video_llama_3: its rotary, then SDPA sequence by sequence."""

    name = "transformers"

    def absent(self, device: str) -> str:
        return "" if importlib.util.find_spec("transformers") else "transformers is not installed"

    def prepare(self, op: Op, a: Arguments) -> Run:
        from transformers.models.video_llama_3.modeling_video_llama_3 import apply_rotary_pos_emb_vision

        lengths = _lengths(a)

        def run(a: Arguments) -> torch.Tensor:
            q, k = apply_rotary_pos_emb_vision(a["q"], a["k"], *_cos_sin(a))
            parts = [x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, a["v"])]
            outs = [F.scaled_dot_product_attention(q, k, v, scale=a["scale"]) for q, k, v in zip(*parts, strict=True)]
            return torch.cat(outs, 2)[0].transpose(0, 1)

        return run


class Released(Baseline):
    """The released model's steps: a convolution, rotary on fp32 copies and SDPA under a dense mask over all frames,
    a bilinear resize. Its scores and its selection are those of plain torch."""

    name = "released"
    ops = ("rope_attention", "patch_embed", "spatial_merge")

    def prepare(self, op: Op, a: Arguments) -> Run:
        if op.name != "rope_attention":
            return _conv_embed if op.name == "patch_embed" else _bilinear_merge
        lengths = _lengths(a)

        def run(a: Arguments) -> torch.Tensor:
            N = a["q"].shape[0]
            mask = torch.zeros(1, N, N, dtype=torch.bool, device=a["q"].device)
            for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
                mask[..., begin:end, begin:end] = True
            cos, sin = (x[:, None] for x in _cos_sin(a))

            def rotate(x: torch.Tensor) -> torch.Tensor:
                first, second = x.float().chunk(2, -1)
                return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

            q, k, v = (x.transpose(0, 1) for x in (rotate(a["q"]), rotate(a["k"]), a["v"]))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a["scale"]).transpose(0, 1)

        return run


BASELINES: tuple[Baseline, ...] = (
    Torch(), Compiled(), Sdpa("sdpa flash", "FLASH_ATTENTION", True), Sdpa("sdpa math", "MATH", True),
    Sdpa("sdpa cudnn", "CUDNN_ATTENTION", False), Sdpa("sdpa efficient", "EFFICIENT_ATTENTION", False), Flex(),
    TorchVarlen(), FlashAttention(), Xformers(), Liger(), CuPy(), Transformers(), Released(),
)  # fmt: skip
