"""One folder per op; importing this package registers them all with torch."""

from hulukern.ops.bias_gelu import bias_gelu
from hulukern.ops.layer_norm import layer_norm
from hulukern.ops.patch_embed import (
    fold_normalization,
    patch_embed,
    patch_embed_cut,
    patch_embed_frames,
    patch_embed_normalize,
)
from hulukern.ops.rope_attention import rope_attention, rope_attention_rotate
from hulukern.ops.spatial_merge import spatial_merge
from hulukern.ops.token_compact import Compacted, token_compact
from hulukern.ops.token_score import token_score, token_score_frames

__all__ = [
    "Compacted",
    "bias_gelu",
    "fold_normalization",
    "layer_norm",
    "patch_embed",
    "patch_embed_cut",
    "patch_embed_frames",
    "patch_embed_normalize",
    "rope_attention",
    "rope_attention_rotate",
    "spatial_merge",
    "token_compact",
    "token_score",
    "token_score_frames",
]
