"""Figures as inline SVG that follows the page: colours are CSS variables, text is text in the page's font.

Drawn narrow, so that a phone shows them at about the size of its text and a desktop larger.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.roofline import OURS
from hulukern.pruning import RULES

# matplotlib knows no CSS variables: colours that nothing else has stand for them until the SVG is written.
INK, SOFT, LINE = "#010101", "#020202", "#030303"
SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
_NAMES = {INK: "ink", SOFT: "soft", LINE: "line"} | {colour: f"s{i}" for i, colour in enumerate(SERIES)}
WIDTH = 5.6  # inches of 72 units


def svg(draw: Callable[[Any], None], label: str, height: float = 3.4) -> str:
    """``draw`` gets matplotlib axes in the page's colours; ``label`` is read out to who cannot see it."""
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9, "axes.edgecolor": SOFT, "axes.labelcolor": SOFT,
        "text.color": INK, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": LINE, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=SERIES),
        "text.parse_math": False,  # names of files are no formulas
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _spread(axes: Any, at: Sequence[float], rows: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
    reach = [[a - b for a, b in zip(at, low, strict=True)], [b - a for a, b in zip(at, high, strict=True)]]
    axes.errorbar(at, rows, xerr=reach, fmt="none", ecolor=INK, capsize=2, linewidth=1)


def reduction(pruning: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(o["input"] for o in pruning))
    rules = list(RULES)

    def draw(axes: Any) -> None:
        width = 0.8 / len(rules)
        for k, rule in enumerate(rules):
            values = {o["input"]: 100 * o["reduction"] for o in pruning if o["rule"] == rule}
            axes.bar([i + k * width for i in range(len(names))], [values[n] for n in names], width, label=rule)
        axes.axhline(55, color=INK, linestyle="--", linewidth=1)
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
        axes.set_ylabel("visual tokens removed, %")
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg(draw, "reduction by input and rule against 55 %")


def stages(data: Mapping[str, Any]) -> str:
    """Milliseconds of the stages for rule previous, both backends, with the interval of the total."""
    rows = {(r["op"], r["case"], r["impl"]): r for r in data["rows"]}
    labels = [(n, b) for n in dict.fromkeys(o["input"] for o in data["pruning"]) for b in ("reference", "cpu")]

    def draw(axes: Any) -> None:
        left = [0.0] * len(labels)
        for stage in ("cut_score", "mask", "compact"):
            ms = [rows[f"stage_{stage}", f"{n}/previous", b]["median_s"] * 1e3 for n, b in labels]
            axes.barh(range(len(labels)), ms, left=left, label=stage)
            left = [a + b for a, b in zip(left, ms, strict=True)]
        totals = [rows["stage_total", f"{n}/previous", b] for n, b in labels]
        at, low, high = ([1e3 * t[k] for t in totals] for k in ("median_s", "low_s", "high_s"))
        _spread(axes, at, range(len(labels)), low, high)
        axes.set_yticks(range(len(labels)), [f"{n} · {b}" for n, b in labels])
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("ms, logarithmic beyond 1; whisker: 95 % interval of the total")
        axes.legend()

    return svg(draw, "time by stage", 0.3 * len(labels) + 1)


def roofline(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> str:
    """FLOP/s over FLOP per byte; ``rows`` are numbered in their order."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    def draw(axes: Any) -> None:
        x = [r["flops"] / r["bytes"] for r in rows]
        y = [r["flops"] / r["median_s"] for r in rows]
        span = [min(x) / 4, max(x) * 4]
        for title, style in (("measured", "-"), ("datasheet", ":")):
            roof = ceilings[title]
            if roof is None:
                continue
            for dtype in ("bfloat16", "float32"):
                peak = roof["flops_per_s"][dtype]
                knee = peak / roof["bytes_per_s"]
                path = [span[0], *([knee] if span[0] < knee < span[1] else []), span[1]]
                roofed = [min(peak, v * roof["bytes_per_s"]) for v in path]
                axes.plot(path, roofed, style, color=SOFT, linewidth=1.2)
                where = f"{dtype}, {title}"
                axes.annotate(where, (span[1], peak), (0, 3), textcoords="offset points", ha="right", color=SOFT)
        for impl, marker in zip(OURS, "os^", strict=True):
            mine = [i for i, r in enumerate(rows) if r["impl"] == impl]
            if mine:
                axes.plot([x[i] for i in mine], [y[i] for i in mine], marker, label=impl, markersize=5)
        for i in range(len(rows)):
            axes.annotate(str(i + 1), (x[i], y[i]), (4, 3), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e9:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(min(y) / 10, axes.get_ylim()[1] * 1.5)  # a decade at least, so that ticks have numbers
        axes.set_xlabel("FLOP per byte that must move")
        axes.set_ylabel("GFLOP/s")
        axes.grid(alpha=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1))

    return svg(draw, "roofline", 3.8)


def curve(points: Sequence[Mapping[str, Any]], target: float) -> str:
    """Gain over the share removed, per input, against the ideal line."""
    inputs = list(dict.fromkeys(p["input"] for p in points))

    def draw(axes: Any) -> None:
        removed = [r / 100 for r in range(96)]
        axes.plot([100 * r for r in removed], [1 / (1 - r) for r in removed], "--", color=SOFT, label="ideal")
        axes.axvline(100 * target, color=SOFT, linewidth=1, linestyle=":")
        for name, colour in zip(inputs, SERIES * len(inputs), strict=False):
            swept = sorted((p["reduction"], p["gain"]) for p in points if (p["input"], p["rule"]) == (name, "budget"))
            axes.plot([100 * r for r, _ in swept], [g for _, g in swept], "o-", color=colour, markersize=3, label=name)
            for rule, marker in (("previous", "s"), ("bounded", "D")):
                own = [p for p in points if (p["input"], p["rule"]) == (name, rule)]
                axes.plot(
                    [100 * p["reduction"] for p in own], [p["gain"] for p in own], marker, markerfacecolor="none",
                    color=colour, markersize=6,
                )  # fmt: skip
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}×")
        axes.set_xlabel(f"tokens removed, % (dotted: {100 * target:g}; squares, diamonds: rules previous, bounded)")
        axes.set_ylabel("throughput")
        axes.legend()

    return svg(draw, "throughput over reduction", 3.8)


def history(series: Mapping[str, Sequence[tuple[int, float, float, float]]], commits: Sequence[str], unit: str) -> str:
    """Per name (place of the commit, value, low, high)."""

    def draw(axes: Any) -> None:
        for (name, found), colour in zip(series.items(), SERIES * len(series), strict=False):
            at, value, low, high = (list(v) for v in zip(*found, strict=True))
            axes.plot(at, value, "o-", color=colour, markersize=3, linewidth=1, label=name)
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xticks(range(len(commits)), commits, rotation=30, ha="right")
        axes.set_ylabel(unit)
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return svg(draw, f"history, {unit}", 2.8 + 0.1 * len(series))
