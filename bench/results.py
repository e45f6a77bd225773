"""The one form of results: rows, checks, and what they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.timing import Timing

ROW = ("op", "case", "dtype", "direction", "impl", "median_s", "low_s", "high_s", "bytes", "flops")
COUNTED = (*ROW, "n")  # with how many samples the interval is of; earlier files do not say
META = ("time", "commit", "torch", "cpu", "native", "gpu")
CHECK = ("name", "value", "low", "high", "target", "met")


def row(
    op: str, case: str, dtype: str, direction: str, impl: str, t: Timing, n_bytes: int = 0, flops: int = 0
) -> dict[str, Any]:
    """One measurement. ``bytes`` and ``flops`` 0 mean that nobody counted."""
    values = (op, case, dtype, direction, impl, t.median, t.low, t.high, n_bytes, flops, t.n)
    return dict(zip(COUNTED, values, strict=True))


def check(name: str, value: float, low: float, high: float, target: float, *, at_most: bool = False) -> dict[str, Any]:
    """A figure against its target, which is a minimum unless ``at_most``. The value itself must reach it,
    not the hopeful end of its interval."""
    met = value <= target if at_most else value >= target
    return {"name": name, "value": value, "low": low, "high": high, "target": target, "met": bool(met)}


def meta() -> dict[str, Any]:
    """What a figure depends on."""
    import torch  # not above: comparing files needs nothing but Python

    import hulukern
    from hulukern.env import report

    root = Path(__file__).parents[1]
    env = report()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("HULUKERN_COMMIT") or _commit(root) or "unknown",
        "hulukern": hulukern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": env["cpu"],
        "native": env["native"],
        "gpu": env["gpu"],
    }


def _commit(root: Path) -> str:
    """Empty where there is no git, or no repository: a copy of the tree names its commit in HULUKERN_COMMIT."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and reasons for throttling as nvidia-smi has them; empty without a GPU."""
    fields = (
        "timestamp,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
        "clocks_throttle_reasons.active"
    )
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return dict(zip(fields.split(","), values, strict=False))


def stored_path(suite: str) -> Path:
    """Where a commit's results are kept: bench/results/<device>/<suite>-<commit>.json."""
    now = meta()
    device = now["gpu"][0] if now["gpu"] else now["cpu"]["model"]
    return Path(__file__).parent / "results" / folder_of(device) / f"{suite}-{now['commit']}.json"


def folder_of(device: str) -> str:
    """In bench/results, of a device by its name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_results(path: Path, rows: list[dict[str, Any]], checks: list[dict[str, Any]], **more: Any) -> None:
    """Write JSON whole or not at all. Raises ValueError when a row or check has other fields."""
    data = {"meta": meta(), "rows": rows, "checks": checks, **more}
    _validate(str(path), data)
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def load_results(path: Path) -> dict[str, Any]:
    """Read and validate. Raises ValueError naming the file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: has content that cannot be read ({error}), expected results JSON") from None
    _validate(str(path), data)
    return dict(data)


def write_text(path: Path, text: str) -> None:
    """Through a temporary file beside it, so that an interrupted run leaves the old one. A link stays one, and what is
    no file (/dev/stdout) is written to."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _validate(source: str, data: Any) -> None:
    known = data.get("meta") if isinstance(data, dict) else None
    missing = [key for key in META if not isinstance(known, dict) or key not in known]
    if missing:
        raise ValueError(f"{source}: has no {', '.join(missing)} in meta, expected results JSON")
    for kind, *forms in (("rows", COUNTED, ROW), ("checks", CHECK)):
        entries = data.get(kind) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{source}: has no list {kind!r}, expected results JSON")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict) or tuple(entry) not in forms:
                came = list(entry) if isinstance(entry, dict) else type(entry).__name__
                raise ValueError(f"{source}: {kind}[{i}] has {came}, expected {list(forms[0])}")
            for name in (name for name in entry if name.endswith("_s")):
                seconds = entry[name]
                if not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
                    raise ValueError(f"{source}: {kind}[{i}] has {name} {seconds!r}, expected seconds above 0")
