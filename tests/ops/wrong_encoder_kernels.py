"""Wrong kernels of the encoder's ops; see wrong_kernels.py."""

from __future__ import annotations

from typing import Any

import torch

from hulukern.ops.bias_gelu import reference as bias_gelu
from hulukern.ops.layer_norm import reference as layer_norm
from hulukern.ops.rope_attention import reference as rope_attention
from hulukern.ops.spatial_merge import reference as spatial_merge

# --- rope_attention ---------------------------------------------------------------------------------------


def attention_without_rotary(q: Any, k: Any, v: Any, pq: Any, pk: Any, *rest: Any) -> Any:
    return rope_attention.rope_attention(q, k, v, pq * 0, pk * 0, *rest)


def attention_swaps_axes(q: Any, k: Any, v: Any, pq: Any, pk: Any, *rest: Any) -> Any:
    return rope_attention.rope_attention(q, k, v, pq.flip(1), pk.flip(1), *rest)


def attention_rotates_neighbours(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """Pairs (2i, 2i+1), as language models of another family do."""

    def interleaved(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., ::2], x[..., 1::2]], -1)

    return rope_attention.rope_attention(interleaved(q), interleaved(k), v, *rest)


def attention_across_sequences(q: Any, k: Any, v: Any, pq: Any, pk: Any, _cq: Any, _ck: Any, *rest: Any) -> Any:
    whole_q = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    whole_k = torch.tensor([0, k.shape[0]], dtype=torch.int32)
    return rope_attention.rope_attention(q, k, v, pq, pk, whole_q, whole_k, *rest)


def attention_is_causal(q: Any, k: Any, v: Any, pq: Any, pk: Any, cq: Any, ck: Any, *rest: Any) -> Any:
    out, lse = rope_attention.rope_attention(q, k, v, pq, pk, cq, ck, *rest)
    out = out.clone()
    for s in range(cq.numel() - 1):
        if cq[s] < cq[s + 1] and ck[s] < ck[s + 1]:
            out[cq[s]] = v[ck[s]]
    return out, lse


def attention_drops_the_last_key_tile(q: Any, k: Any, v: Any, pq: Any, pk: Any, cq: Any, ck: Any, *rest: Any) -> Any:
    """The ragged tail of 64 keys never enters."""
    outs, lses = [], []
    for s in range(cq.numel() - 1):
        n = int(ck[s + 1] - ck[s])
        keep = slice(int(ck[s]), int(ck[s]) + (n if n < 64 else n // 64 * 64))
        rows = slice(int(cq[s]), int(cq[s + 1]))
        ends_q = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        ends_k = torch.tensor([0, keep.stop - keep.start], dtype=torch.int32)
        out, lse = rope_attention.rope_attention(q[rows], k[keep], v[keep], pq[rows], pk[keep], ends_q, ends_k, *rest)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return rope_attention.rope_attention(q, k, v, pq, pk, cq, ck, *rest)
    return torch.cat(outs), torch.cat(lses, 1)


def attention_forgets_the_scale(*a: Any) -> Any:
    return rope_attention.rope_attention(*a[:-1], 1.0)


def attention_lse_in_base_2(*a: Any) -> Any:
    out, lse = rope_attention.rope_attention(*a)
    return out, lse * 1.4426950408889634


def attention_pads_the_head_with_garbage(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """A tile of 128 whose tail was not masked: the last dimensions count twice."""
    q = q.clone()
    q[..., -1] *= 2
    return rope_attention.rope_attention(q, k, v, *rest)


def attention_backward_without_delta(grad: Any, q: Any, k: Any, v: Any, out: Any, *rest: Any) -> Any:
    return rope_attention.rope_attention_backward(grad, q, k, v, torch.zeros_like(out), *rest)


def attention_backward_leaves_gradients_rotated(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, pq: Any, pk: Any, cq: Any, ck: Any, sections: Any,
    theta: float, scale: float,
) -> Any:  # fmt: skip
    gq, gk, gv = rope_attention.rope_attention_backward(grad, q, k, v, out, lse, pq, pk, cq, ck, sections, theta, scale)
    return rope_attention.rope_attention_rotate(gq, pq, sections, theta, False), gk, gv


def attention_backward_forgets_the_scale(*a: Any) -> Any:
    gq, gk, gv = rope_attention.rope_attention_backward(*a)
    return gq / a[-1], gk / a[-1], gv


def attention_backward_swaps_k_and_v(*a: Any) -> Any:
    gq, gk, gv = rope_attention.rope_attention_backward(*a)
    return gq, gv, gk


def rotate_ignores_inverse(x: Any, positions: Any, sections: Any, theta: float, _inverse: bool) -> Any:
    return rope_attention.rope_attention_rotate(x, positions, sections, theta, False)


def rotate_frequencies_over_the_whole_head(
    x: Any, positions: Any, sections: list[int], theta: float, inverse: bool
) -> Any:
    """Exponents i / (D/2) instead of starting anew for each axis."""
    n = sum(sections)
    columns, at = [], 0
    for axis, size in enumerate(sections):
        i = torch.arange(size)
        columns.append(positions[:, axis, None] * theta ** (i / size) / theta ** ((at + i) / n))
        at += size
    fixed = torch.cat(columns, 1)
    a = (fixed / theta ** (torch.cat([torch.arange(s) / s for s in sections])))[:, None].to(x.dtype)
    first, second = x.chunk(2, -1)
    sin = -a.sin() if inverse else a.sin()
    return torch.cat([first * a.cos() - second * sin, second * a.cos() + first * sin], -1).to(x.dtype)


# --- layer_norm -------------------------------------------------------------------------------------------


def norm_ignores_the_residual(x: Any, residual: Any, *rest: Any) -> Any:
    y, _, mean, rstd = layer_norm.layer_norm(x, None, *rest)
    return y, x.new_empty(0) if residual is None else x.clone(), mean, rstd


def norm_variance_by_difference_of_squares(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    """E[x^2] - E[x]^2 in fp32 cancels where the mean is far from zero."""
    _, out, mean, _ = layer_norm.layer_norm(x, residual, weight, bias, eps)
    rows = (x if residual is None else out).float()
    rstd = ((rows * rows).mean(-1) - rows.mean(-1) ** 2 + eps).rsqrt()
    y = (rows - rows.mean(-1, keepdim=True)) * rstd[:, None] * weight.float() + bias.float()
    return y.to(x.dtype), out, mean, rstd


def norm_divides_by_n_minus_1(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    E = x.shape[1]
    y, out, mean, rstd = layer_norm.layer_norm(x, residual, weight, bias, eps)
    ratio = ((E - 1) / E) ** 0.5
    return ((y - bias) * ratio + bias).to(x.dtype), out, mean, rstd * ratio


def norm_backward_ignores_grad_summed(grad: Any, _grad_summed: Any, *rest: Any) -> Any:
    return layer_norm.layer_norm_backward(grad, None, *rest)


def norm_backward_misses_a_mean(grad: Any, grad_summed: Any, summed: Any, weight: Any, mean: Any, rstd: Any) -> Any:
    _, gw, gb = layer_norm.layer_norm_backward(grad, grad_summed, summed, weight, mean, rstd)
    g = grad.float() * weight.float()
    normed = (summed.float() - mean[:, None]) * rstd[:, None]
    grad_x = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return (grad_x + (0 if grad_summed is None else grad_summed.float())).to(summed.dtype), gw, gb


def norm_backward_weight_from_the_first_rows(*a: Any) -> Any:
    gx, _, gb = layer_norm.layer_norm_backward(*a)
    half = max(a[0].shape[0] - 1, 0)
    cut = [x if x is None or i == 3 else x[:half] for i, x in enumerate(a)]
    return gx, layer_norm.layer_norm_backward(*cut)[1], gb


# --- bias_gelu --------------------------------------------------------------------------------------------


def gelu_without_bias(x: Any, _bias: Any, approximate: str) -> Any:
    return bias_gelu.bias_gelu(x, None, approximate)


def gelu_always_erf(x: Any, bias: Any, _approximate: str) -> Any:
    return bias_gelu.bias_gelu(x, bias, "none")


def gelu_tanh_by_exponentials_overflows(x: Any, bias: Any, approximate: str) -> Any:
    """(e^2z - 1) / (e^2z + 1) is NaN for large z."""
    if approximate != "tanh":
        return bias_gelu.bias_gelu(x, bias, approximate)
    u = x.float() if bias is None else x.float() + bias.float()
    e = torch.exp(2 * bias_gelu.SQRT_2_OVER_PI * (u + bias_gelu.CUBIC * u**3))
    return (0.5 * u * (1 + (e - 1) / (e + 1))).to(x.dtype)


def gelu_sigmoid_form(x: Any, bias: Any, _approximate: str) -> Any:
    u = x.float() if bias is None else x.float() + bias.float()
    return (u * torch.sigmoid(1.702 * u)).to(x.dtype)


def gelu_backward_of_the_other_form(grad: Any, x: Any, bias: Any, approximate: str) -> Any:
    return bias_gelu.bias_gelu_backward(grad, x, bias, "none" if approximate == "tanh" else "tanh")


def gelu_backward_without_bias(grad: Any, x: Any, bias: Any, approximate: str) -> Any:
    gx, _ = bias_gelu.bias_gelu_backward(grad, x, None, approximate)
    return gx, gx.new_empty(0) if bias is None else gx.sum(0)


# --- spatial_merge ----------------------------------------------------------------------------------------


def merge_raster_order(x: Any, weight: Any, bias: Any, keep: Any, M: int, eps: float) -> Any:
    """Rows that are not a cell's own."""
    rolled = x.roll(1, 0) if M > 1 else x.flip(0)
    return spatial_merge.spatial_merge(rolled, weight, bias, keep, M, eps)


def merge_sums(*a: Any) -> Any:
    merged, mean, rstd = spatial_merge.spatial_merge(*a)
    return merged * a[4] ** 2, mean, rstd


def merge_norm_after_the_mean(x: Any, weight: Any, bias: Any, keep: Any, M: int, eps: float) -> Any:
    merged, mean, rstd = spatial_merge.spatial_merge(x, weight, bias, keep, M, eps)
    if weight is None:
        return merged, mean, rstd
    plain, _, _ = spatial_merge.spatial_merge(x, None, None, keep, M, eps)
    normed = torch.nn.functional.layer_norm(plain.float(), plain.shape[-1:], weight.float(), bias.float(), eps)
    return normed.to(x.dtype), mean, rstd


def merge_keeps_the_first(x: Any, weight: Any, bias: Any, keep: Any, M: int, eps: float) -> Any:
    """K cells, but not those asked for."""
    first = None if keep is None else torch.arange(keep.numel())
    return spatial_merge.spatial_merge(x, weight, bias, first, M, eps)


def merge_backward_leaves_dropped_rows(grad: Any, x: Any, weight: Any, keep: Any, *rest: Any) -> Any:
    gx, gw, gb = spatial_merge.spatial_merge_backward(grad, x, weight, keep, *rest)
    if keep is not None:
        M = rest[-1]
        dropped = torch.ones(x.shape[0] // M**2, dtype=torch.bool)
        dropped[keep] = False
        gx.view(-1, M**2, x.shape[1])[dropped] = float("nan")
    return gx, gw, gb


def merge_backward_does_not_divide(*a: Any) -> Any:
    gx, gw, gb = spatial_merge.spatial_merge_backward(*a)
    return gx * a[-1] ** 2, gw, gb


BY_OP = {
    "rope_attention": (
        attention_without_rotary,
        attention_swaps_axes,
        attention_rotates_neighbours,
        attention_across_sequences,
        attention_is_causal,
        attention_drops_the_last_key_tile,
        attention_forgets_the_scale,
        attention_lse_in_base_2,
        attention_pads_the_head_with_garbage,
    ),
    "rope_attention_backward": (
        attention_backward_without_delta,
        attention_backward_leaves_gradients_rotated,
        attention_backward_forgets_the_scale,
        attention_backward_swaps_k_and_v,
    ),
    "rope_attention_rotate": (rotate_ignores_inverse, rotate_frequencies_over_the_whole_head),
    "layer_norm": (
        norm_ignores_the_residual,
        norm_variance_by_difference_of_squares,
        norm_divides_by_n_minus_1,
    ),
    "layer_norm_backward": (
        norm_backward_ignores_grad_summed,
        norm_backward_misses_a_mean,
        norm_backward_weight_from_the_first_rows,
    ),
    "bias_gelu": (
        gelu_without_bias,
        gelu_always_erf,
        gelu_tanh_by_exponentials_overflows,
        gelu_sigmoid_form,
    ),
    "bias_gelu_backward": (gelu_backward_of_the_other_form, gelu_backward_without_bias),
    "spatial_merge": (merge_raster_order, merge_sums, merge_norm_after_the_mean, merge_keeps_the_first),
    "spatial_merge_backward": (merge_backward_leaves_dropped_rows, merge_backward_does_not_divide),
}
