"""One side of a gate: measures what it is told, line by line, with the hulukern that PYTHONPATH names.

Run as a file by bench/gate.py, so that base and head are measured by the same code. Requests and answers are one
JSON object a line: ``{"list": null}`` -> names; ``{"launch": seed}`` starts a process that measures until ``{"end":
null}``: ``{"name": …, "calls": n, "slower": share}`` -> seconds of a call, with a planted slowdown of that share.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import torch

import hulukern
from hulukern.backends import unavailable
from hulukern.testing import harness


def names(device: str) -> dict[str, str]:
    """What can be measured -> a description that both sides must share."""
    found = {}
    for op_name, registered in hulukern.OPS.items():
        op = registered.spec
        for backend in ("cpu",) if device == "cpu" else ("triton", "cuda"):
            if backend not in op.backends or unavailable(backend):
                continue
            for case in op.perf_cases:
                dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
                name = f"{op_name}/{case.name}/{str(dtype).removeprefix('torch.')}/fwd/{backend}"
                found[name] = json.dumps(dict(case.sizes), default=str, sort_keys=True)
    return found


def prepare(name: str, device: str) -> Callable[[], Any]:
    """A call of what ``name`` says, checked against the reference first."""
    op_name, case_name, dtype_name, _, backend = name.split("/")
    op = hulukern.OPS[op_name].spec
    case = op.timed_case(case_name)
    arguments = harness.sample(op, case, getattr(torch, dtype_name), device)
    harness.check_forward(op, op.cases[0], getattr(torch, dtype_name), backend, device)
    return lambda: harness.call(op, arguments, backend)


def block(call: Callable[[], Any], calls: int, device: str, slower: float = 0.0) -> float:
    """Median seconds of ``calls`` calls, each of which spins ``slower`` times as long as it took. The median: on a
    shared machine a few calls in a block take many times as long, and a mean would see nothing else (pairs of means
    scatter 5 to 10 times as wide)."""
    times, held = [], None
    for _ in range(calls):
        start = time.perf_counter_ns()
        held = call()
        if device == "cuda":
            torch.cuda.synchronize()
        if slower:
            end = start + (1 + slower) * (time.perf_counter_ns() - start)
            while time.perf_counter_ns() < end:
                pass
        times.append(time.perf_counter_ns() - start)
    del held
    return statistics.median(times) / 1e9


def launch(seed: int, requests: IO[bytes], answers: IO[str], device: str) -> None:
    """Measures in a child. Nothing has been computed in the parent yet, so a child is as good as a new process and is
    there at once; what chance does to places in memory from process to process, blocks of random size do here."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(1)
        return
    draw = random.Random(seed)
    # The large one moves physical pages too, some of which are slower than others on a virtual machine.
    moved = [b"\1" * n for n in (*draw.choices(range(64, 1 << 16, 64), k=64), draw.randrange(1 << 27))]
    say(None, answers)
    prepared: dict[str, Callable[[], Any]] = {}
    while "end" not in (request := json.loads(requests.readline())):
        name = request["name"]
        if name not in prepared:
            prepared[name] = prepare(name, device)
            prepared[name]()
        say(block(prepared[name], request["calls"], device, request["slower"]), answers)
    say(None, answers)
    del moved
    os._exit(0)


def say(answer: Any, answers: IO[str]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    device = sys.argv[1]
    if device == "cpu":  # both sides on the same cores, one a thread
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
    # Nothing is read ahead: the next line may be the child's.
    requests, answers = os.fdopen(0, "rb", buffering=0), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not speak on this line
    while line := requests.readline():
        request = json.loads(line)
        if "list" in request:
            say(names(device), answers)
        else:
            launch(request["launch"], requests, answers, device)


if __name__ == "__main__":
    main()
