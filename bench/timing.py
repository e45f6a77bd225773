"""Interleaved timing in one process.

The machine's speed drifts by tens of percent within seconds, so implementations take turns in a new
random order every round, and ratios are taken within a round. Medians, with an interval from order
statistics: distribution-free, 95 % for the median.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds, or a ratio without unit. low..high is a 95 % interval of the median; n rounds."""

    median: float
    low: float
    high: float
    n: int


def summarize(values: Sequence[float]) -> Timing:
    """Median and its order-statistics interval: of fewer than 6 values it is their range, which holds less."""
    if not values:
        raise ValueError("summarize: values has 0 entries, expected at least 1")
    ordered, n = sorted(values), len(values)
    low = _outside(n)
    return Timing(statistics.median(ordered), ordered[low], ordered[n - 1 - low], n)


@functools.cache
def _outside(n: int) -> int:
    """How many of n values on either side may be left out of an interval that holds the median with 95 %: binomial,
    p = 1/2, and beyond 100 by its normal approximation."""
    if n > 100:
        return math.floor((n - 1.96 * math.sqrt(n)) / 2) - 1
    outside, below = 0, 1.0  # of 2^n: fewer than one value below the median
    while 2 * below <= 0.05 * 2.0**n:
        outside += 1
        below += math.comb(n, outside)
    return max(outside - 1, 0)


@dataclass(frozen=True)
class Rounds:
    """Seconds per round and implementation, in the order of the rounds."""

    seconds: Mapping[str, list[float]]

    def timing(self, name: str) -> Timing:
        return summarize(self.seconds[name])

    def ratio(self, slow: str, fast: str) -> Timing:
        """How many times faster ``fast`` is than ``slow``, round by round."""
        return summarize([s / f for s, f in zip(self.seconds[slow], self.seconds[fast], strict=True)])


def interleave(
    implementations: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 60,
    warmups: int = 2,
    tick: Callable[[], None] | None = None,
) -> Rounds:
    """Run all of them in turns for about ``seconds``, at least ``min_rounds`` rounds.

    Every call's result is held until the next of the same implementation, so that an allocator cannot
    hand back warm pages to one of them only, and no result can be reused.
    """
    if not implementations:
        raise ValueError("interleave: implementations has 0 entries, expected at least 1")
    order = list(implementations)
    shuffle = random.Random(0)
    held: dict[str, Any] = {}
    for _ in range(warmups):
        for name in order:
            held[name] = implementations[name]()
    found: dict[str, list[float]] = {name: [] for name in order}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter_ns()
            held[name] = implementations[name]()
            found[name].append((time.perf_counter_ns() - start) / 1e9)
        rounds += 1
        if tick is not None:
            tick()
    return Rounds(found)


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes by which a call raises this process's resident memory at its highest."""
    if not _has_glibc():
        raise ValueError(f"platform: has {platform.platform()}, expected Linux with glibc for a peak of memory")
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not serve this one unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _resident("VmRSS")
    held = call()
    highest = _resident("VmHWM")
    del held
    return highest - before


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(field)))


def keep_freed_memory() -> bool:
    """Tell glibc to hand out freed memory again instead of giving it back, as PyTorch's tuning guide does with
    jemalloc: otherwise every large result costs its page faults anew, which weigh more than the op itself. Whether
    it could be told; results say so."""
    if not _has_glibc():
        return False
    options = ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 28))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    return all(ctypes.CDLL(None).mallopt(option, value) == 1 for option, value in options)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def n_cold(n_bytes: int, device: str) -> int:
    """Argument sets of ``n_bytes`` that together exceed a GPU's last-level cache twice; 1 on a CPU."""
    if device != "cuda":
        return 1
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(16, 1 + 2 * cache // max(n_bytes, 1))


# A GPU spins before a timed call, so that the host is done launching when the clock starts: at least 100 us, twice the
# host's time of that call, and no more than 20 ms, in cycles at 2 GHz.
_SPIN_CYCLES = (200_000, 40_000_000)


def interleave_cuda(
    implementations: Mapping[str, Callable[[int], Any]],
    *,
    sets: int,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 200,
) -> Rounds:
    """As :func:`interleave` on the current GPU, by events. Implementations take the number of an argument
    set, 0 to ``sets - 1``; sets are rotated, so that the caches hold another one's data."""
    import torch  # not above: comparing files needs nothing but Python

    order = list(implementations)
    shuffle = random.Random(0)
    for name in order:
        for k in range(sets):
            implementations[name](k)
    spin = {}
    for name in order:
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        implementations[name](0)
        spin[name] = max(_SPIN_CYCLES[0], min(_SPIN_CYCLES[1], int(4e9 * (time.perf_counter() - start_s))))
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in order}
    end = time.perf_counter() + seconds
    rounds = turn = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        shuffle.shuffle(order)
        for name in order:
            turn += 1  # with every call: the one before may have left its own set in the caches
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(spin[name])
            start.record()
            held = implementations[name](turn % sets)
            stop.record()
            stop.synchronize()
            del held
            found[name].append(start.elapsed_time(stop) / 1e3)
        rounds += 1
    return Rounds(found)
