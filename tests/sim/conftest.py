"""The simulator's library, beside what the C ABI has."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

import hulukern

LIBRARY = Path(hulukern.__file__).parent / "lib/libhulukern_sim.so"


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        pytest.skip("the simulator is not built (HULUKERN_SIM=OFF)")
    found = ctypes.CDLL(str(LIBRARY))
    found.hk_sim_planted_name.restype = ctypes.c_char_p
    found.hk_last_error.restype = ctypes.c_char_p
    return found
