"""A fault in a kernel is an exception of the call that launched it, whatever the C ABI does after a launch."""

from __future__ import annotations

import pytest
import torch

import hulukern
from hulukern.backends import simulating, unavailable

pytestmark = pytest.mark.skipif(not simulating() or bool(unavailable("cuda")), reason="needs HULUKERN_SIM=1")


@pytest.mark.parametrize("with_scores", [False, True])
def test_misaligned_frames(with_scores: bool) -> None:
    """One byte off: no tensor of torch's own lies so, and no kernel may read it."""
    frames = torch.frombuffer(bytearray(2 * 2 * 28 * 28 + 1), dtype=torch.int16, offset=1).view(2, 28, 28, 1)
    with pytest.raises(RuntimeError, match=r"patch_embed_cut: patch_embed_cut_patches<.*>: misaligned read of 2 bytes"):
        hulukern.patch_embed_cut(frames, window=(-1000, 400), with_scores=with_scores, backend="cuda")
