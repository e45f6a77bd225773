#include "cpu/status.h"
#include "ops/bias_gelu/bias_gelu.h"
#include "ops/layer_norm/layer_norm.h"
#include "ops/patch_embed/patch_embed.h"
#include "ops/rope_attention/rope_attention.h"
#include "ops/spatial_merge/spatial_merge.h"
#include "ops/token_compact/token_compact.h"
namespace hk {
#define STUB(f, A)                                                        \
  int f##_cuda(const A&, void*) {                                         \
    return fail(HK_UNSUPPORTED, "%s: no CUDA kernel is written yet", #f); \
  }
STUB(rope_attention_backward, RopeAttentionBackwardArgs)
STUB(layer_norm, LayerNormArgs)
STUB(layer_norm_backward, LayerNormBackwardArgs)
STUB(bias_gelu, BiasGeluArgs)
STUB(bias_gelu_backward, BiasGeluBackwardArgs)
STUB(spatial_merge, SpatialMergeArgs)
STUB(spatial_merge_backward, SpatialMergeBackwardArgs)
STUB(patch_embed_normalize, PatchEmbedNormalizeArgs)
STUB(patch_embed_cut, PatchEmbedCutArgs)
STUB(token_compact_index, TokenCompactIndexArgs)
STUB(token_compact_rows, TokenCompactRowsArgs)
}  // namespace hk
