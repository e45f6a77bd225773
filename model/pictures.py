"""Pictures of what pruning drops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SHEET_FRAMES = 6
GAP = 4
ENLARGED = (224, 2400)  # pixels of height and width that small sheets grow towards
LARGEST = (480, 2400)  # and that large ones shrink to
SHADE = np.array([196, 54, 60], np.float32)  # dropped cells are mixed with this red


def contact_sheet(frames: torch.Tensor, keep: torch.Tensor, cell: int = 28) -> Image.Image:
    """Evenly chosen frames [T, H, W, C] side by side, dropped cells of ``cell`` pixels mixed with red."""
    T, H, W, _ = frames.shape
    at = np.unique(np.linspace(0, T - 1, min(T, SHEET_FRAMES)).round().astype(int))
    cells = keep.view(T, H // cell, W // cell)[at].numpy()
    pictures = frames[at].numpy().astype(np.float32)
    pictures = np.repeat(pictures, 3 // pictures.shape[-1], -1)
    dropped = ~cells.repeat(cell, 1).repeat(cell, 2)
    pictures[dropped] = 0.55 * pictures[dropped] + 0.45 * SHADE
    gap = np.full((H, GAP, 3), 128, np.float32)
    strip = [x for p in pictures for x in (p, gap)][:-1]
    return Image.fromarray(np.concatenate(strip, 1).round().astype(np.uint8))


def captioned(sheet: Image.Image, caption: str) -> Image.Image:
    """The sheet under a line of text, small ones enlarged by a whole factor, large ones shrunk."""
    factor = max(1, min(ENLARGED[0] // sheet.height, ENLARGED[1] // sheet.width))
    sheet = sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
    sheet.thumbnail(LARGEST[::-1])
    font = ImageFont.load_default(14)
    left, _, right, bottom = font.getbbox(caption)
    out = Image.new("RGB", (max(sheet.width, int(right - left) + 2 * GAP), int(bottom) + 2 * GAP + sheet.height))
    ImageDraw.Draw(out).text((GAP, GAP), caption, font=font, fill=(255, 255, 255))
    out.paste(sheet, (0, out.height - sheet.height))
    return out


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets under each other."""
    size = max(s.width for s in sheets), sum(s.height + GAP for s in sheets) - GAP
    whole = Image.new("RGB", size, (128, 128, 128))
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height + GAP
    return whole
