"""The chat template: a conversation as the text that the language model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_TOKEN = "<image>"

Message = Mapping[str, Any]  # {"role": str, "content": str or a list of parts}
MEDIA = {"image": "image", "video": "video", "3d": "volume", "volume": "volume"}  # type of a part -> kind of clip


def is_conversation(messages: Any) -> bool:
    return isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], Mapping)


def parts_of(message: Message) -> list[Message]:
    """The content as a list of parts, each with its ``type``.

    Raises:
        ValueError: no role or content, or a part of another type than text, image, video, 3d or volume.
    """
    if "role" not in message or "content" not in message:
        raise ValueError(f"message: has keys {sorted(message)}, expected role and content")
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[Message] = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    for part in parts:
        kind = part.get("type")
        if kind != "text" and kind not in MEDIA:
            raise ValueError(f"content: has a part of type {kind!r}, expected one of text, {', '.join(MEDIA)}")
    return parts


def placeholders(kind: str, n_frames: int, times: Sequence[float] | None = None) -> str:
    """What stands for a clip: one ``<image>`` per frame, with the frame's time where there are times."""
    if kind == "image":
        return IMAGE_TOKEN + "\n"
    labels = [""] * n_frames if times is None else [f"Time {t:.1f}s:" for t in times]
    return ",".join(label + IMAGE_TOKEN for label in labels) + "\n"


def render(role: str, body: str) -> str:
    return f"<|im_start|>{role}\n{body}<|im_end|>\n"


def opening(role: str) -> str:
    """What a turn begins with; that of ``assistant`` is the generation prompt."""
    return f"<|im_start|>{role}\n"
