// Small kernels with one fault each, and one with none: what the simulator must report, and where
// (tests/sim/test_simulator.py). A line with a fault ends in `// fault`.
#include <string.h>

#include "device/async.cuh"
#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "device/shared.cuh"

namespace hk {
namespace {

constexpr int kThreads = 64;

// Everything that the others get wrong, done right.
__global__ void sound(const float* in, float* out, float* workspace) {
  __shared__ SharedArray<float, kThreads> array;
  const Shared<float> values = array.view();
  const int i = threadIdx.x;
  values.set(i, load_value(in + i));
  block_barrier();
  float x = values.get(kThreads - 1 - i);
  block_barrier();
  values.set(i, warp_sum(x));
  warp_barrier();
  x = values.get(i ^ 1);
  store_value(workspace + i, x);
  store_value(out + i, load_value(workspace + i));
}

__global__ void read_without_barrier(const float* in, float* out, float*) {
  __shared__ SharedArray<float, kThreads> array;
  const Shared<float> values = array.view();
  const int i = threadIdx.x;
  values.set(i, load_value(in + i));
  warp_barrier();                           // enough within a warp, not across
  store_value(out + i, values.get(i / 2));  // fault
}

__global__ void read_without_warp_barrier(const float* in, float* out, float*) {
  __shared__ SharedArray<float, kThreads> array;
  const Shared<float> values = array.view();
  const int i = threadIdx.x;
  values.set(i, load_value(in + i));
  store_value(out + i, warp_sum(1.0f) + values.get(i ^ 1));  // fault
}

__global__ void write_without_barrier(const float* in, float* out, float*) {
  __shared__ SharedArray<float, kThreads> array;
  const Shared<float> values = array.view();
  const int i = threadIdx.x;
  values.set(i, load_value(in + i));
  block_barrier();
  store_value(out + i, values.get(0));
  if (i == 0) values.set(0, 1.0f);  // fault
}

__global__ void same_place(const float*, float*, float*) {
  __shared__ SharedArray<float, kThreads> array;
  array.view().set(threadIdx.x / 2, 1.0f);  // fault
}

__global__ void global_read_outside(const float* in, float* out, float*) {
  const int i = threadIdx.x;
  store_value(out + i, load_value(in + i + 1));  // fault
}

__global__ void global_write_outside(const float*, float* out, float*) {
  store_value(out + (threadIdx.x == 5 ? -1 : static_cast<int>(threadIdx.x)), 1.0f);  // fault
}

__global__ void global_misaligned(const float* in, float* out, float*) {
  const Pack<16> pack = load_pack<16>(in + threadIdx.x);  // fault
  store_value(out + threadIdx.x, f32_of_bits(pack.words[0]));
}

__global__ void shared_outside(const float*, float*, float*) {
  __shared__ SharedArray<float, kThreads> array;
  array.view().set(threadIdx.x + 1, 1.0f);  // fault
}

__global__ void unwritten_shared(const float*, float* out, float*) {
  __shared__ SharedArray<float, kThreads> array;
  const Shared<float> values = array.view();
  const int i = threadIdx.x;
  if (i != 7) values.set(i, 1.0f);
  store_value(out + i, values.get(i));  // fault
}

__global__ void unwritten_workspace(const float*, float* out, float* workspace) {
  store_value(out + threadIdx.x, load_value(workspace + threadIdx.x));  // fault
}

__global__ void divergent_barrier(const float*, float*, float*) {
  if (threadIdx.x < 32) block_barrier();  // fault
}

__global__ void divergent_sum(const float*, float* out, float*) {
  float x = 1.0f;
  if (threadIdx.x % 32 < 16) {
    x = warp_sum(x);
  } else {
    x = warp_sum(x + 1.0f);  // fault
  }
  store_value(out + threadIdx.x, x);
}

__global__ void barrier_and_sum(const float*, float* out, float*) {
  if (threadIdx.x < 40) {
    block_barrier();  // fault
  } else {
    store_value(out + threadIdx.x, warp_sum(1.0f));
  }
}

__global__ void copy_not_waited_for(const float* in, float* out, float*) {
  __shared__ SharedArray<uint16_t, 8 * kThreads / 4> array;
  const Shared<uint16_t> values = array.view();
  const int i = threadIdx.x;
  if (i < kThreads / 4) copy_async_16(values, 8 * i, in + 4 * i, true);
  commit_async();
  wait_async<1>();
  block_barrier();
  store_value(out + i, f32_of_bits(values.get_pack<4>(2 * i).words[0]));  // fault
  wait_async<0>();
}

__global__ void copy_without_barrier(const float* in, float* out, float*) {
  __shared__ SharedArray<uint16_t, 8 * kThreads / 4> array;
  const Shared<uint16_t> values = array.view();
  const int i = threadIdx.x;
  if (i < kThreads / 4) copy_async_16(values, 8 * i, in + 4 * i, true);
  commit_async();
  wait_async<0>();
  store_value(out + i, f32_of_bits(values.get_pack<4>(2 * i).words[0]));  // fault
}

struct Planted {
  const char* name;
  void (*launch)(const float* in, float* out, float* workspace);
};

template <auto kKernel>
void start(const float* in, float* out, float* workspace) {
  launch<kKernel>(grid_of(2), kThreads, 0, nullptr, in, out, workspace);
}

#define HK_PLANTED(kernel) {#kernel, start<kernel>}
constexpr Planted kPlanted[] = {
    HK_PLANTED(sound),
    HK_PLANTED(read_without_barrier),
    HK_PLANTED(read_without_warp_barrier),
    HK_PLANTED(write_without_barrier),
    HK_PLANTED(same_place),
    HK_PLANTED(global_read_outside),
    HK_PLANTED(global_write_outside),
    HK_PLANTED(global_misaligned),
    HK_PLANTED(shared_outside),
    HK_PLANTED(unwritten_shared),
    HK_PLANTED(unwritten_workspace),
    HK_PLANTED(divergent_barrier),
    HK_PLANTED(divergent_sum),
    HK_PLANTED(barrier_and_sum),
    HK_PLANTED(copy_not_waited_for),
    HK_PLANTED(copy_without_barrier),
};

}  // namespace
}  // namespace hk

// The name of the i-th, or NULL.
extern "C" HK_API const char* hk_sim_planted_name(int i) {
  const int n = sizeof hk::kPlanted / sizeof *hk::kPlanted;
  return i < n ? hk::kPlanted[i].name : nullptr;
}

extern "C" HK_API int hk_sim_run_planted(int i) {
  using namespace hk;
  alignas(16) static float in[kThreads], out[kThreads + 8], workspace[kThreads];
  for (int k = 0; k < kThreads; ++k) in[k] = 1.0f;
  sim::forget_tensors();
  sim::register_memory("in", in, sizeof in, true);
  sim::register_memory("out", out + 4, sizeof(float) * kThreads, true);
  sim::register_memory("workspace", workspace, sizeof workspace, false);
  kPlanted[i].launch(in, out + 4, workspace);
  return launch_status("planted");
}
