"""Compiles every Triton kernel without a GPU: each op's own launch code runs on CPU tensors against a stand-in
driver that names an architecture, so what is compiled is what a launch there would compile.

The interpreter and the compiler exclude each other within a process, hence one process per architecture:
``python -m hulukern.testing.offline ARCH FOLDER [OP ...] [--brief]`` leaves machine code and ``kernels.json``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import hulukern
from hulukern.spec import Case, Op
from hulukern.tuning import ARCHITECTURES
from hulukern.validation import dtype_name

# Beside an op's first case: what compiles to other code. A dtype limits the case to it.
MORE: dict[str, tuple[tuple[Case, torch.dtype | None], ...]] = {
    "patch_embed_cut": (
        (Case("no_scores", {"THWC": (2, 56, 56, 3), "patch_size": 14, "merge_size": 2, "scores": False}), None),
    ),
    "token_score": (
        (Case("kept", {"grid_thw": [(4, 8, 8)], "L": 588, "merge_size": 2, "reference": "kept"}), None),
        (Case("large", {"grid_thw": [(4, 8, 8)], "L": 588, "merge_size": 8, "reference": "kept"}), None),
    ),
    "token_score_frames": (
        (Case("kept", {"THWC": (4, 56, 56, 3), "patch_size": 14, "merge_size": 2, "reference": "kept"}), None),
        (Case("large", {"THWC": (4, 144, 144, 3), "patch_size": 24, "merge_size": 6}), None),
    ),
    # Labels are filled with 1, which Triton would take for a constant.
    "token_compact": ((Case("labels", {"N": 64, "labels": True}), torch.bfloat16),),
    "rope_attention": ((Case("d128", {"lengths": (300,), "A": 2, "D": 128}), torch.bfloat16),),
    "rope_attention_backward": (
        (Case("d128", {"lengths": (300,), "A": 2, "D": 128}), torch.bfloat16),
        # One fp32 row of the tuning table serves every width, and spills do not follow from it.
        *((Case(f"d{D}", {"lengths": (300,), "A": 2, "D": D}), torch.float32) for D in (64, 80, 96, 128)),
    ),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel as one call launches it. ``constants`` are its constexprs by name."""

    op: str
    case: str
    dtype: str
    kernel: str
    file: str
    warps: int
    stages: int
    shared_bytes: int
    products: int  # matrix products in Triton's own last form
    product_work: int  # their multiply-adds
    tensor_columns: int  # of tensor memory, on sm_100
    constants: dict[str, Any]


class OfflineDriver:
    """What Triton asks of a device in order to compile for it."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def cases(op: Op, brief: bool = False) -> Iterator[tuple[Case, torch.dtype]]:
    """Brief is one dtype a case, bf16 where there is a choice."""
    main = op.main_dtype
    for case, only in ((op.cases[0], None), *MORE.get(op.name, ())):
        for dtype in op.dtypes:
            if only in (None, dtype) and not (brief and dtype != main):
                yield case, dtype


@contextlib.contextmanager
def launches(**more: Any) -> Iterator[list[Any]]:
    """The compiled kernels of all launches meanwhile, each with ``more`` options; none under the interpreter."""
    from triton.runtime.jit import JITFunction

    launched: list[Any] = []
    real_run = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> None:
        launched.append(real_run(self, *args, **{**options, **more}))

    with mock.patch.object(JITFunction, "run", run):
        yield launched


def compile_all(architecture: int, folder: Path, ops: Sequence[str] = (), brief: bool = False) -> None:
    """Leave <op>.<case>.<dtype>.<n>.cubin for every kernel that the calls would launch, and kernels.json."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    triton.runtime.driver.set_active(OfflineDriver(architecture))
    found: list[Compiled] = []
    with launches(warmup=True) as launched, mock.patch("hulukern.backends.unavailable", return_value=""):
        for name, registered in hulukern.OPS.items():
            op = registered.spec
            if "triton" not in op.backends or (ops and name not in ops):
                continue
            module, _, attribute = op.backends["triton"].partition(":")
            function = getattr(importlib.import_module(f"{registered.package}.{module}"), attribute)
            seen: set[int] = set()
            for case, dtype in cases(op, brief):
                arguments = op.sample(case, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
                launched.clear()
                function(*(arguments[a] for a in op.argument_names))
                new = [kernel for kernel in dict.fromkeys(launched) if id(kernel) not in seen]
                seen |= {id(kernel) for kernel in new}
                for n, kernel in enumerate(new):
                    file = f"{name}.{case.name}.{dtype_name(dtype)}.{n}.cubin"
                    (folder / file).write_bytes(kernel.asm["cubin"])
                    found.append(_described(kernel, op, case, dtype, file))
    text = json.dumps([asdict(c) for c in found], indent=1)
    (folder / "kernels.json").write_text(text + "\n")


def _described(kernel: Any, op: Op, case: Case, dtype: torch.dtype, file: str) -> Compiled:
    names, meta = kernel.src.fn.arg_names, kernel.metadata
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    plain = {name: value for name, value in constants.items() if isinstance(value, int | float | str | bool)}
    shapes = re.findall(
        r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .*?(?:tensor|memdesc)<(\d+)x(\d+)x.*?(?:tensor|memdesc)<\d+x(\d+)x",
        kernel.asm["ttgir"],
    )
    work = sum(int(m) * int(k) * int(n) for m, k, n in shapes)
    return Compiled(
        op.name, case.name, dtype_name(dtype), meta.name, file, meta.num_warps, meta.num_stages, meta.shared,
        len(shapes), work, getattr(meta, "tmem_size", None) or 0, plain,
    )  # fmt: skip


def compile_in_subprocess(
    architecture: int, folder: Path, ops: Sequence[str] = (), brief: bool = False, cache: Path | None = None
) -> list[Compiled]:
    """What a fresh process without the interpreter compiles; RuntimeError with its words if it fails. ``cache`` is
    Triton's, kept for the next time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(hulukern.__file__).parents[1]), *sys.path[1:]])
    environment.setdefault("TRITON_CACHE_DIR", str(cache or folder / "cache"))
    command = [sys.executable, "-m", "hulukern.testing.offline", str(architecture), str(folder), *ops]
    command += ["--brief"] if brief else []
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"sm_{architecture}: {run.stderr[-4000:]}")
    return [Compiled(**entry) for entry in json.loads((folder / "kernels.json").read_text())]


def tool(name: str) -> Path | None:
    """A CUDA binary tool of the triton wheel, if it ships it."""
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__path__[0]) / "bin" / name
    return path if path.exists() else None


if __name__ == "__main__":
    assert int(sys.argv[1]) in ARCHITECTURES
    names = [name for name in sys.argv[3:] if name != "--brief"]
    compile_all(int(sys.argv[1]), Path(sys.argv[2]), names, "--brief" in sys.argv)
