"""Triton is interpreted and CUDA simulated where there is no GPU; one switch turns every skip into a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so in what it starts

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    if (Path(__file__).parents[1] / "hulukern/lib/libhulukern_sim.so").exists():
        os.environ.setdefault("HULUKERN_SIM", "1")  # read when the native library is first loaded


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", default=os.environ.get("HULUKERN_NO_SKIPS") == "1",
        help="a skipped test fails, with the reason it gave (also HULUKERN_NO_SKIPS=1)",
    )  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    report = yield
    if report.skipped and item.config.getoption("--no-skips") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --no-skips: {report.longrepr}"
    return report
