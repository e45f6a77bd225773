"""Conversations with pictures, volumes and videos to what the model takes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AddedToken, AutoProcessor, AutoTokenizer, BatchFeature
from transformers.utils import cached_file

from hulukern.pruning import check_rule
from model.chat import IMAGE_TOKEN, MEDIA, Message, is_conversation, opening, parts_of, placeholders, render
from model.config import FAMILIES
from model.image_processor import HuluMedImageProcessor, Visual
from model.media import IMAGE, VIDEO, VOLUME, Clip, Reading, from_memory, load_frames
from model.media.clip import reading, refuse

MARKS = ("<|im_start|>", "<|im_end|>")
IGNORED = -100  # label of a token that is not learned
CONFIG = "processor_config.json"
AXES = ("sagittal", "coronal", "axial")  # released conversations number them
# Options of a part, and the released names for them, with the field of Reading that they set.
OPTIONS = {
    "fps": "fps", "max_frames": "max_frames", "num_slices": "num_slices", "nii_num_slices": "num_slices",
    "axis": "axis", "nii_axis": "axis", "window": "window", "volume_index": "volume",
}  # fmt: skip
PATHS = ("path", "image_path", "video_path")


@dataclass(frozen=True)
class _Turn:
    text: str
    learned: bool  # an assistant's


class HuluMedProcessor:
    """A Hugging Face tokenizer, the chat template, the file readers and the image processor in one.

    Args:
        tokenizer: a fast tokenizer. ``<image>`` is added to it where it has none.
        image_token_id: the id that stands for a visual token, the config's ``image_token_index``; None is
            the tokenizer's id of ``<image>``.
        image_processor: sizes, budget and normalisation.
        how: how files are read where a part of a conversation does not say otherwise.
        padding_side: ``"left"`` for generation, ``"right"``.
        released: read, scale and resize as the released code does, its defects included: sets the
            switches of ``image_processor`` and ``how``.
    """

    model_input_names = ("input_ids", "attention_mask", "pixel_values", "grid_thw", "merge_sizes", "modals")

    def __init__(
        self, tokenizer: Any, *, image_token_id: int | None = None,
        image_processor: HuluMedImageProcessor | None = None, how: Reading | None = None,
        padding_side: str = "left", released: bool = False,
    ) -> None:  # fmt: skip
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side: has {padding_side!r}, expected 'left' or 'right'")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        for mark in MARKS:
            ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"tokenizer: has {len(ids)} tokens for {mark!r}, expected one for the chat template")
        self.tokenizer = tokenizer
        self.placeholder_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.image_token_id = self.placeholder_id if image_token_id is None else image_token_id
        self.image_processor = image_processor or HuluMedImageProcessor()
        self.how = how or Reading()
        if released:
            self.image_processor = replace(self.image_processor, released=True)
            self.how = replace(self.how, released=True)
        self.padding_side = padding_side

    def __call__(
        self,
        conversation: Any = None,
        *,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        merge_size: int | None = None,
        add_generation_prompt: bool = True,
        return_labels: bool = False,
        normalize: bool = False,
        padding_side: str | None = None,
        prune: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """One sample or a batch of B.

        Args:
            conversation: messages ``{"role": str, "content": str | parts}``, or a list of such lists; no mere
                string, which is a ``text``. A part is a text, or has a ``type``: text, image, video, 3d or
                volume, and under the same key (or ``path``) a path, a folder, an array, a tensor, a Pillow
                image, a list of frames, a :class:`model.media.Clip`, or a dict with a path; fields of
                :class:`model.media.Reading` beside it (fps, max_frames, num_slices, axis, window,
                volume_index) say how to read it.
            text: in place of a conversation, prompts with one ``<image>`` per frame of ``images``.
            images: for ``text``, media in order (4 dimensions or a list: a video); for a conversation,
                those of its parts that hold no data. For a batch, one such list, or one medium, for each.
            merge_size: None is Hulu-Med's: 1 for images; 2 for the whole conversation as soon as it holds
                a video or a volume. With ``text``, 1 or 2 for each medium by its own kind.
            add_generation_prompt: end with the opening of the assistant's turn; never with labels.
            return_labels: also ``labels``: the assistant's turns with their end, all else -100.
            normalize: float32 ``pixel_values`` in place of uint8.
            padding_side: in place of the processor's.
            prune: also ``keep``, the mask of visual tokens that the model takes in place of a rule of its own:
                ``{"windows": ["lung", "soft_tissue"], "rule": "bounded"}`` scores volumes in intensity
                windows, see :meth:`model.image_processor.HuluMedImageProcessor.keep`.

        Returns:
            ``input_ids``, ``attention_mask`` (and ``labels``) int64 ``[B, L]``; and, where there are media,
            ``pixel_values``, ``grid_thw``, ``merge_sizes``, ``modals`` of all samples in order, see
            :class:`model.image_processor.Visual`. The budget of visual tokens is for each sample.

        Raises:
            ValueError: a conversation that is none; an unreadable file; a part of unknown type; another number of
            ``<image>`` in the text than of frames; a kind of file other than the part asks for.
        """
        if (conversation is None) == (text is None):
            raise ValueError("processor: has a conversation and text, or none, expected one of them")
        if return_labels and conversation is None:
            raise ValueError("return_labels: has text, expected a conversation, which tells whose turn it is")
        samples: list[Any] = [text] if isinstance(text, str) else list(text or [])
        if conversation is not None:
            samples = _conversations(conversation)
        elif not all(isinstance(sample, str) for sample in samples):
            raise ValueError("text: has something other, expected a str or a list of them")
        if prune is not None:
            _check_prune(prune)
        single = isinstance(text, str) or is_conversation(conversation)
        media: Sequence[Any] = [images] if single else [None] * len(samples) if images is None else images
        if not samples or len(media) != len(samples):
            raise ValueError(f"images: has {len(media)} entries, expected one for each of {len(samples)} samples")

        rows: list[npt.NDArray[np.int64]] = []
        labels: list[npt.NDArray[np.int64]] = []
        visuals: list[Visual] = []
        kept: list[torch.Tensor] = []
        for sample, given in zip(samples, media, strict=True):
            if isinstance(sample, str):
                turns, clips = [_Turn(sample, False)], [self._medium(x) for x in _many(given)]
                merges = [self._merge(clip.kind) for clip in clips]
            else:
                turns, clips = self._turns(sample, given, add_generation_prompt and not return_labels)
                merges = [max((self._merge(clip.kind) for clip in clips), default=1)] * len(clips)
            if merge_size is not None:
                merges = [merge_size] * len(clips)
            if clips:
                visuals.append(self.image_processor(clips, merges))
                if prune is not None:
                    kept.append(self.image_processor.keep(clips, merges, **prune))
            row, label = self._encode(turns, visuals[-1].tokens if clips else [])
            rows.append(row)
            labels.append(label)
        data = self._pad(rows, labels if return_labels else None, padding_side or self.padding_side)
        if visuals:
            pixels = torch.cat([v.pixel_values for v in visuals])
            data["pixel_values"] = self.image_processor.normalize(pixels) if normalize else pixels
            data["grid_thw"] = torch.cat([v.grid_thw for v in visuals])
            data["merge_sizes"] = torch.cat([v.merge_sizes for v in visuals])
            data["modals"] = [modal for v in visuals for modal in v.modals]
            if prune is not None:
                data["keep"] = torch.cat(kept)
        return BatchFeature(data)

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = False, add_generation_prompt: bool = False, **call: Any
    ) -> Any:
        """The prompt as text, one ``<image>`` per frame, or with ``tokenize`` what :meth:`__call__` gives."""
        if tokenize:
            return self(conversation, add_generation_prompt=add_generation_prompt, **call)
        if not is_conversation(conversation):
            return [
                self.apply_chat_template(c, add_generation_prompt=add_generation_prompt)
                for c in _conversations(conversation)
            ]
        turns, _ = self._turns(conversation, call.get("images"), add_generation_prompt)
        return "".join(turn.text for turn in turns)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True, **options: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **options)

    def batch_decode(self, ids: Any, *, skip_special_tokens: bool = True, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens, **options)

    # --- conversations ------------------------------------------------------------------------------------

    def _turns(self, conversation: Sequence[Message], images: Any, prompt: bool) -> tuple[list[_Turn], list[Clip]]:
        turns: list[_Turn] = []
        clips: list[Clip] = []
        given = iter(_many(images))
        for message in conversation:
            body = ""
            for part in _parts(message):
                if part["type"] == "text":
                    body += part["text"]
                    continue
                clip = self._clip(part, given)
                clips.append(clip)
                body += placeholders(clip.kind, len(clip.frames), clip.times if clip.kind == VIDEO else None)
            turns.append(_Turn(render(message["role"], body), message["role"] == "assistant"))
        left = sum(1 for _ in given)
        if left:
            raise ValueError(f"images: has {left} more than the conversation's parts, expected one for each")
        if prompt:
            turns.append(_Turn(opening("assistant"), False))
        return turns, clips

    def _clip(self, part: Message, given: Iterator[Any]) -> Clip:
        """What a part holds or, where it holds nothing, the next of ``given``."""
        kind = MEDIA[part["type"]]
        data = part.get(part["type"], part.get("path"))
        inner = data if isinstance(data, Mapping) else {}
        for key in PATHS:
            data = inner.get(key, data)
        if data is None:
            data = next(given, None)
        if data is None or isinstance(data, Mapping):
            raise ValueError(f"content: has a part of type {part['type']!r} without data, expected a path or pixels")
        return self._load(data, kind, self._how(kind, {**part, **inner}), part.get("timestamps"))

    def _how(self, kind: str, options: Mapping[str, Any]) -> Reading:
        chosen = {field: options[name] for name, field in OPTIONS.items() if name in options}
        axis = chosen.get("axis")
        if isinstance(axis, int) and 0 <= axis < len(AXES):
            chosen["axis"] = AXES[axis]
        elif axis not in (None, *AXES):
            raise ValueError(f"axis: has {axis!r}, expected 0 to {len(AXES) - 1} or one of {', '.join(AXES)}")
        if isinstance(chosen.get("window"), list):
            chosen["window"] = tuple(chosen["window"])
        if "window_center" in options and "window_width" in options:
            centre, half = float(options["window_center"]), float(options["window_width"]) / 2
            chosen["window"] = (centre - half, centre + half)
        how = replace(self.how, **chosen)
        return replace(how, max_frames=how.num_slices) if kind == VOLUME else how

    def _load(self, data: Any, kind: str, how: Reading, times: Sequence[float] | None = None) -> Clip:
        if isinstance(data, Clip):
            clip = data
        else:
            clip = load_frames(data, how) if isinstance(data, (str, Path)) else _from_memory(data, kind, how)
        n = len(clip.frames)
        if kind == IMAGE and n > 1:
            refuse(clip.source, f"{n} frames or slices", "one image")
        if kind != IMAGE and clip.kind == IMAGE:
            refuse(clip.source, "one 2D image", f"a {kind}")
        if kind == VOLUME and clip.kind == VIDEO and clip.times is not None:
            refuse(clip.source, "a video", "a volume")
        if times is not None and len(times) != n:
            refuse(clip.source, f"{n} frames and {len(times)} timestamps", "as many")
        return replace(clip, kind=kind, times=clip.times if times is None else tuple(float(t) for t in times))

    def _medium(self, data: Any) -> Clip:
        """A medium whose kind nobody names."""
        if isinstance(data, Clip):
            return data
        if isinstance(data, (str, Path)):
            return load_frames(data, self.how)
        many = isinstance(data, (list, tuple)) or getattr(data, "ndim", 0) == 4
        return _from_memory(data, VIDEO if many else IMAGE, self.how)

    @staticmethod
    def _merge(kind: str) -> int:
        return 1 if kind == IMAGE else 2

    # --- tokens -------------------------------------------------------------------------------------------

    def _encode(self, turns: Sequence[_Turn], tokens: Sequence[int]) -> tuple[npt.NDArray[np.int64], ...]:
        """Ids and labels [L], each placeholder repeated once per visual token of its frame."""
        ids, learned = [], []
        for turn in turns:
            new = self._ids(turn.text)
            mask = np.zeros(len(new), bool)
            if turn.learned:  # the newline after the turn's end is not
                mask[len(self._ids(opening("assistant"))) : -1] = True
            ids.append(new)
            learned.append(mask)
        row, mask = np.concatenate(ids), np.concatenate(learned)
        visual = row == self.placeholder_id
        if visual.sum() != len(tokens):
            raise ValueError(
                f"text: has {visual.sum()} {IMAGE_TOKEN}, expected {len(tokens)}, one for each frame given"
            )
        if self.image_token_id != self.placeholder_id and (row == self.image_token_id).any():
            raise ValueError(f"text: has token {self.image_token_id}, expected none: it stands for what is seen")
        row[visual] = self.image_token_id
        times = np.ones(len(row), np.int64)
        times[visual] = tokens
        labels = np.where(mask & ~visual, row, IGNORED)
        return row.repeat(times), labels.repeat(times)

    def _ids(self, text: str) -> npt.NDArray[np.int64]:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)

    def _pad(
        self, rows: Sequence[npt.NDArray[np.int64]], labels: Sequence[npt.NDArray[np.int64]] | None, side: str
    ) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        shape = (len(rows), max(len(row) for row in rows))
        out = {"input_ids": torch.full(shape, 0 if pad is None else pad), "attention_mask": torch.zeros(shape).long()}
        if labels is not None:
            out["labels"] = torch.full(shape, IGNORED)
        for b, row in enumerate(rows):
            here = slice(shape[1] - len(row), None) if side == "left" else slice(0, len(row))
            out["input_ids"][b, here] = torch.from_numpy(row)
            out["attention_mask"][b, here] = 1
            if labels is not None:
                out["labels"][b, here] = torch.from_numpy(labels[b])
        return out

    # --- files --------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Tokenizer files and ``processor_config.json``."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder, **options)
        data = {
            "processor_class": type(self).__name__,
            "image_token_id": self.image_token_id,
            "padding_side": self.padding_side,
            "image_processor": asdict(self.image_processor),
            "reading": asdict(self.how),
        }
        (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> HuluMedProcessor:
        """From a folder or a name on the hub: what :meth:`save_pretrained` wrote, or a released checkpoint,
        whose ``preprocessor_config.json`` and ``config.json`` tell sizes and image token. ``options`` are
        arguments of the constructor that replace what is stored."""
        own_options = set(inspect.signature(cls.__init__).parameters)
        hub = {key: options.pop(key) for key in list(options) if key not in own_options}  # revision, token, ...
        if Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file():
            raise ValueError(f"{name}: has no tokenizer.json, expected a checkpoint with its tokenizer")
        stored = _json(name, CONFIG)
        own = stored.get("processor_class") == cls.__name__
        file = CONFIG if own else "preprocessor_config.json"
        try:
            if own:
                image, how = stored["image_processor"], stored["reading"]
                token, side = stored["image_token_id"], stored["padding_side"]
            else:
                image, how = _json(name, file), {}
                token, side = _json(name, "config.json").get("image_token_index"), "left"
            arguments = {
                "image_token_id": token,
                "padding_side": side,
                "image_processor": HuluMedImageProcessor(**_known(HuluMedImageProcessor, image)),
                "how": Reading(**_known(Reading, how)),
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{name}: has a {file} that does not fit ({error}), expected a processor's") from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        except Exception as error:  # whatever the tokenizers library makes of its files
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{name}: has a tokenizer that cannot be read ({text}), expected tokenizer.json") from None
        return cls(tokenizer, **{**arguments, **options})


def _conversations(given: Any) -> list[Sequence[Message]]:
    """A batch of conversations, or the one given."""
    if is_conversation(given):
        return [given]
    samples = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else [given]
    other = [sample for sample in samples if not is_conversation(sample)]
    if other or not samples:
        came = f"type {type(other[0]).__name__}" if other else "nothing in it"
        raise ValueError(f"conversation: has {came}, expected messages or a list of such lists; a prompt goes by text=")
    return samples


def _parts(message: Any) -> list[Message]:
    """The message's parts, each a text or of a type that is known. What JSON can hold beside is refused."""
    if not isinstance(message, Mapping):
        raise ValueError(f"message: has type {type(message).__name__}, expected a dictionary with role and content")
    content = message.get("content", "")
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"content: has type {type(content).__name__}, expected a text or a list of parts")
    for part in () if isinstance(content, str) else content:
        if not isinstance(part, (str, Mapping)):
            raise ValueError(f"content: has {type(part).__name__} in it, expected texts and dictionaries")
    parts = parts_of(message)
    for part in parts:
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"content: has a part of type 'text' with text {part.get('text')!r}, expected a str")
    return parts


def _check_prune(prune: Any) -> None:
    """Windows and a rule, told before any file is read."""
    windows = prune.get("windows") if isinstance(prune, Mapping) else None
    if not isinstance(windows, (list, tuple)):
        came = f"windows {windows!r}" if isinstance(prune, Mapping) else f"a {type(prune).__name__}"
        raise ValueError(f"prune: has {came}, expected a rule and a list of windows, such as ['lung']")
    check_rule("prune", {key: value for key, value in prune.items() if key not in ("windows", "backend")})


def _from_memory(data: Any, kind: str, how: Reading) -> Clip:
    with reading(f"{kind} in memory", "pixels that numpy can hold"):  # it has no bfloat16
        return from_memory(data, kind, how)


def _many(images: Any) -> Sequence[Any]:
    """A sample's media: None, one, or a list of them."""
    return () if images is None else images if isinstance(images, (list, tuple)) else (images,)


def _json(name: str | Path, file: str) -> dict[str, Any]:
    path = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: has content that cannot be read ({error}), expected JSON") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: has a {type(data).__name__}, expected a dictionary")
    return data


def _known(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that are fields of a dataclass, lists as tuples."""
    names = {field.name for field in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}


for _config in FAMILIES.values():
    AutoProcessor.register(_config, HuluMedProcessor, exist_ok=True)
