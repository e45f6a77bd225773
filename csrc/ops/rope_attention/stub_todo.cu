#include "cpu/status.h"
#include "ops/patch_embed/patch_embed.h"
#include "ops/rope_attention/rope_attention.h"
namespace hk {
#define STUB(f, A)                                                        \
  int f##_cuda(const A&, void*) {                                         \
    return fail(HK_UNSUPPORTED, "%s: no CUDA kernel is written yet", #f); \
  }
STUB(patch_embed_normalize, PatchEmbedNormalizeArgs)
STUB(patch_embed_cut, PatchEmbedCutArgs)
}  // namespace hk
