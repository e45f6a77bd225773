"""``python -m model generate``: answer a prompt about images, volumes and videos; tokens stream as they come."""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from hulukern.backends import BACKENDS
from hulukern.pruning import RULES
from model.commands import device_of
from model.media import WINDOWS
from model.media.nifti import PLANES
from model.modeling import HuluMedForConditionalGeneration
from model.processor import HuluMedProcessor

EXAMPLES = """examples:
  python -m model generate Hulu-Med-7B --image xray.dcm --prompt "Describe the image."
  python -m model generate DIR --volume ct.nii.gz --window lung --rule bounded --prompt "Any nodules?"
  python -m model generate DIR --video echo.mp4 --no-pruning --prompt "Is the ejection fraction reduced?"

exit codes: 0 done, 2 bad input or arguments, or interrupted
"""


class _Stream(TextStreamer):
    """Prints tokens and remembers when they came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if value.numel():  # a prompt of embeddings has no ids
            self.times.append(time.perf_counter())
            super().put(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a checkpoint")
    parser.add_argument("--prompt", required=True)
    for kind in ("image", "volume", "video"):
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument(
        "--rule",
        choices=[r for r in RULES if r != "budget"],
        help="default: the checkpoint's, or bounded with --score-window",
    )
    parser.add_argument("--threshold", type=float, help="of the rule, in its unit")
    parser.add_argument("--keep", type=float, metavar="SHARE", help="prune to this share of the tokens instead")
    parser.add_argument(
        "--score-window", action="append", default=[], choices=list(WINDOWS), metavar="NAME",
        help=f"prune a CT volume by what changes in this window; may be repeated ({', '.join(WINDOWS)})",
    )  # fmt: skip
    parser.add_argument("--no-pruning", action="store_true")
    parser.add_argument("--axis", choices=list(PLANES), help="plane of a volume")
    parser.add_argument("--window", choices=list(WINDOWS), help="of a CT volume")
    parser.add_argument("--fps", type=float, help="of a video (default: 1)")
    parser.add_argument("--released", action="store_true", help="read, resize and prune as the released code does")
    parser.add_argument("--backend", choices=BACKENDS, help="of every op (default: by device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--sample", action="store_true", help="sample as the checkpoint's settings say, not greedily")


def pruning_of(options: argparse.Namespace) -> dict[str, Any] | bool | None:
    """The options as the model's argument; None is the checkpoint's own."""
    by_rule = options.rule is not None or options.threshold is not None
    if bool(options.no_pruning) + (options.keep is not None) + by_rule > 1:
        raise ValueError("generate: has more than one of --no-pruning, --keep and --rule, expected one")
    if options.no_pruning:
        return False
    if options.keep is not None:
        return {"rule": "budget", "keep": options.keep}
    if not by_rule:
        return {"rule": "released"} if options.released else None
    rule = {"rule": options.rule or ("released" if options.released else "previous")}
    return rule if options.threshold is None else {**rule, "threshold": options.threshold}


def conversation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Media in the order image, volume, video, then the prompt."""
    reading = {name: getattr(options, name) for name in ("axis", "window", "fps") if getattr(options, name) is not None}
    parts: list[dict[str, Any]] = []
    for kind in ("image", "volume", "video"):
        for path in getattr(options, kind):
            if not Path(path).exists():
                raise ValueError(f"{path}: has nothing there, expected a file or a folder")
            parts.append({"type": kind, kind: str(path), **reading})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": options.prompt}]}]


def run(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise ValueError(f"generate: --max-new-tokens has value {options.max_new_tokens}, expected at least 1")
    pruning, device = pruning_of(options), device_of(options.device)
    ends = [("", time.perf_counter())]

    def done(stage: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append((stage, time.perf_counter()))

    processor = HuluMedProcessor.from_pretrained(options.directory, **({"released": True} if options.released else {}))
    scored = None
    if options.score_window and (pruning is False or not options.volume):
        raise ValueError("--score-window: has no volume to prune, expected --volume, and no --no-pruning")
    if options.score_window:
        chosen = pruning if isinstance(pruning, dict) else {"rule": "bounded"}
        scored = {"windows": options.score_window, **chosen}
    batch = dict(processor(conversation(options), prune=scored))
    done("read and resize")
    model = HuluMedForConditionalGeneration.from_pretrained(
        options.directory, backend=options.backend, dtype=options.dtype
    ).to(device)
    done("load")
    ids, keep = batch.pop("input_ids").to(device), batch.pop("keep", None)
    batch["attention_mask"] = batch["attention_mask"].to(device)
    with torch.inference_mode():
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(device)
            visual = {name: batch[name] for name in ("pixel_values", "grid_thw", "merge_sizes", "modals")}
            keep = model.visual_mask(**visual, pruning=pruning) if keep is None else keep.to(device)
            done("mask")
        prompt = model.prompt(ids, **batch, pruning=False, keep=keep)
        done("encode")
        stream = _Stream(processor.tokenizer)
        model.generate(
            inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask, streamer=stream,
            max_new_tokens=options.max_new_tokens, pad_token_id=processor.tokenizer.pad_token_id,
            **({} if options.sample else {"do_sample": False}),
        )  # fmt: skip
    ends += [("prefill to first token", stream.times[0]), ("decode", time.perf_counter())]
    pruned = prompt.n_visual - prompt.n_kept
    share = f" ({100 * pruned / prompt.n_visual:.1f} %)" if prompt.n_visual else ""
    print(f"\n{prompt.n_visual} visual tokens, {pruned} pruned{share}; {len(stream.times)} new tokens")
    for (_, begin), (stage, end) in pairwise(ends):
        print(f"  {stage:<24}{end - begin:8.3f} s")
    return 0
