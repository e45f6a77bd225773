// token_compact: the C ABI. Checks, of values only where they lie on the host, then the kernels.
#include "ops/token_compact/token_compact.h"

#include "cpu/status.h"

namespace hk {

static int check_i64(const char* op, const char* name, const hk_tensor* t) {
  HK_RETURN_IF_ERROR(check_tensor(op, name, t, 1));
  HK_REQUIRE(t->dtype == HK_I64, "%s: %s has dtype %s, expected i64", op, name, dtype_name(t->dtype));
  return check_dense(op, name, t, 1);
}

static int check_cu_seqlens(const char* op, const char* name, const hk_tensor* t) {
  HK_RETURN_IF_ERROR(check_tensor(op, name, t, 1));
  HK_REQUIRE(t->dtype == HK_I32, "%s: %s has dtype %s, expected i32", op, name, dtype_name(t->dtype));
  HK_REQUIRE(t->shape[0] >= 1, "%s: %s has 0 entries, expected S+1", op, name);
  return check_dense(op, name, t, 1);
}

// Rows may be any distance apart, but each is dense: one memcpy.
static int check_rows(const char* op, const char* name, const hk_tensor* t, int64_t* row_bytes) {
  HK_REQUIRE(t != nullptr, "%s: %s is NULL, expected a tensor", op, name);
  HK_REQUIRE(t->ndim >= 1, "%s: %s has 0 dimensions, expected at least 1", op, name);
  HK_RETURN_IF_ERROR(check_tensor(op, name, t, t->ndim));
  HK_RETURN_IF_ERROR(check_dense(op, name, t, t->ndim - 1));
  *row_bytes = dtype_size(t->dtype);
  for (int d = 1; d < t->ndim; ++d) *row_bytes *= t->shape[d];
  return HK_OK;
}

static int copy_rows(const char* op, const hk_exec* exec, const hk_tensor* from, const char* from_name,
                     const hk_tensor* to, const char* to_name, const hk_tensor* index, bool gather,
                     const int64_t* fill) {
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_i64(op, "index", index));
  int64_t from_bytes = 0, to_bytes = 0;
  HK_RETURN_IF_ERROR(check_rows(op, from_name, from, &from_bytes));
  HK_RETURN_IF_ERROR(check_rows(op, to_name, to, &to_bytes));
  HK_REQUIRE(from->dtype == to->dtype, "%s: %s has dtype %s, expected %s as %s", op, to_name, dtype_name(to->dtype),
             dtype_name(from->dtype), from_name);
  HK_REQUIRE(from_bytes == to_bytes, "%s: %s has rows of %lld bytes, expected %lld as %s", op, to_name,
             (long long)to_bytes, (long long)from_bytes, from_name);
  const hk_tensor* compact = gather ? to : from;
  HK_RETURN_IF_ERROR(check_shape(op, gather ? to_name : from_name, compact, 0, index->shape[0], "B"));
  const int64_t* rows = static_cast<const int64_t*>(index->data);
  const int64_t n = (gather ? from : to)->shape[0];
  for (int64_t b = 0; values_on_host(exec) && b < index->shape[0]; ++b)
    HK_REQUIRE(rows[b] >= -1 && rows[b] < n, "%s: index has value %lld at %lld, expected -1 or below N=%lld", op,
               (long long)rows[b], (long long)b, (long long)n);
  const int64_t size = dtype_size(from->dtype);
  TokenCompactRowsArgs args = {static_cast<const char*>(from->data),
                               static_cast<char*>(to->data),
                               rows,
                               index->shape[0],
                               from_bytes,
                               from->stride[0] * size,
                               to->stride[0] * size,
                               gather ? 0 : to->shape[0],
                               gather,
                               threads_for(exec, (gather ? index->shape[0] : n) * from_bytes),
                               fill,
                               from->dtype};
  if (from_bytes == 0) return HK_OK;
  return HK_DISPATCH(token_compact_rows, args);
}

}  // namespace hk

using namespace hk;

extern "C" int hk_token_compact_index(const hk_exec* exec, const hk_tensor* keep, const hk_tensor* cu_seqlens,
                                      const hk_tensor* index, const hk_tensor* position_ids,
                                      const hk_tensor* cu_seqlens_out, const hk_tensor* count, int64_t n_rows) {
  const char* op = "token_compact";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "keep", keep, 1));
  HK_REQUIRE(keep->dtype == HK_U8 || keep->dtype == HK_I64, "%s: keep has dtype %s, expected u8 (mask) or i64 (rows)",
             op, dtype_name(keep->dtype));
  HK_RETURN_IF_ERROR(check_dense(op, "keep", keep, 1));
  const bool is_mask = keep->dtype == HK_U8;
  if (is_mask) HK_RETURN_IF_ERROR(check_shape(op, "keep", keep, 0, n_rows, "N"));
  HK_REQUIRE(n_rows >= 0 && n_rows <= INT32_MAX, "%s: n_rows has value %lld, expected 0 to 2^31 - 1", op,
             (long long)n_rows);
  const int32_t one_sequence[] = {0, static_cast<int32_t>(n_rows)};
  const hk_tensor whole = {const_cast<int32_t*>(one_sequence), HK_I32, 1, {2}, {1}};
  const bool on_host = values_on_host(exec), one = cu_seqlens == nullptr;
  if (one) cu_seqlens = &whole;
  HK_RETURN_IF_ERROR(check_cu_seqlens(op, "cu_seqlens", cu_seqlens));
  HK_RETURN_IF_ERROR(check_cu_seqlens(op, "cu_seqlens_out", cu_seqlens_out));
  HK_RETURN_IF_ERROR(check_shape(op, "cu_seqlens_out", cu_seqlens_out, 0, cu_seqlens->shape[0], "S+1"));
  HK_RETURN_IF_ERROR(check_i64(op, "index", index));
  HK_RETURN_IF_ERROR(check_i64(op, "position_ids", position_ids));
  HK_RETURN_IF_ERROR(check_shape(op, "position_ids", position_ids, 0, index->shape[0], "B"));
  HK_RETURN_IF_ERROR(check_i64(op, "count", count));
  HK_RETURN_IF_ERROR(check_shape(op, "count", count, 0, 1, "1"));

  const int32_t* ends = static_cast<const int32_t*>(cu_seqlens->data);
  const int64_t S = cu_seqlens->shape[0] - 1;
  HK_REQUIRE(!on_host || (ends[0] == 0 && ends[S] == n_rows), "%s: cu_seqlens has ends %d .. %d, expected 0 .. N=%lld",
             op, ends[0], ends[S], (long long)n_rows);
  for (int64_t s = 0; on_host && s < S; ++s)
    HK_REQUIRE(ends[s] <= ends[s + 1], "%s: cu_seqlens has %d before %d, expected it never to fall", op, ends[s],
               ends[s + 1]);
  const int64_t* rows = static_cast<const int64_t*>(keep->data);
  for (int64_t i = 0; on_host && !is_mask && i < keep->shape[0]; ++i)
    HK_REQUIRE(rows[i] >= (i ? rows[i - 1] + 1 : 0) && rows[i] < n_rows,
               "%s: keep has row %lld at %lld, expected strictly increasing rows below N=%lld", op, (long long)rows[i],
               (long long)i, (long long)n_rows);

  TokenCompactIndexArgs args = {is_mask ? static_cast<const uint8_t*>(keep->data) : nullptr,
                                is_mask ? nullptr : rows,
                                n_rows,
                                is_mask ? 0 : keep->shape[0],
                                exec->device == HK_CPU || !one ? ends : nullptr,
                                S,
                                static_cast<int64_t*>(index->data),
                                static_cast<int64_t*>(position_ids->data),
                                index->shape[0],
                                static_cast<int32_t*>(cu_seqlens_out->data),
                                static_cast<int64_t*>(count->data),
                                is_mask};
  return HK_DISPATCH(token_compact_index, args);
}

extern "C" int hk_token_compact_rows(const hk_exec* exec, const hk_tensor* x, const hk_tensor* index,
                                     const hk_tensor* out, const int64_t* fill) {
  return copy_rows("token_compact", exec, x, "x", out, "out", index, true, fill);
}

extern "C" int hk_token_compact_rows_backward(const hk_exec* exec, const hk_tensor* grad_out, const hk_tensor* index,
                                              const hk_tensor* grad_x) {
  return copy_rows("token_compact_backward", exec, grad_out, "grad_out", grad_x, "grad_x", index, false, nullptr);
}
