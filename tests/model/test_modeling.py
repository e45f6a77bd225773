"""The whole model: goldens, batches, generation, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from model import tiny, verify
from model.__main__ import main
from model.modeling import HuluMedForConditionalGeneration
from model.processor import HuluMedProcessor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FAMILIES = ["released_qwen2", "released_qwen3"]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_golden_is_met(family: str, backend: str | None) -> None:
    found = list(verify.Goldens(GOLDEN / family, backend, "cpu").quantities())
    assert len(found) > 40
    for q in found:
        assert q.met, q


@pytest.mark.parametrize(
    ("file", "key", "quantity"),
    [
        ("encoder_io", "output", "output"),
        ("encoder_io", "rotary_angles", "rotary_angles"),
        ("mask", "mask_t0.1_min1", "mask_t0.1_min1"),
        ("compress", "out_labels", "out_labels"),
        ("image_processor", "case2.pixel_values", "case2.pixel_values"),
        ("model_io", "logits", "logits"),
        ("model_io", "generated", "generated"),
        ("model_io", "grad.model.mm_projector.readout.2.bias", "grad.model.mm_projector.readout.2.bias"),
    ],
)
def test_one_flipped_value_is_a_miss(file: str, key: str, quantity: str, tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN / "released_qwen3", folder)
    tensors = load_file(folder / f"{file}.safetensors")
    flat = tensors[key].view(-1)
    flat[flat.numel() // 2] = 1 - flat[flat.numel() // 2] if not flat.is_floating_point() else flat.abs().max() * 1.01
    save_file(tensors, folder / f"{file}.safetensors")
    missed = [q.name for q in verify.Goldens(folder, "reference", "cpu").quantities([file]) if not q.met]
    assert missed == [quantity]


def test_verify_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "golden"
    folder.mkdir()
    assert main(["verify", str(folder)]) == 2
    shutil.copy(GOLDEN / "released_qwen2" / "mask.safetensors", folder)
    assert main(["verify", str(folder)]) == 2
    assert "has no encoder_io.safetensors" in capsys.readouterr().err
    assert main(["verify", str(folder), "--only", "mask"]) == 0
    tensors = load_file(folder / "mask.safetensors")
    tensors["mask_t0.1_min1"][7] ^= 1
    save_file(tensors, folder / "mask.safetensors")
    assert main(["verify", str(folder), "--only", "mask"]) == 1
    assert "MISS  mask_t0.1_min1" in capsys.readouterr().out
    save_file({k: v for k, v in tensors.items() if not k.startswith("mask_")}, folder / "mask.safetensors")
    assert main(["verify", str(folder), "--only", "mask"]) == 2
    (folder / "mask.safetensors").write_bytes(b"cut short")
    assert main(["verify", str(folder), "--only", "mask"]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny.write(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> HuluMedForConditionalGeneration:
    return HuluMedForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> HuluMedProcessor:
    return HuluMedProcessor.from_pretrained(checkpoint)


def drifting(T: int, side: int = 84, seed: int = 0) -> np.ndarray:
    """A clip [T, H, W, 3] of which part stands still."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(rng.integers(0, 256, (1, side, side, 3), np.uint8), T, 0)
    for t in range(1, T):
        frames[t, : side // 3] = rng.integers(0, 256, (side // 3, side, 3), np.uint8)
    return frames


def conversations() -> list[list[dict[str, Any]]]:
    def ask(*parts: dict[str, Any], text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    picture = Image.fromarray(drifting(1, 70)[0])
    return [
        ask(text="What is a heart?"),
        ask({"type": "image", "image": picture}, {"type": "image", "image": picture}, text="Compare these two images."),
        ask({"type": "volume", "volume": drifting(4, 100, 1)}, text="What is seen in this volume?"),
        ask({"type": "video", "video": list(drifting(5, 84, 2))}, text="And here?"),
    ]


@pytest.mark.parametrize("rule", ["previous", "bounded", "released", "videollama3"])
def test_a_mixed_batch_equals_single_runs(
    rule: str, model: HuluMedForConditionalGeneration, processor: HuluMedProcessor
) -> None:
    batch = processor(conversations())
    options = {"do_sample": False, "max_new_tokens": 6, "pruning": {"rule": rule}}
    together = model.generate(**batch, **options)
    prompt = model.prompt(**batch, pruning={"rule": rule})
    assert 0 < prompt.n_kept < prompt.n_visual
    logits = model(**batch, pruning={"rule": rule}).logits
    for b, conversation in enumerate(conversations()):
        single = processor(conversation)
        alone = model.generate(**single, **options)
        assert together[b, : alone.shape[1]].tolist() == alone[0].tolist()
        expected = model(**single, pruning={"rule": rule}).logits[0]
        torch.testing.assert_close(logits[b, -len(expected) :], expected, rtol=1e-4, atol=1e-5)


def test_padding_may_stand_on_either_side(model: HuluMedForConditionalGeneration, processor: HuluMedProcessor) -> None:
    left, right = processor(conversations()), processor(conversations(), padding_side="right")
    a, b = model(**left).logits, model(**right).logits
    lengths = model.prompt(**right).attention_mask.sum(1).tolist()
    for i, n in enumerate(lengths):
        torch.testing.assert_close(a[i, a.shape[1] - n :], b[i, :n], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="generate: input_ids has padding on the right"):
        model.generate(**right, max_new_tokens=1)


def test_generation_after_pruning_has_made_equal_rows_unequal(
    model: HuluMedForConditionalGeneration, processor: HuluMedProcessor
) -> None:
    still = np.repeat(drifting(1), 5, 0)
    asked = [[{"role": "user", "content": [{"type": "video", "video": v}]}] for v in (still, drifting(5, seed=2))]
    batch = processor(asked)
    assert batch["attention_mask"].all(), "nothing is padded before pruning"
    kept = model.prompt(**batch).attention_mask
    assert kept[0].sum() < kept[1].sum()
    assert kept[:, -1].all()
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**batch, **options)
    for b, conversation in enumerate(asked):
        alone = model.generate(**processor(conversation), **options)
        assert together.sequences[b].tolist() == alone.sequences[0].tolist()
        for x, y in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(x[b], y[0], rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_equals_without(
    model: HuluMedForConditionalGeneration, processor: HuluMedProcessor
) -> None:
    batch = processor(conversations())
    options = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_the_mask_may_be_given_and_is_what_the_rule_says(
    model: HuluMedForConditionalGeneration, processor: HuluMedProcessor
) -> None:
    batch = processor(conversations()[3])
    visual = {k: batch[k] for k in ("pixel_values", "grid_thw", "merge_sizes", "modals")}
    keep = model.visual_mask(**visual, pruning={"rule": "budget", "keep": 0.45})
    assert keep is not None
    assert int(keep.sum()) == round(0.45 * keep.numel())
    given = model(**batch, keep=keep).logits
    torch.testing.assert_close(given, model(**batch, pruning={"rule": "budget", "keep": 0.45}).logits)
    whole = model(**batch, pruning=False)
    assert whole.logits.shape[1] - given.shape[1] == int((~keep).sum())


def test_labels_follow_their_tokens(model: HuluMedForConditionalGeneration, processor: HuluMedProcessor) -> None:
    taught = [c + [{"role": "assistant", "content": "A heart, seen from four chambers."}] for c in conversations()]
    batch = processor(taught, return_labels=True, padding_side="right")
    prompt = model.prompt(**batch)
    assert prompt.labels is not None
    assert (prompt.labels != -100).sum() == (batch["labels"] != -100).sum()
    out = model(**batch)
    shifted = out.logits[:, :-1].flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(shifted, prompt.labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert model.model.vision_encoder.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_what_does_not_fit_is_named(model: HuluMedForConditionalGeneration, processor: HuluMedProcessor) -> None:
    batch = dict(processor(conversations()[3]))
    with pytest.raises(ValueError, match="image tokens, expected"):
        model(**{**batch, "grid_thw": batch["grid_thw"] * torch.tensor([2, 1, 1])})
    with pytest.raises(ValueError, match="pixel_values has value None, expected patches for"):
        model.prompt(batch["input_ids"])
    with pytest.raises(ValueError, match="grid_thw, merge_sizes has value None"):
        model.prompt(batch["input_ids"], pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="rule has value 'none'"):
        model(**batch, pruning={"rule": "none"})
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, 1:]})


def test_commands(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(drifting(1)[0]).save(picture)
    short = ["--max-new-tokens", "3"]
    assert main(["generate", str(checkpoint), "--image", str(picture), "--prompt", "Seen?", *short]) == 0
    out = capsys.readouterr().out
    assert "visual tokens, 0 pruned" in out
    for stage in ("read and resize", "load", "mask", "encode", "prefill to first token", "decode"):
        assert stage in out, stage
    assert main(["generate", str(checkpoint), "--prompt", "Hello", *short]) == 0
    refused = {
        "nothing there": ["--image", str(tmp_path / "none.png")],
        "expected one": ["--no-pruning", "--rule", "previous"],
        "at least 1": ["--max-new-tokens", "0"],
        "one 2D image": ["--volume", str(picture)],
        "threshold": ["--image", str(picture), "--threshold", "-1"],
    }
    for says, more in refused.items():
        assert main(["generate", str(checkpoint), "--prompt", "x", *short, *more]) == 2, says
        err = capsys.readouterr().err
        assert says in err
        assert "Traceback" not in err
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert main(["tiny", str(checkpoint)]) == 2
    assert "expected an empty or new folder" in capsys.readouterr().err


def test_ids_under_transformers_own_name_are_pruned_alike(
    model: HuluMedForConditionalGeneration, processor: HuluMedProcessor
) -> None:
    batch = dict(processor(conversations()[3]))
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**batch, **options)
    got = model.generate(inputs=batch.pop("input_ids"), **batch, **options)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="generate: pixel_values, grid_thw has values without ids"):
        model.generate(inputs_embeds=torch.zeros(1, 4, 64), **batch)


def test_autocast_and_plain_tuples(model: HuluMedForConditionalGeneration, processor: HuluMedProcessor) -> None:
    batch = processor(conversations()[3])
    with torch.no_grad():
        whole = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(**batch).logits.float(), whole, rtol=0.1, atol=0.05)
        assert torch.equal(model(**batch, return_dict=False)[0], whole)


def test_the_auto_processor_and_config_overrides(checkpoint: Path) -> None:
    from transformers import AutoProcessor

    assert isinstance(AutoProcessor.from_pretrained(checkpoint), HuluMedProcessor)
    changed = HuluMedForConditionalGeneration.from_pretrained(checkpoint, pruning={"rule": "bounded"})
    assert changed.config.pruning == {"rule": "bounded"}
    whole = HuluMedForConditionalGeneration.from_pretrained(checkpoint, use_token_compression=False)
    assert not whole.config.use_token_compression


BROKEN = {
    "config.json": ["[]", "{", '{"model_type": "hulumed_qwen3", "hidden_size": -64, "image_token_index": 1}'],
    "processor_config.json": ["{", "[]", '{"processor_class": "HuluMedProcessor"}'],
    "tokenizer.json": ["{}", ""],
    "model.safetensors": ["short"],
}


@pytest.mark.parametrize(("file", "text"), [(f, t) for f, texts in BROKEN.items() for t in texts])
def test_broken_checkpoints_end_in_one_line(
    file: str, text: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / file).write_text(text)
    assert main(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "1"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate: ")]
    assert len(said) == 1
    assert str(folder) in said[0]


def test_a_tokenizer_that_is_not_there_is_not_made_up(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        HuluMedProcessor.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("device", ["foo", "mps", "cuda:99"])
def test_devices_that_are_not_here(device: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), "--prompt", "x", "--device", device]) == 2
    assert main(["verify", str(GOLDEN), "--device", device]) == 2
    assert capsys.readouterr().err.count("--device: has ") == 2
