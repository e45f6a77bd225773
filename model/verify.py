"""``python -m model verify``: the model against a folder of numbers from the released code.

A folder holds the files of ``tests/data/golden`` (its README says what each is), or sub-folders that do. Floats
are compared by the largest difference over the largest magnitude, integers and masks exactly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from hulukern.backends import BACKENDS
from hulukern.ops.rope_attention.reference import angles
from hulukern.pruning import compress_sequence, prune_patches
from model.commands import device_of
from model.config import HuluMedVisionConfig, config_from_dict
from model.image_processor import HuluMedImageProcessor
from model.media import Reading, from_memory
from model.modeling import HuluMedForConditionalGeneration
from model.vision import HuluMedVisionModel, plan

EXAMPLES = """examples:
  python -m model verify tests/data/golden
  python -m model verify tests/data/golden/released_qwen3 --backend reference --device cuda

exit codes: 0 all within bounds, 1 a miss, 2 the folder cannot be read
"""
RELATIVE = 1e-5  # fp32 against fp32, another order of additions
RELEASED = {"rule": "released"}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantity:
    """One comparison; error None stands for a shape that differs."""

    name: str
    error: float | None
    bound: float

    @property
    def met(self) -> bool:
        return self.error is not None and self.error <= self.bound


def compare(name: str, got: torch.Tensor, expected: torch.Tensor) -> Quantity:
    """Floats relative to the largest expected magnitude; anything else by the share of entries that differ."""
    got, bound = got.detach().cpu(), RELATIVE if expected.is_floating_point() else 0.0
    if got.shape != expected.shape:
        return Quantity(name, None, bound)
    if expected.numel() == 0:
        return Quantity(name, 0.0, bound)
    if not expected.is_floating_point():
        return Quantity(name, (got != expected).double().mean().item(), bound)
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = ((got.double() - expected.double()).abs().max() / scale).item()
    return Quantity(name, error if error == error else float("inf"), bound)


class Goldens:
    """The files of one folder, read when asked for."""

    def __init__(self, folder: Path, backend: str | None, device: str) -> None:
        self.folder, self.backend, self.device = folder, backend, device_of(device)

    def tensors(self, name: str) -> Tensors:
        return {k: v.to(self.device) for k, v in load_file(self.folder / f"{name}.safetensors").items()}

    def json(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"{name}.json").read_text()))

    def quantities(self, parts: Sequence[str] = ()) -> Iterator[Quantity]:
        """Of the named parts, or of all. Raises ValueError where a part is not there."""
        for part in parts or PARTS:
            if not (self.folder / f"{part}.safetensors").exists():
                raise ValueError(f"{self.folder}: has no {part}.safetensors, expected it, or --only for other parts")
            found = list(PARTS[part](self))
            if not {name for name in NEEDED.get(part, ()) if not any(q.name.startswith(name) for q in found)}:
                yield from found
            else:
                raise ValueError(f"{self.folder}/{part}.safetensors: has not all of {NEEDED[part]}, expected them")


def encoder(g: Goldens) -> Iterator[Quantity]:
    config = HuluMedVisionConfig(**g.json("encoder_config"))
    model = HuluMedVisionModel(config, g.backend).float().to(g.device).eval()
    model.load_state_dict({k: v.float() for k, v in g.tensors("encoder_weights").items()})
    io = g.tensors("encoder_io")
    grids, merges = io["grid_sizes"].cpu(), io["merge_sizes"].tolist()
    p = plan(grids, merges, device=g.device)
    half = [config.head_dim // 4] * 2
    turned = angles(p.rows.positions, half, config.rope_theta, torch.float32)
    yield compare("rotary_angles", turned, io["rotary_angles"].cpu())
    with torch.no_grad():
        states = model.hidden_states(io["pixels_u8"], p)
        names = ["embeddings", *(f"layer{i}" for i in range(config.num_hidden_layers)), "post_layernorm"]
        for name, state in zip(names, states, strict=True):
            yield compare(f"hidden.{name}", state, io[f"hidden.{name}"].cpu())
        output = model(io["pixels_u8"], grids, merges)
        yield compare("output", output, io["output"].cpu())
        keep = torch.arange(output.shape[0], device=g.device) % 3 != 1
        survivors = model(io["pixels_u8"], grids, merges, keep)
        yield compare("output, survivors only", survivors, io["output"].cpu()[keep.cpu()])


def mask(g: Goldens) -> Iterator[Quantity]:
    io = g.tensors("mask")
    for name in (n for n in io if n.startswith("mask_")):
        threshold, minimum = name.removeprefix("mask_t").split("_min")
        keep = prune_patches(
            io["pixels_u8"], io["grid_sizes"].cpu(), rule="released", merge_size=io["merge_sizes"].tolist(),
            modals=["video", "image", "video", "video"], threshold=float(threshold), min_tokens=int(minimum),
            backend=g.backend,
        ).keep  # fmt: skip
        yield compare(name, keep, io[name].bool().cpu())


def compress(g: Goldens) -> Iterator[Quantity]:
    io = g.tensors("compress")
    got = compress_sequence(
        io["input_ids"], io["mask"].bool(), image_token_id=int(io["image_token_index"]), features=io["features"],
        attention_mask=torch.ones_like(io["input_ids"]), labels=io["labels"], position_ids=io["position_ids"],
        backend=g.backend,
    )  # fmt: skip
    for name in ("input_ids", "features", "attention_mask", "labels", "position_ids"):
        value = getattr(got, name)
        yield replace(compare(f"out_{name}", value, io[f"out_{name}"].cpu()), bound=0.0)  # rows are copied


def image_processor(g: Goldens) -> Iterator[Quantity]:
    io, description = g.tensors("image_processor"), g.json("image_processor")
    for i, case in enumerate(description["cases"]):
        yield from processor_case(f"case{i}", case, {k: v.cpu() for k, v in io.items() if k.startswith(f"case{i}.")})


def processor_case(name: str, case: dict[str, Any], io: Tensors) -> Iterator[Quantity]:
    """As the released processor was called: with Pillow images, a clip as a list of them."""
    pictures = [picture(*size) for size in case["sizes_hw"]]
    if case["clip"]:
        rolled = [Image.fromarray(np.roll(pictures[0], k, 0)) for k in range(len(pictures))]
        clips = [from_memory(rolled, "video", Reading())]
    else:
        clips = [from_memory(Image.fromarray(p), "image", Reading()) for p in pictures]
    processor = HuluMedImageProcessor(max_tokens=case["max_tokens"], released=True)
    out = processor(clips, [case["merge"]] * len(clips))
    yield compare(f"{name}.grid_sizes", out.grid_thw, io[f"{name}.grid_sizes"])
    values = processor.normalize(out.pixel_values)
    yield compare(f"{name}.mean", values.mean(), io[f"{name}.mean"])
    yield compare(f"{name}.abs_mean", values.abs().mean(), io[f"{name}.abs_mean"])
    rows = compare(f"{name}.pixel_values", values[:: int(io[f"{name}.row_stride"])], io[f"{name}.pixel_values"])
    yield replace(rows, bound=0.0)


def picture(height: int, width: int) -> npt.NDArray[np.uint8]:
    """The test picture that image_processor.json describes."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(3 * y + x) % 256, (y + 2 * x) % 256, ((y // 7) * (x // 5)) % 256], -1).astype(np.uint8)


def whole_model(g: Goldens) -> Iterator[Quantity]:
    data = g.json("model_config")
    family, vision = data.pop("llm"), data.pop("vision")
    data |= {"model_type": f"hulumed_{family}", "vision_encoder_config": vision}
    config = config_from_dict(data, str(g.folder / "model_config.json"))
    model = HuluMedForConditionalGeneration(config, g.backend).float().to(g.device).eval()
    model.load_state_dict({released(k): v.float() for k, v in g.tensors("model_weights").items()})
    io = g.tensors("model_io")
    inputs: dict[str, Any] = {
        "pixel_values": io["pixels_u8"], "grid_thw": io["grid_sizes"].cpu(), "merge_sizes": io["merge_sizes"].tolist(),
        "modals": ["video"] * len(io["merge_sizes"]),
    }  # fmt: skip
    with torch.no_grad():
        logits = model(io["input_ids"], **inputs, pruning=RELEASED).logits
        yield compare("logits", logits, io["logits"].cpu())
        logits = model(io["input_ids"], **inputs, pruning=False).logits
        yield compare("logits_no_compression", logits, io["logits_no_compression"].cpu())
        ids = model.generate(
            io["input_ids"], **inputs, pruning=RELEASED, do_sample=False, max_new_tokens=io["generated"].shape[1],
            eos_token_id=config.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        yield compare("generated", ids, io["generated"].cpu())
    loss = model(io["input_ids"], labels=io["labels"], **inputs, pruning=RELEASED).loss
    yield compare("loss", loss, io["loss"].cpu())
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in (n for n in io if n.startswith("grad.")):
        gradient = parameters[released(name.removeprefix("grad."))].grad
        assert gradient is not None, name
        yield compare(name, gradient, io[name].cpu())


def released(key: str) -> str:
    """The goldens are in the original layout, which has a level more."""
    return key.replace("vision_encoder.vision_encoder.", "vision_encoder.")


PARTS: dict[str, Callable[[Goldens], Iterator[Quantity]]] = {
    "encoder_io": encoder,
    "mask": mask,
    "compress": compress,
    "image_processor": image_processor,
    "model_io": whole_model,
}
NEEDED = {"mask": ("mask_",), "model_io": ("grad.",)}  # what is checked for every name there is: at least one


def folders(root: Path) -> list[Path]:
    """``root`` or its sub-folders, whichever hold goldens."""
    candidates = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    found = [f for f in candidates if any((f / f"{part}.safetensors").exists() for part in PARTS)]
    if not found:
        raise ValueError(f"{root}: has none of {', '.join(PARTS)}.safetensors, expected a folder of goldens")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a folder of goldens")
    parser.add_argument("--backend", choices=BACKENDS, help="of every op (default: by device)")
    parser.add_argument(
        "--only", action="append", default=[], choices=list(PARTS), help="check this part; may be repeated"
    )
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")


def run(options: argparse.Namespace) -> int:
    if not options.directory.is_dir():
        raise ValueError(f"{options.directory}: has nothing there, expected a folder of goldens")
    misses = 0
    for folder in folders(options.directory):
        print(f"{folder}, backend {options.backend or 'by device'}, {options.device}")
        try:
            for q in Goldens(folder, options.backend, options.device).quantities(options.only):
                misses += not q.met
                error = "shape differs" if q.error is None else f"{q.error:.2e}"
                print(f"  {'ok  ' if q.met else 'MISS'}  {q.name:<88} {error:>13}  bound {q.bound:.0e}", flush=True)
        except (OSError, KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: has goldens that cannot be read ({type(error).__name__}: {error})") from None
    print(f"{misses} missed" if misses else "all within bounds")
    return 1 if misses else 0
