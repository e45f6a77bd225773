"""What the commands share."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """A device by name. Raises ValueError where it is none, or not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: has {name!r}, expected cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: has {name!r}, expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: has {name!r}, expected one of {torch.cuda.device_count()} CUDA devices, or cpu")
    return device
