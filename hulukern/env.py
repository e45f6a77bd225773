"""``python -m hulukern.env``: what is installed, which backends work, and why the others do not.

Examples:
  python -m hulukern.env           a page to paste into a bug report
  python -m hulukern.env --json    the same for programs
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

from hulukern.backends import BACKENDS, native_error, simulating, unavailable
from hulukern.registry import OPS

PACKAGES = ("torch", "triton", "numpy", "transformers", "cupy-cuda13x", "pybind11", "ninja", "pytest-benchmark")


def report() -> dict[str, Any]:
    """Everything as plain data."""
    import hulukern

    return {
        "hulukern": hulukern.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "gpu": _gpus(),
        "native": _native(),
        "openmp": openmp_libraries(),
        "backends": {name: unavailable(name) or "works" for name in BACKENDS},
        "ops": {
            name: {
                b: "written" if b in op.spec.backends else op.spec.absent.get(b, "not written yet") for b in BACKENDS
            }
            for name, op in OPS.items()
        },
    }


def openmp_libraries() -> list[str]:
    """OpenMP runtimes loaded in this process. One is right. Two are harmless here: every parallel region
    names its thread count, so a second pool has that many threads and sleeps between calls."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except OSError:
        return []
    wanted = ("libgomp", "libomp", "libiomp")
    return sorted(os.path.realpath(p) for p in paths if os.path.basename(p).startswith(wanted))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]


def _native() -> dict[str, Any]:
    if native_error():
        return {"error": native_error()}
    from hulukern import _C

    return {
        "cpu_level": _C.cpu_level(),
        "openmp": _C.openmp,
        "cuda": _C.cuda_archs or f"absent: {_C.cuda_absent_reason}",
        "simulator": "HULUKERN_SIM=1: backend cuda runs on CPU tensors" if simulating() else "off (HULUKERN_SIM=1)",
    }


def _print(data: dict[str, Any], indent: int = 0) -> None:
    width = max(len(key) for key in data)
    for key, value in data.items():
        if isinstance(value, dict) and value:
            print(" " * indent + key)
            _print(value, indent + 2)
        else:
            text = ", ".join(value) or "none" if isinstance(value, list) else value
            print(f"{' ' * indent}{key:<{width}}  {text}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m hulukern.env", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    data = report()
    if options.json:
        json.dump(data, sys.stdout, indent=2)
        print()
    else:
        _print(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
