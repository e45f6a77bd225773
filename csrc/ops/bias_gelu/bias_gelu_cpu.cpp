#include "ops/bias_gelu/bias_gelu.h"
namespace hk::HK_CPU_LEVEL {
int bias_gelu(const BiasGeluArgs&) {
  return HK_UNSUPPORTED;
}
int bias_gelu_backward(const BiasGeluBackwardArgs&) {
  return HK_UNSUPPORTED;
}
}  // namespace hk::HK_CPU_LEVEL
