"""Conversations to tokens and patches, with the real Qwen3 tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.image_processor import HuluMedImageProcessor
from model.media import Clip, Reading, load_frames
from model.processor import HuluMedProcessor

DATA = Path(__file__).parents[1] / "data" / "totalsegmentator"
IMAGE = np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)  # 4 x 6 patches
VIDEO = np.zeros((3, 112, 112, 3), np.uint8)  # 3 frames of 4 x 4 cells
BUDGET = HuluMedImageProcessor(min_tokens=1)


@pytest.fixture
def processor(tokenizer: Any) -> HuluMedProcessor:
    return HuluMedProcessor(tokenizer, image_processor=BUDGET)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def image(data: Any = IMAGE) -> dict[str, Any]:
    return {"type": "image", "image": data}


def text_of(processor: HuluMedProcessor, out: Any, b: int = 0) -> str:
    kept = out["input_ids"][b][out["attention_mask"][b].bool()]
    return processor.decode(kept, skip_special_tokens=False)


def test_an_image(processor: HuluMedProcessor) -> None:
    out = processor(user(image(), "What is it?"))
    expected = "<|im_start|>user\n" + "<image>" * 24 + "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(processor, out) == expected
    assert out["pixel_values"].shape == (24, 588)
    assert out["pixel_values"].dtype == torch.uint8
    assert out["grid_thw"].tolist() == [[1, 4, 6]]
    assert out["merge_sizes"].tolist() == [1]
    assert out["modals"] == ["image"]
    assert all(out[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "grid_thw", "merge_sizes"))


def test_ids_are_those_of_the_expanded_text(processor: HuluMedProcessor) -> None:
    out = processor(user("Before.\n\n", image(), "\n\nafter <b>"))
    ids = processor.tokenizer(text_of(processor, out))["input_ids"]
    assert out["input_ids"][0].tolist() == ids
    assert (out["input_ids"] == processor.image_token_id).sum() == 24


def test_a_video_has_times_and_a_volume_none(processor: HuluMedProcessor) -> None:
    clip = Clip(VIDEO, "x", "video", "video", (0.0, 1.04, 2.16))
    out = processor(user({"type": "video", "video": clip}, "Go."), add_generation_prompt=False)
    cells = "<image>" * 16
    times = f"Time 0.0s:{cells},Time 1.0s:{cells},Time 2.2s:{cells}\n"
    assert text_of(processor, out) == f"<|im_start|>user\n{times}Go.<|im_end|>\n"
    volume = processor(user({"type": "3d", "3d": clip.frames}, "Go."), add_generation_prompt=False)
    assert text_of(processor, volume) == f"<|im_start|>user\n{cells},{cells},{cells}\nGo.<|im_end|>\n"
    assert out["modals"] == volume["modals"] == ["video"]
    assert out["grid_thw"].tolist() == [[3, 8, 8]]


def test_one_merge_size_for_a_conversation_that_holds_a_volume(processor: HuluMedProcessor) -> None:
    both = user(image(), {"type": "volume", "volume": VIDEO})
    out = processor(both)
    assert out["merge_sizes"].tolist() == [2, 2]
    assert out["grid_thw"].tolist() == [[1, 4, 6], [3, 8, 8]]
    assert (out["input_ids"] == processor.image_token_id).sum() == 6 + 3 * 16
    assert processor(both, merge_size=1)["merge_sizes"].tolist() == [1, 1]


def test_a_batch_of_everything(processor: HuluMedProcessor) -> None:
    batch = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        user(image(), image(Image.new("L", (28, 28))), "Compare."),
        user({"type": "video", "video": list(VIDEO)}, "?"),
        user(image(torch.zeros(3, 28, 28, dtype=torch.uint8))),
    ]
    out = processor(batch)
    assert out["grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2], [3, 8, 8], [1, 2, 2]]
    assert out["merge_sizes"].tolist() == [1, 1, 2, 1]
    assert out["modals"] == ["image", "image", "video", "image"]
    assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 28, 48, 4]
    assert out["pixel_values"].shape[0] == out["grid_thw"].prod(1).sum()
    for b, conversation in enumerate(batch):
        alone = processor(conversation)["input_ids"][0]
        assert torch.equal(out["input_ids"][b, -len(alone) :], alone)  # padded on the left
        assert out["attention_mask"][b].sum() == len(alone)
    right = processor(batch, padding_side="right")
    assert right["attention_mask"][0, 0] == 1
    assert right["attention_mask"][0, -1] == 0
    assert processor([batch[0]]).keys() == {"input_ids", "attention_mask"}


def test_labels_are_the_assistants_turns_with_their_end(processor: HuluMedProcessor) -> None:
    talk = [
        *user(image(), "What?"), {"role": "assistant", "content": "A lung."},
        *user("Sure?"), {"role": "assistant", "content": "Yes, quite."},
    ]  # fmt: skip
    out = processor([talk, user("Hi")], return_labels=True)
    labels = out["labels"]
    assert processor.decode(labels[0][labels[0] != -100], skip_special_tokens=False) == (
        "A lung.<|im_end|>Yes, quite.<|im_end|>"
    )
    learned = labels != -100
    assert torch.equal(labels[learned], out["input_ids"][learned])
    assert not learned[1].any()
    assert text_of(processor, out).endswith("Yes, quite.<|im_end|>\n")


def test_text_with_images(processor: HuluMedProcessor) -> None:
    out = processor(text="a <image> b <image>", images=[IMAGE, Image.new("RGB", (28, 28))])
    assert (out["input_ids"] == processor.image_token_id).sum() == 28
    batch = processor(text=["none", "<image>", "<image><image><image>"], images=[[], [IMAGE], [VIDEO]])
    assert batch["merge_sizes"].tolist() == [1, 2]
    one_each = processor(text=["<image> a", "b <image>"], images=[IMAGE, IMAGE])
    assert one_each["grid_thw"].tolist() == [[1, 4, 6], [1, 4, 6]]
    mixed = processor(text="<image><image><image><image>", images=[IMAGE, VIDEO])  # the other sizing rule
    assert mixed["merge_sizes"].tolist() == [1, 2]
    assert mixed["grid_thw"].tolist() == [[1, 4, 6], [3, 8, 8]]


def test_parts_without_data_take_the_given_images(processor: HuluMedProcessor) -> None:
    out = processor(user({"type": "image"}, "?"), images=[IMAGE])
    assert torch.equal(out["input_ids"], processor(user(image(), "?"))["input_ids"])
    with pytest.raises(ValueError, match="has 1 more"):
        processor(user(image()), images=[IMAGE])
    with pytest.raises(ValueError, match="without data"):
        processor(user({"type": "image"}))


def test_paths_and_options_in_the_released_words(processor: HuluMedProcessor) -> None:
    path = str(DATA / "example_ct_sm.nii.gz")
    out = processor(user({"type": "3d", "3d": {"image_path": path, "nii_num_slices": 8, "nii_axis": 2}}))
    assert out["grid_thw"][0, 0] == 8
    windowed = {"type": "volume", "volume": path, "num_slices": 8, "axis": "coronal", "window": "bone"}
    clip = load_frames(path, num_slices=8, axis="coronal", window="bone")
    same = processor(user({"type": "volume", "volume": clip}))
    assert torch.equal(processor(user(windowed))["pixel_values"], same["pixel_values"])
    centred = {"image_path": path, "nii_num_slices": 8, "nii_axis": 1, "window_center": 400, "window_width": 1800}
    assert torch.equal(processor(user({"type": "3d", "3d": centred}))["pixel_values"], same["pixel_values"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "no placeholder", "images": [IMAGE]}, "text: has 0 <image>, expected 1"),
        ({"text": "<image><image>", "images": [IMAGE]}, "text: has 2 <image>, expected 1"),
        ({"text": "<image>"}, "text: has 1 <image>, expected 0"),
        ({"conversation": user("see <image>", image())}, "text: has 2 <image>, expected 1"),
        ({"conversation": user({"type": "audio"})}, "type 'audio', expected one of text"),
        ({"conversation": [{"role": "user"}]}, "expected role and content"),
        ({"conversation": user({"type": "image", "image": VIDEO})}, "shape"),
        (
            {"conversation": user({"type": "volume", "volume": Image.new("L", (9, 9))})},
            "one 2D image, expected a volume",
        ),
        ({"conversation": user({"type": "image", "image": str(DATA / "example_ct_sm.nii.gz")})}, "30 frames or slices"),
        ({"conversation": user(image(IMAGE.astype(np.float32)))}, "dtype float32, expected uint8"),
        ({"conversation": user("x"), "text": "y"}, "expected one of them"),
        ({}, "expected one of them"),
        ({"text": "x", "return_labels": True}, "expected a conversation"),
        ({"text": [3]}, "text: has something other"),
        ({"conversation": "Hello"}, "conversation: has type str"),
        ({"conversation": ["Hello", "you"]}, "conversation: has type str"),
        ({"conversation": {"role": "user", "content": "x"}}, "conversation: has type dict"),
        ({"conversation": 5}, "conversation: has type int"),
        ({"conversation": []}, "conversation: has nothing in it"),
        ({"conversation": [[]]}, "conversation: has type list"),
        ({"conversation": [*user("x"), 3]}, "message: has type int"),
        ({"conversation": [{"role": "user", "content": None}]}, "content: has type NoneType"),
        ({"conversation": user(3)}, "content: has int in it"),
        ({"conversation": user({"type": "text"})}, "content: has a part of type 'text' with text None"),
        ({"conversation": user(image(torch.zeros(3, 28, 28, dtype=torch.bfloat16)))}, "image in memory: has content"),
        ({"text": "<image>", "images": [torch.zeros(3, 28, 28, dtype=torch.bfloat16)]}, "image in memory: has content"),
        ({"conversation": user({"type": "volume", "volume": VIDEO, "axis": 3})}, "axis: has 3, expected 0 to 2"),
        ({"conversation": user({"type": "volume", "volume": VIDEO, "nii_axis": -1})}, "axis: has -1, expected 0 to 2"),
        ({"conversation": user("x"), "prune": {"rule": "bounded"}}, "prune: has windows None"),
        ({"conversation": user("x"), "prune": {"windows": "lung", "rule": "bounded"}}, "prune: has windows 'lung'"),
        ({"conversation": user("x"), "prune": "bounded"}, "prune: has a str"),
        ({"conversation": user("x"), "prune": {"windows": ["lung"]}}, "prune: rule has no value"),
        ({"conversation": user("x"), "prune": {"windows": ["lung"], "rule": "bounded", "a": 1}}, "keys ['a']"),
        ({"text": ["x", "y"], "images": [[IMAGE]]}, "images: has 1 entries, expected one for each of 2"),
    ],
)
def test_mistakes_are_told_in_one_line(processor: HuluMedProcessor, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        processor(**call)
    assert ", expected " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_one_image_is_no_volume(processor: HuluMedProcessor, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: has one 2D image, expected a volume"):
        processor(user({"type": "volume", "volume": tmp_path / "a.png"}))


def test_the_image_token_comes_from_the_config(tokenizer: Any) -> None:
    assert HuluMedProcessor(tokenizer).image_token_id == 151669  # next after the tokenizer's own
    other = HuluMedProcessor(tokenizer, image_token_id=151655)
    out = other(user(image(), "x"))
    assert (out["input_ids"] == 151655).sum() == out["pixel_values"].shape[0]
    with pytest.raises(ValueError, match="has token 151655"):
        other(user("<|image_pad|>"))


def test_normalised_pixels(processor: HuluMedProcessor) -> None:
    u8 = processor(user(image()))["pixel_values"]
    assert torch.equal(processor(user(image()), normalize=True)["pixel_values"], (u8.float() / 255 - 0.5) / 0.5)


def test_a_batch_moves_as_others_do(processor: HuluMedProcessor) -> None:
    out = processor(user(image()), normalize=True).to("cpu", torch.bfloat16)
    assert out["pixel_values"].dtype == torch.bfloat16
    assert out["input_ids"].dtype == torch.int64
    assert out["modals"] == ["image"]


def test_save_and_load(processor: HuluMedProcessor, tmp_path: Path) -> None:
    mine = HuluMedProcessor(
        processor.tokenizer, image_token_id=151655, padding_side="right", image_processor=BUDGET,
        how=Reading(fps=2.0, window=(-100.0, 200.0)), released=True,
    )  # fmt: skip
    mine.save_pretrained(tmp_path)
    again = HuluMedProcessor.from_pretrained(tmp_path)
    assert (again.image_token_id, again.padding_side) == (151655, "right")
    assert again.image_processor == mine.image_processor
    assert again.how == mine.how
    assert torch.equal(again(user(image(), "x"))["input_ids"], mine(user(image(), "x"))["input_ids"])
    assert HuluMedProcessor.from_pretrained(tmp_path, padding_side="left").padding_side == "left"


def test_a_released_checkpoints_files_are_read(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "image_token_index": 151656}')
    (tmp_path / "preprocessor_config.json").write_text('{"max_tokens": 4096, "min_tokens": 16, "do_resize": true}')
    processor = HuluMedProcessor.from_pretrained(tmp_path)
    assert processor.image_token_id == 151656
    assert processor.image_processor.max_tokens == 4096


def test_the_template_as_text_and_back(processor: HuluMedProcessor) -> None:
    talk = user({"type": "video", "video": VIDEO}, "Hi")
    shown = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert shown == "<|im_start|>user\n<image>,<image>,<image>\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokens = processor.apply_chat_template(talk, tokenize=True, add_generation_prompt=True)
    assert torch.equal(tokens["input_ids"], processor(text=shown, images=[VIDEO])["input_ids"])
    assert processor.apply_chat_template([talk]) == [processor.apply_chat_template(talk)]
    with pytest.raises(ValueError, match="conversation: has type str"):
        processor.apply_chat_template("Hi")
    assert processor.batch_decode(tokens["input_ids"][:, -6:]) == ["Hi\nassistant\n"]


def test_a_mask_from_intensity_windows_sees_what_the_picture_does_not(processor: HuluMedProcessor) -> None:
    """A change from -700 to -500 HU is nothing in a bone window, and all there is in a lung window."""
    values = np.full((4, 112, 112, 1), -700, np.int16)
    values[2:, :28, :28] = -500
    pixels = np.zeros(values.shape, np.uint8)  # a picture in which nothing is seen
    clip = Clip(pixels, "ct", "volume", "array", values=values)
    ask = [{"role": "user", "content": [{"type": "volume", "volume": clip}, {"type": "text", "text": "?"}]}]
    lung = processor(ask, prune={"windows": ["lung"], "rule": "bounded"})["keep"].view(4, -1)
    bone = processor(ask, prune={"windows": ["bone"], "rule": "bounded"})["keep"].view(4, -1)
    assert lung.sum(1).tolist() == [16, 0, 1, 0]
    assert lung[2, 0]
    assert bone.sum(1).tolist() == [16, 0, 0, 0]
    either = processor(ask, prune={"windows": ["bone", "lung"], "rule": "bounded"})["keep"].view(4, -1)
    assert torch.equal(either, lung)
    assert "keep" not in processor(ask)
    with pytest.raises(ValueError, match="threshold"):
        processor(ask, prune={"windows": ["lung"], "rule": "bounded", "threshold": -1.0})
