"""The simulator that runs CUDA kernels on the host finds what it is there to find, and names the place."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc/sim/planted.cu"

# What the report must say; a kernel without a fault line must pass.
SAYS = {
    "sound": "",
    "read_without_barrier": r"race .* read without a barrier after the write by thread \d+ at line {line-2}",
    "read_without_warp_barrier": r"race .* read without a barrier after the write by thread \d+ at line {line-1}",
    "write_without_barrier": r"race .* write without a barrier after the read by thread \d+ at line {line-1}",
    "same_place": r"race .* at byte 0: write without a barrier after the write by thread 0",
    "global_read_outside": r"out-of-bounds read of 4 bytes at byte 256 of in, which has 256 .*, thread 63",
    "global_write_outside": r"out-of-bounds write of 4 bytes at byte -4 of out, which has 256 .*, thread 5",
    "global_misaligned": r"misaligned read of 16 bytes in global memory .*, thread 1",
    "shared_outside": r"out-of-bounds write of 4 bytes at element 64 of 64 in shared memory .*, thread 63",
    "unwritten_shared": r"read of unwritten shared memory at byte 28 .*, thread 7",
    "unwritten_workspace": r"read of unwritten memory at byte 0 of workspace .*, thread 0",
    "divergent_barrier": r"divergent collective: block_barrier here, which thread \d+ has left the kernel without",
    "divergent_sum": r"divergent collective: warp_reduce here, while thread 0 is at warp_reduce in line {line-2}",
    "barrier_and_sum": r"divergent collective: block_barrier here, while thread \d+ is at warp_reduce in line {line+2}",
    "copy_not_waited_for": r"read of shared memory whose cp.async \(line {line-4}\) was not waited for",
    "copy_without_barrier": r"race .* read without a barrier after the write by thread \d+ at line {line-3}",
}


def fault_line(kernel: str) -> int:
    """The line marked `// fault` in a kernel, counted from 1."""
    lines = SOURCE.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if f"void {kernel}(" in line)
    return next(i for i, line in enumerate(lines) if i > begin and line.endswith("// fault")) + 1


def test_every_planted_kernel_is_expected(library: ctypes.CDLL) -> None:
    names = [library.hk_sim_planted_name(i).decode() for i in range(len(SAYS))]
    assert names == list(SAYS)
    assert library.hk_sim_planted_name(len(SAYS)) is None


@pytest.mark.parametrize("kernel", SAYS)
def test_planted_fault_is_reported(library: ctypes.CDLL, kernel: str) -> None:
    status = library.hk_sim_run_planted(list(SAYS).index(kernel))
    if not SAYS[kernel]:
        assert status == 0, library.hk_last_error()
        return
    assert status != 0, f"{kernel} passed"
    report = library.hk_last_error().decode()
    line = fault_line(kernel)
    says = re.sub(r"\{line([-+]\d+)\}", lambda m: str(line + int(m[1])), SAYS[kernel])
    where = rf"planted: .*{kernel}: (?=.*{says}).* at planted\.cu:{line}, block \(0, 0, 0\), thread \d+$"
    assert re.match(where, report), report


def test_a_fault_leaves_nothing_behind(library: ctypes.CDLL) -> None:
    names = list(SAYS)
    assert library.hk_sim_run_planted(names.index("divergent_barrier")) != 0
    assert library.hk_sim_run_planted(names.index("sound")) == 0
