"""One folder per op; importing this package registers them all with torch."""

from hulukern.ops.patch_embed import (
    fold_normalization,
    patch_embed,
    patch_embed_cut,
    patch_embed_frames,
    patch_embed_normalize,
)
from hulukern.ops.token_compact import Compacted, token_compact
from hulukern.ops.token_score import token_score, token_score_frames

__all__ = [
    "Compacted",
    "fold_normalization",
    "patch_embed",
    "patch_embed_cut",
    "patch_embed_frames",
    "patch_embed_normalize",
    "token_compact",
    "token_score",
    "token_score_frames",
]
