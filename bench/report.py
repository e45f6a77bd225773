"""What a run found, for people: tables on the terminal, and one self-contained HTML page.

Every number comes from the JSON; the pictures from the frames and masks of the same run.
"""

from __future__ import annotations

import base64
import html as markup
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from bench.results import load_results
from hulukern.pruning import RULES
from model.pictures import contact_sheet, stack

if TYPE_CHECKING:
    from rich.console import Console

    from bench.quick import Input

Masks = Mapping[tuple[str, str], torch.Tensor]

CELL = 28  # pixels of one token's side: patch 14, merge 2

STYLE = """
:root{--ink:#1c2430;--soft:#5c6675;--line:#d9dee6;--paper:#fff;--panel:#f5f7fa;--good:#1a7f4b;--bad:#b3372f}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b4;--line:#343c48;--paper:#14181e;--panel:#1c222b;
--good:#5cc98c;--bad:#f08078}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;
max-width:1080px;padding:1.2rem}h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .6rem}
p,figcaption{color:var(--soft);max-width:70ch}figure{margin:1rem 0}img{max-width:100%;height:auto;border-radius:6px;
display:block}.plot{background:#fff;padding:.4rem}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}th:first-child,td:first-child,td.t{text-align:left}th{color:var(--soft);font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}
"""


# --- numbers ----------------------------------------------------------------------------------------------


def pruning_table(data: dict[str, Any]) -> list[list[str]]:
    stages = {
        (r["op"], r["case"], r["impl"]): r["median_s"] * 1e3 for r in data["rows"] if r["op"].startswith("stage_")
    }
    rows = [
        ["input", "rule", "tokens", "kept", "reduction", "55 %", "drift max", "mean", "lost",
         "cut+score ms", "mask ms", "compact ms", "total ms", "x reference"],
    ]  # fmt: skip
    for o in data["pruning"]:
        case = f"{o['input']}/{o['rule']}"
        times = [stages.get((f"stage_{s}", case, "cpu")) for s in ("cut_score", "mask", "compact", "total")]
        slow = stages.get(("stage_total", case, "reference"))
        speedup = slow / times[-1] if slow and times[-1] else None
        rows.append(
            [
                o["input"], o["rule"], str(o["before"]), str(o["after"]), f"{100 * o['reduction']:.1f} %",
                "yes" if o["reduction"] >= 0.55 else "no", f"{o['drift_max']:.3f}", f"{o['drift_mean']:.3f}",
                str(o["lost"]), *("" if t is None else f"{t:.2f}" for t in times),
                "" if speedup is None else f"{speedup:.1f}",
            ]
        )  # fmt: skip
    return rows


def op_table(data: dict[str, Any]) -> list[list[str]]:
    rows = [["op", "case", "dtype", "backend", "median ms", "95 % interval", "of copy", "x torch"]]
    ops = [r for r in data["rows"] if not r["op"].startswith(("stage_", "copy"))]
    for r in ops:
        same = [o for o in ops if o["op"] == r["op"]]
        torch_rows = [o for o in same if o["impl"].startswith("torch")] or [o for o in same if o["impl"] == "reference"]
        base = min(o["median_s"] for o in torch_rows)
        share = r["bytes"] / r["median_s"] / data["copy_bytes_per_s"]
        rows.append(
            [
                r["op"], r["case"], r["dtype"], r["impl"], f"{r['median_s'] * 1e3:.2f}",
                f"{r['low_s'] * 1e3:.2f} .. {r['high_s'] * 1e3:.2f}", f"{100 * share:.0f} %",
                f"{base / r['median_s']:.2f}",
            ]
        )  # fmt: skip
    return rows


def check_table(data: dict[str, Any]) -> list[list[str]]:
    rows = [["check", "value", "interval", "target", "met"]]
    for c in data["checks"]:
        interval = "" if c["low"] == c["high"] else f"{c['low']:.3g} .. {c['high']:.3g}"
        rows.append([c["name"], f"{c['value']:.3g}", interval, f"{c['target']:.3g}", "yes" if c["met"] else "no"])
    return rows


def print_tables(console: Console, path: Path) -> None:
    from rich.table import Table

    data = load_results(path)
    copy = data["copy_bytes_per_s"] / 1e9
    by_rule = "Tokens, drift and time by input and rule (backend cpu, stages in ms; a single frame is kept whole)"
    titles = {
        by_rule: pruning_table(data),
        f"Ops (copy bandwidth {copy:.1f} GB/s, read plus written)": op_table(data),
        "Checks": check_table(data),
    }
    for title, (head, *rows) in titles.items():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 or not _numeric(rows, i) else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def _numeric(rows: list[list[str]], column: int) -> bool:
    return all(not row[column] or row[column][0].isdigit() for row in rows)


# --- pictures ---------------------------------------------------------------------------------------------


def save_picture(path: Path, source: Input, masks: Masks) -> None:
    """One input's first three rules under each other, for a README."""
    sheets = [contact_sheet(source.frames, masks[source.name, rule]) for rule in ("released", "previous", "bounded")]
    whole = stack(sheets)
    whole.thumbnail((1200, 1200))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


def _embed(image: Image.Image, alt: str, plot: bool = False) -> str:
    buffer = io.BytesIO()
    if not plot:
        image.thumbnail((1400, 400))
    image.save(buffer, "PNG" if plot else "JPEG", quality=85)
    kind = "png" if plot else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/{kind};base64,{data}"
    return f'<img class="{"plot" if plot else "sheet"}" alt="{markup.escape(alt)}" src="{source}">'


def _plot(draw: Any, height: float) -> Image.Image:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return Image.open(buffer)


def _reduction_plot(data: dict[str, Any]) -> Image.Image:
    names = list(dict.fromkeys(o["input"] for o in data["pruning"]))
    rules = list(RULES)

    def draw(axes: Any) -> None:
        width = 0.8 / len(rules)
        for k, rule in enumerate(rules):
            values = {o["input"]: 100 * o["reduction"] for o in data["pruning"] if o["rule"] == rule}
            axes.bar([i + k * width for i in range(len(names))], [values[n] for n in names], width, label=rule)
        axes.axhline(55, color="black", linestyle="--", linewidth=1)
        axes.text(len(names) - 0.2, 56, "55 %", ha="right")
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
        axes.set_ylabel("visual tokens removed, %")
        axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)

    return _plot(draw, 4)


def _time_plot(data: dict[str, Any]) -> Image.Image:
    """Milliseconds of the stages for rule previous, both backends, with the interval of the total."""
    rows = {(r["op"], r["case"], r["impl"]): r for r in data["rows"]}
    names = list(dict.fromkeys(o["input"] for o in data["pruning"]))
    labels = [(n, b) for n in names for b in ("reference", "cpu")]

    def draw(axes: Any) -> None:
        left = [0.0] * len(labels)
        for stage in ("cut_score", "mask", "compact"):
            ms = [rows[f"stage_{stage}", f"{n}/previous", b]["median_s"] * 1e3 for n, b in labels]
            axes.barh(range(len(labels)), ms, left=left, label=stage)
            left = [a + b for a, b in zip(left, ms, strict=True)]
        totals = [rows["stage_total", f"{n}/previous", b] for n, b in labels]
        spread = [
            [(t["median_s"] - t["low_s"]) * 1e3 for t in totals],
            [(t["high_s"] - t["median_s"]) * 1e3 for t in totals],
        ]
        at = [t["median_s"] * 1e3 for t in totals]
        axes.errorbar(at, range(len(labels)), xerr=spread, fmt="none", ecolor="black", capsize=3, linewidth=1)
        axes.set_yticks(range(len(labels)), [f"{n} · {b}" for n, b in labels])
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms (linear to 1, then logarithmic); bar: stages, whisker: 95 % interval of the total")
        axes.legend(frameon=False)

    return _plot(draw, 0.4 * len(labels) + 1.2)


def _share_plot(data: dict[str, Any]) -> Image.Image:
    shares = [c for c in data["checks"] if c["name"].startswith("copy_share_")]

    def draw(axes: Any) -> None:
        names = [c["name"].removeprefix("copy_share_") for c in shares]
        axes.barh(names, [100 * c["value"] for c in shares], color="#3b6ea5")
        spread = [[100 * (c["value"] - c["low"]) for c in shares], [100 * (c["high"] - c["value"]) for c in shares]]
        axes.errorbar([100 * c["value"] for c in shares], names, xerr=spread, fmt="none", ecolor="black", capsize=3)
        axes.axvline(100, color="black", linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("% of measured copy bandwidth (cpu backend; bytes are the fewest the op must move)")

    return _plot(draw, 0.45 * len(shares) + 1)


# --- the page ---------------------------------------------------------------------------------------------


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["<div class=scroll><table><tr>" + "".join(f"<th>{markup.escape(c)}</th>" for c in head) + "</tr>"]
    for row in body:
        cells = []
        for cell in row:
            kind = {"yes": ' class="good"', "no": ' class="bad"'}.get(cell, "")
            cells.append(f"<td{kind}>{markup.escape(cell)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join(lines) + "</table></div>"


def html(path: Path, inputs: list[Input], masks: Masks) -> str:
    """The page for the results at ``path``; nothing in it is loaded from elsewhere."""
    data = load_results(path)
    meta = data["meta"]
    facts = f"{meta['cpu']['model']}, {meta['cpu']['torch_threads']} threads, level {meta['native'].get('cpu_level')}"
    sheets = []
    for source in inputs:
        size = "×".join(map(str, source.frames.shape))
        sheets.append(f"<h3>{markup.escape(source.name)}</h3><p>{markup.escape(source.clip.form)}, {size}</p>")
        for rule in RULES:
            found = next(o for o in data["pruning"] if (o["input"], o["rule"]) == (source.name, rule))
            caption = f"{rule}: {found['after']} of {found['before']} tokens, {100 * found['reduction']:.1f} % removed"
            picture = _embed(contact_sheet(source.frames, masks[source.name, rule]), caption)
            sheets.append(f"<figure>{picture}<figcaption>{markup.escape(caption)}</figcaption></figure>")
    rules = "".join(f"<li><b>{r.name}</b> ({r.units}): {markup.escape(r.summary)}</li>" for r in RULES.values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>hulukern: quick</title><style>{STYLE}</style></head><body>
<h1>hulukern: tokens and time on real medical input</h1>
<p>{markup.escape(facts)}. torch {meta["torch"]}, commit {meta["commit"]}, {meta["time"]}.
Copy bandwidth {data["copy_bytes_per_s"] / 1e9:.1f} GB/s.</p>
<h2>Reduction against the 55 % target</h2>{_embed(_reduction_plot(data), "reduction by input and rule", True)}
<ul>{rules}</ul>{_table(pruning_table(data))}
<p>Drift: mean |difference| of a dropped cell to the last kept version of it, in normalised units; lost: dropped
before any version was kept. A single frame is kept whole, except by budget.</p>
<h2>Time by stage</h2>{_embed(_time_plot(data), "time by stage", True)}
<h2>Ops</h2>{_embed(_share_plot(data), "share of copy bandwidth", True)}{_table(op_table(data))}
<h2>Checks</h2>{_table(check_table(data))}
<h2>What is dropped</h2><p>Dropped cells are red. Frames are evenly chosen.</p>{"".join(sheets)}
</body></html>
"""
