"""Which code runs an op, and why another does not. A backend is named or chosen by device, never
swapped silently: what cannot run raises with the reason.

HULUKERN_SIM=1 makes ``backend="cuda"`` take CPU tensors and run the CUDA kernels on the host, checked access by
access: for tests, on machines without a GPU. It loads another library of the same ABI, which a build in a
checkout makes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

logger = logging.getLogger("hulukern")


class BackendUnavailable(RuntimeError):
    """The named backend cannot run here; the message says why."""


# True while a CUDA backend runs on CPU tensors.
on_simulator: ContextVar[bool] = ContextVar("on_simulator", default=False)


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a CUDA backend, run by the simulator."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        token = on_simulator.set(True)
        try:
            return function(*arguments)
        finally:
            on_simulator.reset(token)

    return run


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a CUDA backend. A launch goes to the current device, which need not be its tensors'."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return run


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose products autocast would round: fp32 inside is what it promises."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        device = next(x.device.type for x in arguments if isinstance(x, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def interpreting() -> bool:
    """Whether Triton's kernels are interpreted."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def simulating() -> bool:
    """Whether the CUDA backend is to run on the host."""
    return os.environ.get("HULUKERN_SIM") == "1"


@functools.cache
def native_error() -> str:
    """Why the compiled module cannot be used; empty when it can."""
    try:
        if simulating():  # its functions, loaded first and for all, stand in for the library's
            ctypes.CDLL(str(Path(__file__).parent / "lib" / "libhulukern_sim.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"HULUKERN_SIM=1, but the simulator is not built ({error}); run `make build`"
    try:
        from hulukern import _C
    except ImportError as error:
        return f"the native module is not built ({error}); run `make build`"
    if _C.abi_version != 1:
        return f"the native library has ABI version {_C.abi_version}, expected 1; run `make build`"
    try:
        _C.cpu_level()
    except ValueError as error:
        return str(error)
    codes = ("uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    _C.register_dtypes({getattr(torch, name): code for code, name in enumerate(codes)} | {torch.bool: 0})
    return ""


@functools.cache
def unavailable(backend: str) -> str:
    """Why ``backend`` cannot run anything on this machine; empty when it can."""
    if backend == "reference":
        return ""
    if backend == "cpu":
        return native_error()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not interpreting():
            return "no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
        return ""
    if backend == "cuda":
        if native_error():
            return native_error()
        from hulukern import _C

        if _C.cuda_absent_reason:
            return f"the library has no CUDA kernels: {_C.cuda_absent_reason}"
        if simulating():
            return "" if _C.cuda_archs == "simulated" else "HULUKERN_SIM=1 was set after the library was loaded"
        if not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if not holds_code_for(_C.cuda_archs, 10 * major + minor):
            return f"the library has CUDA code for {_C.cuda_archs}, none that runs on sm_{major}{minor}"
        return ""
    return f"no such backend, expected one of {', '.join(BACKENDS)}"


def holds_code_for(archs: str, capability: int) -> bool:
    """Whether code for CMake's ``archs`` runs on a device: machine code on later ones of its generation, with an "a" on
    its own only, and PTX on all later ones."""
    for arch in re.split(r"[;, ]+", archs):
        number = re.match(r"(\d+)([af]?)(-real|-virtual)?$", arch)
        if number is None:  # native, all, all-major
            return True
        of, own, kind = int(number[1]), number[2], number[3]
        same = of == capability if own == "a" else of <= capability and of // 10 == capability // 10
        if (same and kind != "-virtual") or (of <= capability and not own and kind != "-real"):
            return True
    return False


def runs_on(backend: str, device_type: str) -> bool:
    """Whether the backend takes tensors of this device type (interpreted Triton and simulated CUDA
    take CPU tensors)."""
    if backend == "reference":
        return True
    if backend == "triton" and interpreting():
        return True
    if backend == "cuda" and simulating():
        return device_type == "cpu"
    return device_type == ("cpu" if backend == "cpu" else "cuda")


@functools.cache
def choose(op: str, available: tuple[str, ...], device_type: str) -> str:
    """The default for a device: native kernels, then Triton, then the reference. Logged once per op."""
    order = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device_type, ())
    reasons = []
    for backend in order:
        reason = unavailable(backend) if backend in available else f"has no {op}"
        if not reason:
            logger.info("%s on %s: backend %s", op, device_type, backend)
            return backend
        reasons.append(f"{backend}: {reason}")
    level = logging.WARNING if reasons else logging.INFO
    logger.log(level, "%s on %s: backend reference (%s)", op, device_type, "; ".join(reasons) or "no other")
    return "reference"
