// The only pybind11: torch tensors (read by duck typing, so that one build serves every torch) to
// hk_tensor, C status codes to Python exceptions. The GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "hulukern/hulukern.h"

namespace py = pybind11;

namespace {

// torch.dtype objects are singletons: identity is the key.
std::unordered_map<PyObject*, int32_t>& dtype_codes() {
  static auto* codes = new std::unordered_map<PyObject*, int32_t>;
  return *codes;
}

py::object attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_CallMethodNoArgs(object, name);
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// shape and stride() are tuples of ints.
void read_sizes(const py::object& tuple, int64_t* out, int ndim) {
  for (int d = 0; d < ndim; ++d) {
    out[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), d));
    if (out[d] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
}

hk_tensor view(py::handle tensor) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  hk_tensor t = {};
  const auto code = dtype_codes().find(attribute(tensor.ptr(), dtype).ptr());
  if (code == dtype_codes().end()) throw py::type_error("hulukern._C: a tensor has a dtype the C ABI does not know");
  t.dtype = code->second;
  const py::object sizes = attribute(tensor.ptr(), shape);
  t.ndim = static_cast<int32_t>(PyTuple_GET_SIZE(sizes.ptr()));
  if (t.ndim > HK_MAX_DIMS) throw py::value_error("hulukern._C: a tensor has more than 5 dimensions");
  read_sizes(sizes, t.shape, t.ndim);
  read_sizes(call(tensor.ptr(), stride), t.stride, t.ndim);
  t.data = PyLong_AsVoidPtr(call(tensor.ptr(), data_ptr).ptr());
  if (t.data == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return t;
}

struct OptionalView {
  explicit OptionalView(py::handle tensor) : present(!tensor.is_none()), tensor(present ? view(tensor) : hk_tensor{}) {}
  const hk_tensor* get() const { return present ? &tensor : nullptr; }
  bool present;
  hk_tensor tensor;
};

// Runs `launch` without the GIL; a refused call raises with the launcher's own text.
template <class Launch>
void run(Launch launch) {
  int status;
  {
    py::gil_scoped_release release;
    status = launch();
  }
  if (status == HK_OK) return;
  const std::string text = hk_last_error();
  if (status == HK_INVALID_ARGUMENT) throw py::value_error(text);
  if (status == HK_OUT_OF_MEMORY) {
    PyErr_SetString(PyExc_MemoryError, text.c_str());
    throw py::error_already_set();
  }
  throw std::runtime_error(text);
}

// A CPU call passes its thread count, a CUDA call its stream; `where` is one of the two.
hk_exec cpu(int num_threads) {
  return {HK_CPU, num_threads, nullptr};
}
hk_exec cuda(uintptr_t stream) {
  return {HK_CUDA, 1, reinterpret_cast<void*>(stream)};
}
hk_exec where(bool on_cuda, uintptr_t threads_or_stream) {
  return on_cuda ? cuda(threads_or_stream) : cpu(static_cast<int>(threads_or_stream));
}

hk_rope rope_of(const std::vector<int32_t>& sections, double theta) {
  return {sections.data(), static_cast<int32_t>(sections.size()), theta};
}

using Floats = std::optional<std::vector<float>>;

hk_cut_options cut_options(const char* op, int patch_size, int merge_size, int channels, int lo, int hi,
                           const Floats& mean, const Floats& std_dev) {
  for (const Floats* v : {&mean, &std_dev})
    if (*v && static_cast<int>((*v)->size()) != channels)
      throw py::value_error(std::string(op) + ": mean and std have another length, expected one value per channel");
  return {patch_size, merge_size, channels, lo, hi, mean ? mean->data() : nullptr, std_dev ? std_dev->data() : nullptr};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("__version__") = hk_version();
  m.attr("abi_version") = hk_abi_version();
  m.attr("openmp") = hk_openmp() == 1;
  m.attr("cuda_archs") = hk_cuda_archs();
  m.attr("cuda_absent_reason") = hk_cuda_absent_reason();
  m.def("cpu_level", [] {
    const char* level = hk_cpu_level();
    if (level == nullptr) throw py::value_error(hk_last_error());
    return level;
  });
  m.def("register_dtypes", [](const py::dict& codes) {
    for (auto item : codes) dtype_codes()[item.first.inc_ref().ptr()] = item.second.cast<int32_t>();
  });

  m.def("patch_embed_normalize", [](bool on_cuda, uintptr_t exec, py::handle patches, py::handle out, int channels,
                                    const Floats& mean, const Floats& std_dev) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor p = view(patches), o = view(out);
    const hk_cut_options options = cut_options("patch_embed", 1, 1, channels, 0, 0, mean, std_dev);
    run([&] { return hk_patch_embed_normalize(&e, &p, &o, &options); });
  });
  m.def("patch_embed_cut",
        [](bool on_cuda, uintptr_t exec, py::handle frames, py::handle previous, py::handle patches, py::handle scores,
           int patch_size, int merge_size, int channels, int lo, int hi, const Floats& mean, const Floats& std_dev) {
          const hk_exec e = where(on_cuda, exec);
          const hk_tensor f = view(frames), p = view(patches);
          const OptionalView before(previous), s(scores);
          const hk_cut_options options =
              cut_options("patch_embed_cut", patch_size, merge_size, channels, lo, hi, mean, std_dev);
          run([&] { return hk_patch_embed_cut(&e, &f, before.get(), &p, s.get(), &options); });
        });

  m.def("patch_embed_resize", [](bool on_cuda, uintptr_t exec, py::handle frames, py::handle out) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor f = view(frames), o = view(out);
    run([&] { return hk_patch_embed_resize(&e, &f, &o); });
  });

  m.def("token_score", [](bool on_cuda, uintptr_t exec, py::handle patches, py::handle scores,
                          const std::vector<int64_t>& grid_thw, int merge_size, int reference, float threshold) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor p = view(patches), s = view(scores);
    if (grid_thw.size() % 3 != 0) throw py::value_error("token_score: grid_thw has no whole rows of 3");
    run([&] {
      return hk_token_score(&e, &p, &s, grid_thw.data(), static_cast<int64_t>(grid_thw.size() / 3), merge_size,
                            reference, threshold);
    });
  });
  m.def("token_score_frames", [](bool on_cuda, uintptr_t exec, py::handle frames, py::handle scores, int patch_size,
                                 int merge_size, const std::vector<int32_t>& windows, int reference, float threshold) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor f = view(frames), s = view(scores);
    if (windows.size() % 2 != 0) throw py::value_error("token_score_frames: windows has no whole rows of 2");
    run([&] {
      return hk_token_score_frames(&e, &f, &s, patch_size, merge_size, windows.data(),
                                   static_cast<int32_t>(windows.size() / 2), reference, threshold);
    });
  });

  m.def("token_compact_index", [](bool on_cuda, uintptr_t exec, py::handle keep, py::handle cu_seqlens,
                                  py::handle index, py::handle position_ids, py::handle cu_seqlens_out,
                                  py::handle count, int64_t n_rows) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor k = view(keep), i = view(index), p = view(position_ids), o = view(cu_seqlens_out), n = view(count);
    const OptionalView c(cu_seqlens);
    run([&] { return hk_token_compact_index(&e, &k, c.get(), &i, &p, &o, &n, n_rows); });
  });
  m.def("token_compact_rows",
        [](bool on_cuda, uintptr_t exec, py::handle x, py::handle index, py::handle out, int64_t fill) {
          const hk_exec e = where(on_cuda, exec);
          const hk_tensor from = view(x), i = view(index), to = view(out);
          run([&] { return hk_token_compact_rows(&e, &from, &i, &to, &fill); });
        });
  m.def("token_compact_rows_backward",
        [](bool on_cuda, uintptr_t exec, py::handle grad_out, py::handle index, py::handle grad_x) {
          const hk_exec e = where(on_cuda, exec);
          const hk_tensor from = view(grad_out), i = view(index), to = view(grad_x);
          run([&] { return hk_token_compact_rows_backward(&e, &from, &i, &to); });
        });

  m.def("layer_norm",
        [](bool on_cuda, uintptr_t exec, py::handle x, py::handle residual, py::handle weight, py::handle bias,
           py::handle y, py::handle summed, py::handle mean, py::handle rstd, double eps) {
          const hk_exec e = where(on_cuda, exec);
          const hk_tensor a = view(x), w = view(weight), b = view(bias), o = view(y), m = view(mean), r = view(rstd);
          const OptionalView c(residual), s(summed);
          run([&] { return hk_layer_norm(&e, &a, c.get(), &w, &b, &o, s.get(), &m, &r, eps); });
        });
  m.def("layer_norm_backward", [](bool on_cuda, uintptr_t exec, py::handle grad, py::handle grad_summed,
                                  py::handle summed, py::handle weight, py::handle mean, py::handle rstd,
                                  py::handle grad_x, py::handle grad_weight, py::handle grad_bias, py::handle partial) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor g = view(grad), s = view(summed), w = view(weight), m = view(mean), r = view(rstd);
    const hk_tensor gx = view(grad_x), gw = view(grad_weight), gb = view(grad_bias), p = view(partial);
    const OptionalView gs(grad_summed);
    run([&] { return hk_layer_norm_backward(&e, &g, gs.get(), &s, &w, &m, &r, &gx, &gw, &gb, &p); });
  });

  m.def("bias_gelu", [](bool on_cuda, uintptr_t exec, py::handle x, py::handle bias, py::handle out, int gelu) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor a = view(x), o = view(out);
    const OptionalView b(bias);
    run([&] { return hk_bias_gelu(&e, &a, b.get(), &o, gelu); });
  });
  m.def("bias_gelu_backward", [](bool on_cuda, uintptr_t exec, py::handle grad, py::handle x, py::handle bias,
                                 py::handle grad_x, py::handle grad_bias, py::handle partial, int gelu) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor g = view(grad), a = view(x), gx = view(grad_x);
    const OptionalView b(bias), gb(grad_bias), p(partial);
    run([&] { return hk_bias_gelu_backward(&e, &g, &a, b.get(), &gx, gb.get(), p.get(), gelu); });
  });

  m.def("spatial_merge", [](bool on_cuda, uintptr_t exec, py::handle x, py::handle weight, py::handle bias,
                            py::handle keep, py::handle out, py::handle mean, py::handle rstd, int merge_size,
                            double eps) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor a = view(x), o = view(out);
    const OptionalView w(weight), b(bias), k(keep), m(mean), r(rstd);
    run([&] { return hk_spatial_merge(&e, &a, w.get(), b.get(), k.get(), &o, m.get(), r.get(), merge_size, eps); });
  });
  m.def("spatial_merge_backward", [](bool on_cuda, uintptr_t exec, py::handle grad, py::handle x, py::handle weight,
                                     py::handle keep, py::handle mean, py::handle rstd, py::handle grad_x,
                                     py::handle grad_weight, py::handle grad_bias, py::handle partial, int merge_size) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor g = view(grad), a = view(x), gx = view(grad_x);
    const OptionalView w(weight), k(keep), m(mean), r(rstd), gw(grad_weight), gb(grad_bias), p(partial);
    run([&] {
      return hk_spatial_merge_backward(&e, &g, &a, w.get(), k.get(), m.get(), r.get(), &gx, gw.get(), gb.get(), p.get(),
                                       merge_size);
    });
  });

  m.def("rope_attention",
        [](bool on_cuda, uintptr_t exec, py::handle q, py::handle k, py::handle v, py::handle positions_q,
           py::handle positions_k, py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle out, py::handle lse,
           py::handle k_rotated, const std::vector<int32_t>& sections, double theta, double scale) {
          const hk_exec e = where(on_cuda, exec);
          const hk_tensor a = view(q), b = view(k), c = view(v), o = view(out), l = view(lse);
          const hk_tensor pq = view(positions_q), pk = view(positions_k);
          const hk_tensor eq = view(cu_seqlens_q), ek = view(cu_seqlens_k);
          const OptionalView kr(k_rotated);
          const hk_rope rope = rope_of(sections, theta);
          run([&] { return hk_rope_attention(&e, &a, &b, &c, &pq, &pk, &eq, &ek, &o, &l, kr.get(), &rope, scale); });
        });
  m.def(
      "rope_attention_backward",
      [](bool on_cuda, uintptr_t exec, py::handle grad, py::handle q, py::handle k, py::handle v, py::handle out,
         py::handle lse, py::handle positions_q, py::handle positions_k, py::handle cu_seqlens_q,
         py::handle cu_seqlens_k, py::handle grad_q, py::handle grad_k, py::handle grad_v, py::handle delta,
         py::handle q_rotated, py::handle k_rotated, const std::vector<int32_t>& sections, double theta, double scale) {
        const hk_exec e = where(on_cuda, exec);
        const hk_tensor g = view(grad), a = view(q), b = view(k), c = view(v), o = view(out), l = view(lse);
        const hk_tensor pq = view(positions_q), pk = view(positions_k);
        const hk_tensor eq = view(cu_seqlens_q), ek = view(cu_seqlens_k);
        const hk_tensor gq = view(grad_q), gk = view(grad_k), gv = view(grad_v), d = view(delta);
        const OptionalView qr(q_rotated), kr(k_rotated);
        const hk_rope rope = rope_of(sections, theta);
        run([&] {
          return hk_rope_attention_backward(&e, &g, &a, &b, &c, &o, &l, &pq, &pk, &eq, &ek, &gq, &gk, &gv, &d, qr.get(),
                                            kr.get(), &rope, scale);
        });
      });
  m.def("rope_attention_rotate", [](bool on_cuda, uintptr_t exec, py::handle x, py::handle positions, py::handle out,
                                    const std::vector<int32_t>& sections, double theta, bool inverse) {
    const hk_exec e = where(on_cuda, exec);
    const hk_tensor a = view(x), p = view(positions), o = view(out);
    const hk_rope rope = rope_of(sections, theta);
    run([&] { return hk_rope_attention_rotate(&e, &a, &p, &o, &rope, inverse); });
  });
}
