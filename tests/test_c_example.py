"""The C example compiles against the installed header and library alone, and runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import hulukern

PREFIX = Path(hulukern.__file__).parent
SOURCE = Path(__file__).parents[1] / "csrc/examples/prune.c"


def test_the_c_example_runs(tmp_path: Path) -> None:
    program = tmp_path / "prune"
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", str(SOURCE), f"-I{PREFIX}/include"]
    link = [f"-L{PREFIX}/lib", "-lhulukern", f"-Wl,-rpath,{PREFIX}/lib", "-o", str(program)]
    subprocess.run([*command, *link], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    # The first frame whole, 4 x 4 cells, then two cells a frame: where the square was and where it is.
    assert said.endswith(f": {16 + 7 * 2} of {8 * 16} tokens stay\n"), said
    assert said.startswith(f"hulukern {hulukern.__version__} on ")
