#include "ops/rope_attention/rope_attention.h"
namespace hk::HK_CPU_LEVEL {
int rope_attention(const RopeAttentionArgs&) {
  return HK_UNSUPPORTED;
}
int rope_attention_backward(const RopeAttentionBackwardArgs&) {
  return HK_UNSUPPORTED;
}
int rope_attention_rotate(const RopeAttentionRotateArgs&) {
  return HK_UNSUPPORTED;
}
}  // namespace hk::HK_CPU_LEVEL
