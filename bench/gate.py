"""Gate a change: builds a base and a head, measures both in turns, and gives a verdict per op.

Each side is a process of its own; blocks of about 20 ms alternate (base head head base …), so that what drifts slower
than a pair cancels. A block counts by the median of its calls. Both are launched anew nine times, since where memory
happens to lie can make a process a few percent slower for its whole life: a launch counts once, by the median ratio of
its pairs, and the interval is that of the launches. What nine leave ambiguous gets nine more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.compare import Finding, add_output_arguments, check_threshold, report
from bench.results import row, write_results
from bench.stats import AMBIGUOUS, FASTER, SAME, SLOWER, Ratio, paired
from bench.timing import summarize

EXAMPLES = """examples:
  python -m bench gate --base origin/main
  python -m bench gate --base HEAD~1 --op token_score --seconds 10 --markdown pr.md --junit junit.xml
  python -m bench gate --base HEAD                    what this machine's noise does: everything should be SAME
  python -m bench gate --base HEAD --op layer_norm --rates 20      how often it is right here, 20 runs each

exit codes: 0 none slower, 1 some slower, 2 cannot judge: ambiguous, a build that fails, bad arguments
"""
ROOT = Path(__file__).parents[1]
BLOCK_S = 0.02
MIN_CALLS = 7  # in a block, whose median counts
VERDICTS = (SLOWER, AMBIGUOUS, SAME, FASTER)
LAUNCHES = 9  # of each side: the fewest whose interval may leave out one on either end
ROUNDS = 2  # of so many launches, the second for what is ambiguous after the first
MIN_PAIRS = 8  # in a launch
PLANTED = (0.0, 0.05, 0.10, 0.20)  # slowdowns of the head whose detection --rates counts


class Side:
    """A worker process that measures one build."""

    def __init__(self, root: Path, device: str, slower: float = 0.0) -> None:
        # Freed memory stays with the process: page faults of fresh results vary more than what is judged. In huge
        # pages: else what came first had scattered ones on a virtual machine, and was 8 % slower at every launch.
        kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(1 << 28)}
        tunables = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1"]))
        # The worker forks: nothing may start CUDA before, not even the question whether there is a GPU.
        asked = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        environment = {**os.environ, **kept, **asked, "GLIBC_TUNABLES": tunables, "PYTHONPATH": str(root)}
        # -P: bench/profile.py must not stand for Python's.
        command = [sys.executable, "-P", str(ROOT / "bench" / "worker.py"), device]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 — closed with the process; a pipe that nobody reads would fill
        self.root, self.slower = root, slower
        self.process = subprocess.Popen(
            command, env=environment, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.said,
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.said.seek(0)
            said = self.said.read().strip().splitlines()
            raise ValueError(f"{self.root}: has a worker that died ({said[-1] if said else 'no message'})")
        return json.loads(answer)

    def block(self, name: str, calls: int) -> float:
        return float(self.ask(name=name, calls=calls, slower=self.slower))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Pairs:
    """Seconds per call, base and head of each pair, by launch."""

    base: list[list[float]] = field(default_factory=list)
    head: list[list[float]] = field(default_factory=list)

    def ratio(self) -> Ratio:
        middle = [
            statistics.median(h / b for b, h in zip(*launch, strict=True))
            for launch in zip(self.base, self.head, strict=True)
        ]
        return paired([1.0] * len(middle), middle)


def measure(
    base: Path, head: Path, device: str, wanted: list[str] | None, seconds: float, threshold: float, slower: float = 0.0
) -> dict[str, Pairs]:
    """Pairs for everything both builds can do, ``seconds`` of measuring per name and round of launches at most.
    ``slower`` plants a slowdown of that share in the head, to see whether it is found."""
    found: dict[str, Pairs] = {}
    with Side(base, device) as a, Side(head, device, slower) as b:
        theirs, ours = a.ask(list=None), b.ask(list=None)
        unknown = set(wanted or ()) - {n.split("/")[0] for n in ours}
        if unknown:
            raise ValueError(f"--op: has {', '.join(sorted(unknown))}, expected ops that can be measured here")
        for n in sorted({*theirs, *ours}):
            if theirs.get(n) != ours.get(n) and (not wanted or n.split("/")[0] in wanted):
                print(f"bench gate: {n} is not the same in both, and left out", file=sys.stderr)
        names = [n for n in ours if theirs.get(n) == ours[n] and (not wanted or n.split("/")[0] in wanted)]
        if not names:
            raise ValueError(f"{head}: has nothing to measure that {base} has, expected ops in common")
        for launch in range(ROUNDS * LAUNCHES):
            if launch and launch % LAUNCHES == 0:
                names = [n for n in names if found[n].ratio().verdict(threshold) == AMBIGUOUS]
            if not names:
                break
            # Each side in other places, and first in turns: what chance gave must not be shared, nor go to one of them.
            first, second = (a, b) if launch % 2 == 0 else (b, a)
            first.ask(launch=2 * launch)
            second.ask(launch=2 * launch + 1)
            for name in names:
                blocks = dict(zip((first, second), _one_launch(first, second, name, seconds, threshold), strict=True))
                pairs = found.setdefault(name, Pairs())
                pairs.base.append(blocks[a])
                pairs.head.append(blocks[b])
            first.ask(end=None)
            second.ask(end=None)
    return found


def _one_launch(a: Side, b: Side, name: str, seconds: float, threshold: float) -> tuple[list[float], list[float]]:
    """Pairs until the launch's own interval is narrow beside the threshold, or its share of ``seconds`` is over."""
    once = min(a.block(name, 3), b.block(name, 3))
    calls = max(MIN_CALLS, min(10_000, round(BLOCK_S / max(once, 1e-7))))
    end = time.perf_counter() + seconds / LAUNCHES
    found: tuple[list[float], list[float]] = ([], [])
    while True:
        for side in (0, 1) if len(found[0]) % 2 == 0 else (1, 0):
            found[side].append((a, b)[side].block(name, calls))
        if len(found[0]) < MIN_PAIRS:
            continue
        ratio = paired(*found)
        if ratio.high - ratio.low < threshold / 2 or time.perf_counter() > end:
            return found


def worktree(reference: str, folder: Path) -> Path:
    """A built checkout of ``reference``, kept under its commit's name for the next time."""
    commit = _git("rev-parse", "--verify", f"{reference}^{{commit}}")
    path = folder / commit[:12]
    if not path.exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", "--force", str(path), commit)
    _build(path)
    return path


def _build(root: Path) -> None:
    """Like `make build` in that tree, without CUDA where no GPU is: what it runs is all that is measured."""
    sources = sorted([*(root / "csrc").rglob("*"), root / "CMakeLists.txt", root / "setup.py"])
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources if p.is_file())).hexdigest()
    stamp = root / "build" / "gate.stamp"
    if stamp.exists() and stamp.read_text() == digest:
        return
    import torch

    options = "" if torch.cuda.is_available() else "-DHULUKERN_CUDA=OFF"
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=root, text=True, capture_output=True,
        env={**os.environ, "HULUKERN_CMAKE_ARGS": options, "PATH": _path()}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{root}: has a build that fails ({(done.stderr or done.stdout).strip()[-400:]})")
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(digest)


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: has failed ({done.stderr.strip()}), expected a commit here")
    return done.stdout.strip()


def judge(found: Mapping[str, Pairs], threshold: float) -> list[Finding]:
    findings = []
    for name, pairs in found.items():
        ratio = pairs.ratio()
        findings.append(Finding(name, ratio, ratio.verdict(threshold)))
    return findings


def rates(runs: int, base: Path, head: Path, options: argparse.Namespace, device: str) -> int:
    """How often the gate is right on this machine: ``runs`` gate runs for each planted slowdown of the head. 1 when
    one that should be the same was called slower, or a slowdown of twice the threshold or more faster or the same."""
    found: list[dict[str, Any]] = []
    for planted in PLANTED:
        for n in range(runs):
            pairs = measure(base, head, device, options.op, options.seconds, options.threshold, planted)
            for f in judge(pairs, options.threshold):
                ratio = asdict(f.ratio)
                found.append({"planted": planted, "run": n, "name": f.name, "verdict": f.verdict, **ratio})
            last = ", ".join(f"{e['verdict']} {e['value']:.3f}" for e in found[-len(pairs) :])
            print(f"planted {100 * planted:g} %, run {n + 1} of {runs}: {last}", file=sys.stderr, flush=True)
            if options.json is not None:
                write_results(options.json, [], [], suite="gate", threshold=options.threshold, verdicts=found)
    names = list(dict.fromkeys(e["name"] for e in found))
    print(f"{'measurement':<48} {'planted':>8} " + " ".join(f"{v:>9}" for v in VERDICTS) + "   median ratio")
    wrong = 0
    for name in names:
        for planted in PLANTED:
            these = [e for e in found if (e["name"], e["planted"]) == (name, planted)]
            counts = [sum(e["verdict"] == v for e in these) for v in VERDICTS]
            middle = statistics.median(e["value"] for e in these)
            print(f"{name:<48} {100 * planted:6g} % " + " ".join(f"{c:9d}" for c in counts) + f"   {middle:.3f}")
            bad = {SLOWER, FASTER} if not planted else {SAME, FASTER} if planted >= 2 * options.threshold else {FASTER}
            wrong += sum(e["verdict"] in bad for e in these)
    print(f"{wrong} wrong verdicts of {len(found)}; AMBIGUOUS says that it cannot tell")
    return 1 if wrong else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="REF", help="a commit, branch or tag")
    parser.add_argument("--head", metavar="REF", help="another one (default: the working tree as it is)")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring per op and case, at most (default: 8)")
    parser.add_argument(
        "--rates", type=int, default=0, metavar="N",
        help="instead, count right and wrong verdicts of N runs as they are and with planted slowdowns",
    )  # fmt: skip
    parser.add_argument("--worktrees", type=Path, default=ROOT / "build" / "gate", metavar="DIR", help="kept there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every pair")
    add_output_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check_threshold(options.threshold)
    if not options.seconds > 0 or options.rates < 0:
        raise ValueError(f"--seconds, --rates: have {options.seconds} and {options.rates}, expected above 0")
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = worktree(options.base, options.worktrees)
    head = ROOT if options.head is None else worktree(options.head, options.worktrees)
    if head == ROOT:
        subprocess.run(["make", "--silent", "build"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"base {base.name}, head {'the working tree' if head == ROOT else head.name}, {device}", file=sys.stderr)
    if options.rates:
        return rates(options.rates, base, head, options, device)
    found = measure(base, head, device, options.op, options.seconds, options.threshold)
    if options.json is not None:
        rows, samples = [], []
        for name, pairs in found.items():
            op, case, dtype, direction, impl = name.split("/")
            for side, launches in (("base", pairs.base), ("head", pairs.head)):
                values = [v for launch in launches for v in launch]
                rows.append(row(op, case, dtype, direction, f"{impl} {side}", summarize(values)))
                samples.append(values)
        write_results(options.json, rows, [], samples=samples)
    return report(judge(found, options.threshold), options)
