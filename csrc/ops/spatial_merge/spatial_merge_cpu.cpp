#include "ops/spatial_merge/spatial_merge.h"
namespace hk::HK_CPU_LEVEL {
int spatial_merge(const SpatialMergeArgs&) {
  return HK_UNSUPPORTED;
}
int spatial_merge_backward(const SpatialMergeBackwardArgs&) {
  return HK_UNSUPPORTED;
}
}  // namespace hk::HK_CPU_LEVEL
