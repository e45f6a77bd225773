"""Verdicts on ratios of times: what an interval allows to say, and nothing more.

Two ways to a ratio head / base with a 95 % interval:

* ``paired``: what was taken in turns, base and head; the median of the pairs' ratios with its order-statistics
  interval. A drift that both see cancels within a pair. A process keeps for its life where its memory came to lie,
  which may make it a few percent slower, so what pairs are must be launches, or runs: blocks within one launch agree
  on what is not so. This is what the gate uses, on the medians of its launches.
* ``unpaired``: two finished runs; a percentile bootstrap of the ratio of medians. Drift between the runs stays
  in, so such a comparison is worth less, however narrow its interval looks.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.timing import Timing, summarize

SAME, FASTER, SLOWER, AMBIGUOUS = "SAME", "FASTER", "SLOWER", "AMBIGUOUS"
RESAMPLES = 2000
ENOUGH = 6  # the fewest samples whose smallest and largest hold the median with 95 %


@dataclass(frozen=True)
class Ratio:
    """head / base: above 1 is slower. ``n`` pairs, or the smaller number of samples; 0 where a file does not say."""

    value: float
    low: float
    high: float
    n: int

    def verdict(self, threshold: float) -> str:
        """SLOWER or FASTER when the whole interval lies beyond ``threshold`` (0.03 is 3 %), SAME when all of
        it lies within, AMBIGUOUS when it straddles an edge, or is of fewer samples than make an interval."""
        if 0 < self.n < ENOUGH:
            return AMBIGUOUS
        slower, faster = 1 + threshold, 1 / (1 + threshold)
        if self.low > slower:
            return SLOWER
        if self.high < faster:
            return FASTER
        return SAME if faster <= self.low and self.high <= slower else AMBIGUOUS


def paired(base: Sequence[float], head: Sequence[float]) -> Ratio:
    """From what was taken in turns, pair by pair."""
    t: Timing = summarize([h / b for b, h in zip(base, head, strict=True)])
    return Ratio(t.median, t.low, t.high, t.n)


def unpaired(base: Sequence[float], head: Sequence[float], seed: int = 0) -> Ratio:
    """From two sets of samples, at least 5 each: fewer have no interval worth the name."""
    if min(len(base), len(head)) < 5:
        raise ValueError(f"unpaired: samples have {len(base)} and {len(head)} values, expected at least 5 each")
    draw, base, head = random.Random(seed), sorted(base), sorted(head)
    ratios = sorted(_resampled_median(head, draw) / _resampled_median(base, draw) for _ in range(RESAMPLES))
    value = statistics.median(head) / statistics.median(base)
    return Ratio(value, ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1], min(len(base), len(head)))


def _resampled_median(ordered: Sequence[float], draw: random.Random) -> float:
    """The median of as many draws with replacement, from its distribution and in no time: a draw is
    ``ordered[int(n u)]`` for a uniform u, and the k-th smallest of n uniforms is Beta(k, n + 1 - k)."""
    n = len(ordered)
    k = (n + 1) // 2
    u = draw.betavariate(k, n + 1 - k)
    median = ordered[min(int(n * u), n - 1)]
    if n % 2:
        return median
    u += (1 - u) * draw.betavariate(1, n - k)  # the smallest of the n - k uniforms above it
    return (median + ordered[min(int(n * u), n - 1)]) / 2


def of_intervals(base: Timing, head: Timing) -> Ratio:
    """From medians with intervals only: the widest ratio that both allow."""
    return Ratio(head.median / base.median, head.low / base.high, head.high / base.low, min(base.n, head.n))
