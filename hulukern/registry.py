"""Ops by name, and their registration with torch.

Each op becomes ``torch.ops.hulukern.<name>``: arguments of the spec's schema and a last
``str backend``, checked, dispatched to that backend's function, with a fake kernel and, where the op is
differentiable, autograd. Library.define/impl is used instead of custom_op: 5 us less per call.

The dispatcher itself costs 3 us with seven arguments, and 10 more with Python autograd. A call that no
one could tell from a dispatched one (plain tensors, no gradient wanted, nothing tracing, compiling,
profiling or intercepting, and the like of it dispatched before) therefore goes straight to its backend.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from hulukern.backends import (
    BackendUnavailable,
    choose,
    interpreting,
    on_its_device,
    on_the_host,
    runs_on,
    simulating,
    unavailable,
    without_autocast,
)
from hulukern.spec import Op
from hulukern.tuning import autotuned
from hulukern.validation import OPTION, check_arguments, dtype_name, fail

LIBRARY = torch.library.Library("hulukern", "FRAGMENT")

OPS: dict[str, RegisteredOp] = {}

# A call whose shapes, dtypes, devices and options were seen before is neither checked nor resolved again:
# 4 us less per call. Cleared when full: packed sequences have new sizes at every step.
_SEEN_LIMIT = 4096


class RegisteredOp:
    """A spec with its implementations. ``package`` is the op's folder as a module name."""

    def __init__(self, spec: Op, package: str) -> None:
        self.spec = spec
        self.package = package
        self.implementations: dict[str, Callable[..., Any]] = {}
        self._resolved: dict[Any, Callable[..., Any]] = {}
        self._names = spec.argument_names
        self._signature = _signature_of(spec)

    def backend(self, name: str, device_type: str) -> Callable[..., Any]:
        """The function behind a backend's name ("" chooses by device); raises BackendUnavailable."""
        if not name:
            name = choose(self.spec.name, tuple(self.spec.backends), device_type)
        function = self.implementations.get(name)
        if function is None:
            function = self._load(name)
        if not runs_on(name, device_type) and name in self.spec.backends:
            fail(self.spec.name, "backend", f"value {name!r}", f"one that runs on {device_type} tensors")
        return function

    def _load(self, name: str) -> Callable[..., Any]:
        reason = unavailable(name)
        if not reason and name not in self.spec.backends:
            reason = self.spec.absent.get(name, "not written yet")
        if reason:
            raise BackendUnavailable(f"{self.spec.name}: backend {name!r} cannot run: {reason}")
        module, _, attribute = self.spec.backends[name].partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        if name == "reference":
            function = without_autocast(function)
        if name == "cuda":
            function = on_the_host(function) if simulating() else on_its_device(function)
        if name == "triton" and os.environ.get("HULUKERN_AUTOTUNE") == "1":
            function = autotuned(function)
        self.implementations[name] = function
        return function

    def set_implementation(self, name: str, function: Callable[..., Any] | None) -> None:
        """Put ``function`` behind a backend's name, or take the name away; for tests and sweeps."""
        if function is None:
            self.implementations.pop(name, None)
        else:
            self.implementations[name] = function
        self._resolved.clear()

    def check(self, arguments: Sequence[Any]) -> None:
        """Raise on anything the spec does not allow."""
        named = dict(zip(self._names, arguments, strict=True))
        letters = check_arguments(self.spec, named)
        if self.spec.check is not None:
            self.spec.check(named, letters)

    def check_backend(self, name: str, arguments: Sequence[Any]) -> None:
        """Raise on what the spec allows and this backend does not take."""
        named = dict(zip(self._names, arguments, strict=True))
        if self.spec.check_backend is not None:
            self.spec.check_backend(name, named)
        if name == "triton" and self.spec.uninterpreted and interpreting():
            dtype = named[self.spec.dtype_of].dtype
            reason = self.spec.uninterpreted.get(dtype)
            if reason:
                raise BackendUnavailable(f"{self.spec.name}: backend 'triton' cannot run {dtype_name(dtype)}: {reason}")

    def typed(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with options of the schema's own types, numpy's numbers as Python's; raises on what is none."""
        kinds, names = (*self.spec.argument_types, "str"), (*self._names, "backend")
        return tuple(
            OPTION[kind.rstrip("?")](self.spec.name, name, value)
            if kind.rstrip("?") in OPTION and not (value is None and kind.endswith("?"))
            else value
            for kind, name, value in zip(kinds, names, arguments, strict=True)
        )

    def resolved(self, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """What ran the like of this call before, if anything did; the backend is named last."""
        try:
            return self._resolved.get(self._signature(arguments))
        except TypeError:  # an option that has no hash: the schema refuses it
            return None

    def __call__(self, *arguments: Any) -> Any:
        """The eager kernel behind the dispatcher: check, then run the backend named last."""
        try:
            signature = self._signature(arguments)
        except AttributeError:  # None where a tensor must be: the check says so
            self.check(arguments[:-1])
            raise
        function = self._resolved.get(signature)
        if function is None:
            inputs = arguments[:-1]
            self.check(inputs)
            device_type = _device_type(inputs)
            name = arguments[-1] or choose(self.spec.name, tuple(self.spec.backends), device_type)
            function = self.backend(name, device_type)
            self.check_backend(name, inputs)
            if len(self._resolved) >= _SEEN_LIMIT:
                self._resolved.clear()
            self._resolved[signature] = function
        return function(*arguments[:-1])


def _signature_of(spec: Op) -> Callable[[tuple[Any, ...]], Any]:
    """A function from a call's arguments to what decides validity and backend, as one hashable tuple.

    Written out per op, as namedtuple does, since a generic loop over the arguments costs 4 us. Numbers go with
    their type: 2.0 equals 2, and is refused where an int must be.
    """
    tensors = {t.name: t for t in spec.tensors}
    parts = []
    for i, (kind, name) in enumerate(zip(spec.argument_types, spec.argument_names, strict=True)):
        tensor = tensors.get(name)
        if tensor is None:
            if "[]" in kind:
                optional = f"None if a[{i}] is None else " if kind.endswith("?") else ""
                parts.append(f"{optional}tuple(a[{i}])")
            else:
                parts.append(f"a[{i}]" if kind in ("str", "ScalarType") else f"type(a[{i}]), a[{i}]")
        elif tensor.many:
            parts.append(f"tuple([(x.shape, x.dtype, x.device) for x in a[{i}]])")
        elif tensor.optional:
            parts.append(f"None if a[{i}] is None else (a[{i}].shape, a[{i}].dtype, a[{i}].device)")
        else:
            parts.append(f"a[{i}].shape, a[{i}].dtype, a[{i}].device")
    signature: Callable[[tuple[Any, ...]], Any] = eval(f"lambda a: ({', '.join(parts)}, a[-1])")
    return signature


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_plain_of(spec: Op) -> Callable[[tuple[Any, ...]], bool]:
    """Whether a call's tensors are plain ones, none of which wants a gradient. Written out as above.

    A negated view (``z.conj().imag``) is no plain one: its values are resolved by the dispatcher.
    """
    tensors = {t.name: t for t in spec.tensors}
    parts, wanting = [], []
    for i, name in enumerate(spec.argument_names):
        if name not in tensors:
            continue
        tensor = tensors[name]
        floats = any(dtype.is_floating_point for dtype in tensor.dtypes)
        x = "x" if tensor.many else f"a[{i}]"
        one, wants = f"type({x}) in plain" + f" and not {x}.is_neg()" * floats, f"{x}.requires_grad"
        if tensor.many:
            one, wants = f"all([{one} for x in a[{i}]])", f"any([{wants} for x in a[{i}]])"
        elif tensor.optional:
            one, wants = f"({x} is None or {one})", f"{x} is not None and {wants}"
        parts.append(one)
        wanting += [wants] * floats
    if wanting:
        parts.append(f"not (grad() and ({' or '.join(wanting)}))")
    names = {"plain": _PLAIN, "grad": torch.is_grad_enabled}
    is_plain: Callable[[tuple[Any, ...]], bool] = eval(f"lambda a: {' and '.join(parts)}", names)
    return is_plain


def _unwatched_by() -> Callable[[], bool]:
    """Whether nobody watches the dispatcher and nothing carries a tangent; never where this torch cannot say."""
    try:
        modes, overrides = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
        functorch, tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
        profiler = torch._C._autograd._profiler_enabled
    except AttributeError:
        return lambda: False
    return lambda: (
        not (modes() or overrides() or functorch() or tracing() or profiler() or forward_ad._current_level >= 0)
    )


_unwatched = _unwatched_by()


def _refuse_tangents(spec: Op, arguments: Sequence[Any]) -> None:
    """torch's autograd of a registered op drops tangents without a word, which would be a derivative of zero."""
    for name, value in zip(spec.argument_names, arguments, strict=False):
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and _has_tangent(x):
                expected = "none: forward-mode derivatives are not written"
                fail(spec.name, name, "a tangent", expected, NotImplementedError)


def _has_tangent(x: torch.Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(x):  # vmap has no rule for the question
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def _device_type(arguments: Sequence[Any]) -> str:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument.device.type
    raise TypeError("hulukern: an op needs at least one tensor argument")


def _no_derivative(name: str, _ctx: Any, *_grads: Any) -> Any:
    raise RuntimeError(f"{name}: has no derivative, expected none to be asked for (second derivatives are not written)")


def register(
    spec: Op,
    package: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``spec`` with torch and return what calls it, with the backend last."""
    op = RegisteredOp(spec, package)
    OPS[spec.name] = op
    arguments, _, results = spec.schema.rpartition(" -> ")
    LIBRARY.define(f"{spec.name}{arguments[:-1]}, str backend) -> {results}")
    LIBRARY.impl(spec.name, op, "CompositeExplicitAutograd")

    def checked_fake(*inputs: Any) -> Any:
        op.check(inputs[:-1])
        return fake(*inputs[:-1])

    checked_fake.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
    torch.library.register_fake(f"hulukern::{spec.name}", checked_fake, lib=LIBRARY)
    if backward is None and any(dtype.is_floating_point for t in spec.tensors for dtype in t.dtypes):
        backward = functools.partial(_no_derivative, spec.name)
    if backward is not None:
        torch.library.register_autograd(f"hulukern::{spec.name}", backward, setup_context=setup_context, lib=LIBRARY)
    overload = getattr(torch.ops.hulukern, spec.name).default
    is_plain = _is_plain_of(spec)

    def run(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling() and is_plain(arguments) and _unwatched():
            function = op.resolved(arguments)
            if function is not None:
                return function(*arguments[:-1])
        elif forward_ad._current_level >= 0:
            _refuse_tangents(spec, arguments)
        try:
            return overload(*arguments)
        except RuntimeError as error:
            if "Expected a value of type" not in str(error):
                raise
        # torch's schema check comes before ours, names no argument, and knows no numpy.
        arguments = op.typed(arguments)
        op.check(arguments[:-1])
        try:
            return overload(*arguments)
        except RuntimeError as error:
            if "Expected a value of type" in str(error):
                fail(spec.name, "arguments", str(error).splitlines()[0], f"{spec.schema}", TypeError)
            raise

    return run
