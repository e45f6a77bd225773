"""What runs found, for people: tables on the terminal, and one self-contained HTML page.

Of each suite and device the newest file is shown in full; all of them make the history. Every number comes from the
JSON, and so do the pictures.
"""

from __future__ import annotations

import argparse
import base64
import html as markup
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from bench import figures
from bench.results import load_results, write_text
from bench.roofline import OURS
from hulukern.pruning import RULES
from model.pictures import contact_sheet, stack

if TYPE_CHECKING:
    from rich.console import Console

    from bench.quick import Input

Masks = Mapping[tuple[str, str], torch.Tensor]

EXAMPLES = """examples:
  python -m bench report                             all that is kept under bench/results, to report.html
  python -m bench report ops.json e2e.json -o page.html
  python -m bench report bench/results/h100 bench/out/quick.json

exit codes: 0 done, 2 bad arguments or a file that is not results JSON
"""
CELL = 28  # pixels of one token's side: patch 14, merge 2

STYLE = """
:root{--ink:#1c2430;--soft:#5c6675;--line:#d9dee6;--paper:#fff;--panel:#f5f7fa;--good:#1a7f4b;--bad:#b3372f;
--s0:#2f6fb0;--s1:#c8641b;--s2:#2e8b57;--s3:#8a5bb5;--s4:#b3372f;--s5:#7a7f1f}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b4;--line:#343c48;--paper:#14181e;--panel:#1c222b;
--good:#5cc98c;--bad:#f08078;--s0:#6fa8dc;--s1:#f0a05a;--s2:#6fcf97;--s3:#c19be0;--s4:#f08078;--s5:#c9cd6a}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;
max-width:1080px;padding:1.2rem;color-scheme:light dark}h1{font-size:1.6rem;margin:.2rem 0}
h2{font-size:1.2rem;margin:2rem 0 .6rem}h3{font-size:1rem;margin:1.2rem 0 .3rem;overflow-wrap:anywhere}
p,figcaption,li{color:var(--soft);max-width:70ch;overflow-wrap:anywhere}figure{margin:1rem 0}
img{max-width:100%;height:auto;border-radius:6px;display:block}svg{display:block;width:100%;max-width:680px}
svg text{font-family:inherit!important}.scroll,pre{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}th:first-child,td:first-child,td.t{text-align:left}th{color:var(--soft);font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}.bars{display:grid;grid-template-columns:max-content 1fr max-content;
gap:.15rem .6rem;font-size:.85rem;align-items:center;max-width:680px;font-variant-numeric:tabular-nums}
.bars i{display:block;height:.8rem;border-radius:2px;background:var(--line)}.bars i.ours{background:var(--s0)}
.bars b{font-weight:400;text-align:right}summary{cursor:pointer;color:var(--soft)}
.columns{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:.4rem 2rem}
"""


# --- numbers ----------------------------------------------------------------------------------------------


def pruning_table(data: dict[str, Any]) -> list[list[str]]:
    stages = {
        (r["op"], r["case"], r["impl"]): r["median_s"] * 1e3 for r in data["rows"] if r["op"].startswith("stage_")
    }
    pairs = zip(data["rows"], data["roofline"], strict=True)
    faster = {r["case"]: n["faster"] for r, n in pairs if (r["op"], r["impl"]) == ("stage_total", "cpu")}
    rows = [
        ["input", "rule", "tokens", "kept", "reduction", "55 %", "drift max", "mean", "lost",
         "cut+score ms", "mask ms", "compact ms", "total ms", "x reference"],
    ]  # fmt: skip
    for o in data["pruning"]:
        case = f"{o['input']}/{o['rule']}"
        times = [stages.get((f"stage_{s}", case, "cpu")) for s in ("cut_score", "mask", "compact", "total")]
        speedup = faster.get(case)
        rows.append(
            [
                o["input"], o["rule"], str(o["before"]), str(o["after"]), f"{100 * o['reduction']:.1f} %",
                "yes" if o["reduction"] >= 0.55 else "no", f"{o['drift_max']:.3f}", f"{o['drift_mean']:.3f}",
                str(o["lost"]), *("" if t is None else f"{t:.2f}" for t in times),
                "" if speedup is None else f"{speedup:.1f}",
            ]
        )  # fmt: skip
    return rows


def significant(x: float | None, digits: int = 3) -> str:
    """Fixed notation; empty for what is unknown."""
    if x is None:
        return ""
    places = digits - 1 - math.floor(math.log10(abs(x))) if x else 0
    return f"{x:.{max(places, 0)}f}"


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f} %"


def op_table(data: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["op", "case", "dtype", "direction", "by", "median ms", "95 % interval", "of light", "of datasheet", "x peer",
         "gap closed"],
    ]  # fmt: skip
    for r, n in _measured(data):
        rows.append(
            [
                r["op"], r["case"], r["dtype"], r["direction"], r["impl"], significant(1e3 * r["median_s"]),
                f"{significant(1e3 * r['low_s'])} .. {significant(1e3 * r['high_s'])}", percent(n["of_measured"]),
                percent(n["of_datasheet"]), significant(n["faster"]), percent(n["gap_closed"]),
            ]
        )  # fmt: skip
    return rows


def _measured(data: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of ops with what the roofline says of them."""
    pairs = zip(data["rows"], data["roofline"], strict=True)
    return [(r, n) for r, n in pairs if not r["op"].startswith("stage_")]


def ceiling_table(data: dict[str, Any]) -> list[list[str]]:
    rows = [["ceiling", "GB/s", *(f"{d} TFLOP/s" for d in data["ceilings"]["measured"]["flops_per_s"])]]
    for name, c in data["ceilings"].items():
        if c is not None:
            flops = [significant(f / 1e12) for f in c["flops_per_s"].values()]
            rows.append([name, significant(c["bytes_per_s"] / 1e9), *flops])
    return rows


def curve_table(data: dict[str, Any]) -> list[list[str]]:
    rows = [["input", "rule", "removed", "median ms", "gain", "ideal"]]
    for p in data["curve"]:
        numbers = (significant(1e3 * p["median_s"]), significant(p["gain"]), significant(p["ideal"]))
        rows.append([p["input"], p["rule"], percent(p["reduction"]), *numbers])
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


def pictures(inputs: list[Input], masks: Masks) -> list[dict[str, str]]:
    """What each rule drops, as they stand in a results file."""
    found = []
    for source, rule in itertools.product(inputs, RULES):
        image = contact_sheet(source.frames, masks[source.name, rule])
        image.thumbnail((1400, 400))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        found.append({"input": source.name, "rule": rule, "jpeg": base64.b64encode(buffer.getvalue()).decode()})
    return found


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


def _bars(data: dict[str, Any]) -> str:
    """Peers side by side: each op's main dtype, every case and direction."""
    parts = []
    for (op, case, direction), group in itertools.groupby(
        _main_rows(data), key=lambda r: (r["op"], r["case"], r["direction"])
    ):
        rows = sorted(group, key=lambda r: r["median_s"])
        lines = []
        for r in rows:
            share, kind = 100 * r["median_s"] / rows[-1]["median_s"], " class=ours" if r["impl"] in OURS else ""
            name, ms = markup.escape(r["impl"]), significant(1e3 * r["median_s"])
            lines.append(f'<span>{name}</span><i{kind} style="width:{share:.1f}%"></i><b>{ms} ms</b>')
        title = f"{op} · {case} · {rows[0]['dtype']} · {direction}"
        parts.append(f"<div><h3>{markup.escape(title)}</h3><div class=bars>{''.join(lines)}</div></div>")
    return f"<div class=columns>{''.join(parts)}</div>"


def _main_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """bfloat16, as the model runs, and for an op that has no such rows its first dtype."""
    rows = [r for r, _ in _measured(data)]
    main: dict[str, str] = {}
    for r in rows:
        main[r["op"]] = "bfloat16" if "bfloat16" in (r["dtype"], main.get(r["op"])) else main.get(r["op"], r["dtype"])
    return [r for r in rows if r["dtype"] == main[r["op"]]]


def _ops(data: dict[str, Any]) -> str:
    counted = [r for r in _main_rows(data) if r["impl"] in OURS and r["flops"] and r["bytes"]]
    titles = [f"{r['op']} {r['case']} {r['direction']}, {r['impl']}" for r in counted]
    names = "".join(f"<li>{markup.escape(title)}</li>" for title in titles)
    plot = figures.roofline(counted, data["ceilings"]) if counted else ""
    return f"""{_table(ceiling_table(data))}{plot}<details><summary>what the roofline's numbers are</summary>
<ol>{names}</ol></details>
<h2>Peers</h2>{_bars(data)}
<h2>Every row</h2><p>Of light: the shortest time that the measured ceilings allow over the median; of datasheet: the
same by the vendor's dense peaks; data that caches hold may beat a copy. x peer: the best peer's median over this one.
Gap closed: of the time between the best peer and the speed of light, the share that is gone.</p>
{_table(op_table(data))}"""


def _pruning(data: dict[str, Any]) -> str:
    sheets = []
    found = {(o["input"], o["rule"]): o for o in data["pruning"]}
    for name, group in itertools.groupby(data["pictures"], key=lambda p: p["input"]):
        source = next(i for i in data["inputs"] if i["name"] == name)
        size = "×".join(map(str, source["size"]))
        sheets.append(f"<h3>{markup.escape(name)}</h3><p>{markup.escape(source['kind'])}, {size}</p>")
        for p in group:
            o = found[name, p["rule"]]
            caption = f"{p['rule']}: {o['after']} of {o['before']} tokens, {100 * o['reduction']:.1f} % removed"
            image = f'<img alt="{markup.escape(caption)}" src="data:image/jpeg;base64,{markup.escape(p["jpeg"])}">'
            sheets.append(f"<figure>{image}<figcaption>{markup.escape(caption)}</figcaption></figure>")
    rules = "".join(f"<li><b>{r.name}</b> ({r.units}): {markup.escape(r.summary)}</li>" for r in RULES.values())
    return f"""<h2>Reduction against the 55 % target</h2>{figures.reduction(data["pruning"])}
<ul>{rules}</ul>{_table(pruning_table(data))}
<p>Drift: mean |difference| of a dropped cell to the last kept version of it, in normalised units; lost: dropped
before any version was kept. A single frame is kept whole, except by budget.</p>
<h2>Time by stage</h2>{figures.stages(data)}
<h2>What is dropped</h2><p>Dropped cells are red. Frames are evenly chosen.</p>{"".join(sheets)}"""


def _curve(data: dict[str, Any]) -> str:
    return f"""<h2>Throughput over reduction</h2><p>Pixels to first token, relative to keeping all; ideal is a time
proportional to what is kept.</p>{figures.curve(data["curve"], 0.55)}{_table(curve_table(data))}"""


def _gpu(data: dict[str, Any]) -> str:
    """Suite gpu: its curve has a part of the pipeline and a batch where that of e2e has an input and a rule."""
    from bench import gpu  # which needs transformers

    points = [
        {"input": f"{p['part']}, batch {p['batch']}", "rule": "budget", "reduction": p["reduction"], "gain": p["gain"]}
        for p in data["curve"]
    ]
    picture = f"<h2>Throughput over reduction</h2>{figures.curve(points, 0.55)}" if points else ""
    return f"{picture}<h2>Model</h2><pre>{markup.escape(gpu.table(data))}</pre>"


def _history(files: Sequence[dict[str, Any]]) -> str:
    """The 55 % point and our backends' medians over the commits of one device."""
    commits = list(dict.fromkeys(f["meta"]["commit"] for f in files))
    if len(commits) < 2:
        return ""
    gains: dict[str, list[tuple[int, float, float, float]]] = {}
    times: dict[str, list[tuple[int, float, float, float]]] = {}
    for f in files:
        at = commits.index(f["meta"]["commit"])
        for c in f["checks"]:
            if c["name"].startswith("e2e_gain_at_55_"):
                name = c["name"].removeprefix("e2e_gain_at_55_")
                gains.setdefault(name, []).append((at, c["value"], c["low"], c["high"]))
        for r in _main_rows(f) if "roofline" in f else []:
            if r["impl"] in OURS and r["direction"] == "fwd":
                values = (1e3 * r["median_s"], 1e3 * r["low_s"], 1e3 * r["high_s"])
                times.setdefault(f"{r['op']} {r['case']} {r['impl']}", []).append((at, *values))
    out = "<h2>History</h2>"
    if gains:
        out += figures.history(gains, commits, "gain at 55 % removed")
    # A line needs two points; six colours can be told apart.
    lines = [(name, found) for name, found in times.items() if len({at for at, *_ in found}) > 1]
    parts = [figures.history(dict(lines[k : k + 6]), commits, "ms") for k in range(0, len(lines), 6)]
    return out + f"<div class=columns>{''.join(parts)}</div>"


def html(paths: Sequence[Path]) -> str:
    """The page for these results files; nothing in it is loaded from elsewhere."""
    files = sorted((load_results(path) for path in paths), key=lambda d: str(d["meta"]["time"]))
    newest = {(_device(d), _kind(d)): d for d in files}
    parts = []
    for device in dict.fromkeys(_device(d) for d in files):
        parts.append(f"<h2>{markup.escape(device)}</h2>")
        for d in [d for (where, _), d in newest.items() if where == device]:
            m = d["meta"]
            facts = f"{_kind(d)}: torch {m['torch']}, commit {m['commit']}, {m['time']}"
            parts.append(f"<p>{markup.escape(facts)}</p>")
            sections = (("pruning", _pruning), ("curve", _curve), ("roofline", _ops))
            for section in [_gpu] if _kind(d) == "gpu" else [section for key, section in sections if key in d]:
                parts.append(section(d))
            if d["checks"]:
                parts.append(f"<h2>Checks</h2>{_table(check_table(d))}")
        parts.append(_history([d for d in files if _device(d) == device]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>hulukern: measurements</title><style>{STYLE}</style></head><body>
<h1>hulukern: measurements</h1>
{"".join(parts)}
</body></html>
"""


def _device(data: dict[str, Any]) -> str:
    m = data["meta"]
    if m["gpu"]:
        return ", ".join(m["gpu"])
    return f"{m['cpu']['model']}, {m['cpu']['torch_threads']} threads, level {m['native'].get('cpu_level')}"


def _kind(data: dict[str, Any]) -> str:
    return str(data.get("suite") or ("quick" if "pruning" in data else "e2e" if "curve" in data else "other"))


BESIDE = re.compile(r"(tuning|stages.*|counters)\.json$")  # what a device run leaves beside its results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results, or folders (bench/results)")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="HTML")


def run(options: argparse.Namespace) -> int:
    paths: list[Path] = []
    for given in options.files or [Path(__file__).parent / "results"]:
        found = [p for p in sorted(given.rglob("*.json")) if not BESIDE.match(p.name)] if given.is_dir() else [given]
        if not found:
            raise ValueError(f"{given}: has no results, expected *.json in it")
        paths += found
    write_text(options.output, html(paths))
    print(options.output)
    return 0
