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

from hulukern.backends import BackendUnavailable, choose, on_the_host, runs_on, simulating, unavailable
from hulukern.spec import Op
from hulukern.tuning import autotuned
from hulukern.validation import check_arguments, fail

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
        if name == "cuda" and simulating():
            function = on_the_host(function)
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

    def resolved(self, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """What ran the like of this call before, if anything did; the backend is named last."""
        return self._resolved.get(self._signature(arguments))

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
            function = self.backend(arguments[-1], _device_type(inputs))
            if len(self._resolved) >= _SEEN_LIMIT:
                self._resolved.clear()
            self._resolved[signature] = function
        return function(*arguments[:-1])


def _signature_of(spec: Op) -> Callable[[tuple[Any, ...]], Any]:
    """A function from a call's arguments to what decides validity and backend, as one hashable tuple.

    Written out per op, as namedtuple does, since a generic loop over the arguments costs 4 us.
    """
    tensors = {t.name: t for t in spec.tensors}
    parts = []
    for i, name in enumerate(spec.argument_names):
        tensor = tensors.get(name)
        if tensor is None:
            parts.append(f"tuple(a[{i}])" if f"[] {name}" in spec.schema else f"a[{i}]")
            if f"[]? {name}" in spec.schema:
                parts[-1] = f"a[{i}] and tuple(a[{i}])"
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
    """Whether a call's tensors are plain ones, none of which wants a gradient. Written out as above."""
    tensors = {t.name: t for t in spec.tensors}
    parts = []
    for i, name in enumerate(spec.argument_names):
        if name not in tensors:
            continue
        floats = any(dtype.is_floating_point for dtype in tensors[name].dtypes)
        wants_grad = " and not (grad() and {}.requires_grad)" if floats else ""
        if tensors[name].many:
            parts.append(f"all([type(x) in plain{wants_grad.format('x')} for x in a[{i}]])")
        else:
            optional = f"a[{i}] is None or " if tensors[name].optional else ""
            parts.append(f"({optional}type(a[{i}]) in plain{wants_grad.format(f'a[{i}]')})")
    names = {"plain": _PLAIN, "grad": torch.is_grad_enabled}
    is_plain: Callable[[tuple[Any, ...]], bool] = eval(f"lambda a: {' and '.join(parts)}", names)
    return is_plain


def _watchers() -> tuple[Callable[[], Any], ...] | None:
    """Functions that are all falsy when nobody watches the dispatcher; None if this torch lacks one."""
    try:
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._functorch.peek_interpreter_stack,
            torch._C._get_tracing_state,
            torch._C._autograd._profiler_enabled,
        )
    except AttributeError:
        return None


_WATCHERS = _watchers()


def _unwatched() -> bool:
    if _WATCHERS is None:
        return False
    dispatch, function, functorch, tracing, profiler = _WATCHERS
    return not (dispatch() or function() or functorch() or tracing() or profiler())


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
        try:
            return overload(*arguments)
        except RuntimeError as error:
            if "Expected a value of type" in str(error):  # torch's schema check comes before ours
                op.check(arguments[:-1])
                fail(spec.name, "arguments", str(error).splitlines()[0], f"{spec.schema}", TypeError)
            raise

    return run
