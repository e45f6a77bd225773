"""The package as a whole: what importing costs and touches, env report, C ABI, CPU levels, dispatch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import hulukern
from hulukern.backends import holds_code_for, on_its_device
from hulukern.env import openmp_libraries, report
from hulukern.testing import harness

PACKAGE = Path(hulukern.__file__).parent


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_heavy_package_and_no_kernels() -> None:
    loaded = json.loads(run_python("import torch, hulukern, sys, json; print(json.dumps(list(sys.modules)))"))
    assert not {"triton", "transformers", "cupy", "matplotlib", "hulukern._C"} & set(loaded)


def test_one_openmp_runtime_is_shared_or_the_second_is_told_its_threads() -> None:
    """On torch's CPU wheel the two share one libgomp; elsewhere every region names its thread count."""
    hulukern.token_score_frames(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), backend="cpu")
    gomp = [p for p in openmp_libraries() if "libgomp" in p]
    assert len(gomp) <= 1, gomp
    for path in (Path(__file__).parents[1] / "csrc").rglob("*_cpu.cpp"):
        text = path.read_text()
        assert text.count("#pragma omp parallel") == text.count("num_threads("), path


def test_env_report_says_why_a_backend_does_not_work() -> None:
    data = report()
    assert set(data["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert data["backends"]["cpu"] == "works"
    assert all(data["backends"].values())
    text = subprocess.run([sys.executable, "-m", "hulukern.env"], capture_output=True, text=True, check=True).stdout
    assert "token_score" in text
    assert torch.__version__ in text
    assert json.loads(run_python("import hulukern.env, sys; hulukern.env.main(['--json'])"))["backends"]


LEVEL_PROBE = """
import hashlib, json, torch, hulukern
import torch.utils._pytree as pytree
from hulukern import _C
from hulukern.ops.patch_embed.native import patch_embed_resize
from hulukern.testing import harness
def sample(*a):  # what torch computes for it does depend on the number of threads
    torch.set_num_threads(1)
    arguments = harness.sample(*a)
    torch.set_num_threads({threads})
    return arguments
digests = {{}}
for op in (o.spec for o in hulukern.OPS.values()):
    if "cpu" not in op.backends or op.name in ("patch_embed", "patch_embed_frames"):
        continue  # no kernel, or the product is torch's
    digest = hashlib.sha256()
    for case in op.cases:
        for dtype in op.dtypes:
            for y in pytree.tree_leaves(harness.call(op, sample(op, case, dtype, "cpu"), "cpu")):
                digest.update(y.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digests[op.name] = digest.hexdigest()
frames = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
digest = hashlib.sha256()
for y in hulukern.patch_embed_cut(frames, dtype=torch.bfloat16, with_scores=True, backend="cpu"):
    digest.update(y.view(-1).view(torch.uint8).numpy().tobytes())
digests["frames"] = digest.hexdigest()
resized = [patch_embed_resize(x, 150, 210) for x in (frames, frames[..., :1])]
digests["resize"] = hashlib.sha256(b"".join(x.numpy().tobytes() for x in resized)).hexdigest()
print(json.dumps([_C.cpu_level(), digests]))
"""
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
# Their products are fused multiply-adds, or products of bf16, where the level has them, and GELU has a reciprocal of
# 14 bits: a level's own bits, held to the harness's tolerance like every backend (`make test-levels`).
PER_LEVEL = ("rope_attention", "rope_attention_backward", "bias_gelu", "bias_gelu_backward")


def test_the_bits_depend_on_no_thread_count_and_but_for_fused_products_on_no_level() -> None:
    best, expected = json.loads(run_python(LEVEL_PROBE.format(threads=2)))
    for level in LEVELS[: LEVELS.index(best) + 1]:
        found = []
        for threads in (1, 3):
            got, digests = json.loads(run_python(LEVEL_PROBE.format(threads=threads), HULUKERN_CPU_LEVEL=level))
            assert got == level
            found.append(digests)
        assert found[0] == found[1], level
        for name, digest in found[0].items():
            assert digest == expected[name] or name in PER_LEVEL, f"{name} at {level}"


def test_an_unknown_cpu_level_is_refused_with_the_reason() -> None:
    code = (
        "import torch, hulukern\n"
        "try: hulukern.token_score_frames(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), backend='cpu')\n"
        "except hulukern.BackendUnavailable as e: print(e)"
    )
    assert 'HULUKERN_CPU_LEVEL has "sse9", expected baseline' in run_python(code, HULUKERN_CPU_LEVEL="sse9")


def test_the_library_is_callable_from_c() -> None:
    """ctypes knows neither torch nor Python's C API: a float compaction and a refused call."""
    library = ctypes.CDLL(str(PACKAGE / "lib" / "libhulukern.so"))

    class Tensor(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("ndim", ctypes.c_int32),
            ("shape", ctypes.c_int64 * 5), ("stride", ctypes.c_int64 * 5),
        ]  # fmt: skip

    class Exec(ctypes.Structure):
        _fields_ = [("device", ctypes.c_int32), ("num_threads", ctypes.c_int32), ("stream", ctypes.c_void_p)]

    def view(buffer: ctypes.Array, dtype: int, *shape: int) -> Tensor:  # type: ignore[type-arg]
        t = Tensor(ctypes.cast(buffer, ctypes.c_void_p), dtype, len(shape))
        stride = 1
        for d in reversed(range(len(shape))):
            t.shape[d], t.stride[d] = shape[d], stride
            stride *= shape[d]
        return t

    x, out = (ctypes.c_float * 6)(0, 1, 2, 3, 4, 5), (ctypes.c_float * 4)()
    index = (ctypes.c_int64 * 2)(0, 2)
    where = Exec(0, 1, None)
    views = [view(x, 6, 3, 2), view(index, 3, 2), view(out, 6, 2, 2)]
    assert library.hk_token_compact_rows(ctypes.byref(where), *map(ctypes.byref, views)) == 0
    assert list(out) == [0, 1, 4, 5]
    index[1] = 3
    assert library.hk_token_compact_rows(ctypes.byref(where), *map(ctypes.byref, views)) == 1
    library.hk_last_error.restype = ctypes.c_char_p
    assert library.hk_last_error() == b"token_compact: index has value 3 at 1, expected -1 or below N=3"


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_watches_the_dispatcher_sees_every_call() -> None:
    """The short cut for plain calls must not hide ops from modes, profilers, fake tensors or autograd."""
    frames = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8)
    for _ in range(2):
        hulukern.token_score_frames(frames)  # now the short cut is open
    with _Seen() as seen:
        hulukern.token_score_frames(frames)
    assert "hulukern.token_score_frames.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        hulukern.token_score_frames(frames)
    assert "hulukern::token_score_frames" in [event.key for event in profile.key_averages()]
    with torch._subclasses.FakeTensorMode() as mode:
        assert hulukern.token_score_frames(mode.from_tensor(frames)).shape == (3,)
    weight = torch.randn(8, 588, requires_grad=True)
    patches = torch.randn(4, 588)
    with torch.no_grad():
        for _ in range(2):
            assert not hulukern.patch_embed(patches, weight).requires_grad
    assert hulukern.patch_embed(patches, weight).requires_grad


def test_a_negated_view_is_resolved_at_every_call() -> None:
    x, bias = torch.randn(4, 16), torch.randn(16)
    negated = torch._neg_view(x)  # as z.conj().imag, but dense: nothing copies it on the way
    expected = hulukern.bias_gelu(-x, bias)
    for _ in range(3):
        assert torch.equal(hulukern.bias_gelu(negated, bias), expected)


def _forward_ad(f, x: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize(
    "derive",
    [
        _forward_ad,
        lambda f, x: _forward_ad(f, x.requires_grad_()),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jvp(torch.vmap(f), (x[None],), (x[None],)),
        lambda f, x: torch.func.jacfwd(f)(x),
    ],
    ids=["dual", "dual_with_grad", "jvp", "jvp_of_vmap", "jacfwd"],
)
def test_tangents_are_refused_instead_of_dropped(derive) -> None:  # type: ignore[no-untyped-def]
    x, other = torch.randn(4, 16), torch.randn(4, 16)
    hulukern.bias_gelu(x)
    with pytest.raises(NotImplementedError, match="bias_gelu: x has a tangent, expected none: forward-mode"):
        derive(hulukern.bias_gelu, x)
    with forward_ad.dual_level():
        hulukern.bias_gelu(other)  # carries none


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["rope_attention", "rope_attention_backward", "patch_embed", "patch_embed_frames"])
def test_autocast_changes_no_result(name: str, backend: str) -> None:
    spec = hulukern.OPS[name].spec
    arguments = harness.sample(spec, spec.cases[0], torch.float32, "cpu")

    def results() -> list[torch.Tensor]:
        found = harness.call(spec, arguments, backend)
        leaves = [arguments[n].requires_grad_() for n in ("weight", "bias") if n in arguments]
        if not leaves:
            return list(found)
        y = harness.call(spec, arguments, backend)
        y = y if isinstance(y, torch.Tensor) else y[0]
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", ["rope_attention", "rope_attention_backward", "patch_embed", "patch_embed_frames"])
def test_what_the_interpreter_computes_wrongly_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = hulukern.OPS[name]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(op.implementations, "triton", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(op, "_resolved", {})
    arguments = harness.sample(op.spec, op.spec.cases[0], torch.bfloat16, "cpu")
    with pytest.raises(hulukern.BackendUnavailable, match=f"{name}: backend 'triton' cannot run bfloat16: Triton's"):
        harness.call(op.spec, arguments, "triton")


@pytest.mark.parametrize(("backend", "D"), [("triton", 48), ("cuda", 48), ("cpu", 260)])
@pytest.mark.parametrize("name", ["rope_attention", "rope_attention_rotate"])
def test_head_dims_that_a_backend_lacks_are_named(
    name: str, backend: str, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = hulukern.OPS[name]
    monkeypatch.setattr(op, "backend", lambda *_: pytest.fail)  # whatever can run here
    monkeypatch.setattr(op, "_resolved", {})
    x, positions = torch.zeros(3, 1, D), torch.zeros(3, 2, dtype=torch.int32)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    arguments = (x, positions) if name.endswith("rotate") else (x, x, x, positions, ends)
    with pytest.raises(ValueError, match=rf"{name}: [qx] has D={D}, expected .* for backend '{backend}'"):
        getattr(hulukern, name)(*arguments, backend=backend)


@pytest.mark.parametrize("merge_size", [np.int64(2), np.int32(2)])
def test_numbers_of_numpy_are_taken(merge_size: int) -> None:
    x = torch.randn(8, 12)
    for _ in range(2):
        assert torch.equal(hulukern.spatial_merge(x, merge_size=merge_size), hulukern.spatial_merge(x))
        scores = hulukern.token_score(x, [(2, 2, 2)], merge_size=merge_size, threshold=np.float32(1))  # type: ignore[arg-type]
        assert torch.equal(scores, hulukern.token_score(x, [(2, 2, 2)], threshold=1))


def test_what_equals_a_seen_option_is_still_refused() -> None:
    x, frames = torch.randn(8, 12), torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
    for _ in range(2):
        hulukern.spatial_merge(x, merge_size=2)
        with pytest.raises(TypeError, match=r"spatial_merge: merge_size has value 2\.0, expected an int"):
            hulukern.spatial_merge(x, merge_size=2.0)  # type: ignore[arg-type]
        hulukern.patch_embed_frames(frames, torch.zeros(1, 588), patch_size=14, merge_size=1)
        with pytest.raises(TypeError, match=r"patch_embed_frames: patch_size has value 14\.0, expected an int"):
            hulukern.patch_embed_frames(frames, torch.zeros(1, 588), patch_size=14.0, merge_size=1)  # type: ignore[arg-type]


def test_rows_of_no_values_keep_their_shape() -> None:
    assert hulukern.bias_gelu(torch.randn(2, 4, 0)).shape == (2, 4, 0)


def test_new_values_under_the_same_shapes_are_still_checked() -> None:
    keep = torch.tensor([0, 2])
    rows = torch.randn(3, 2)
    hulukern.token_compact(keep, rows, backend="cpu")
    keep[1] = 3
    with pytest.raises(ValueError, match="token_compact: keep has row 3 at 1, expected strictly increasing rows below"):
        hulukern.token_compact(keep, rows, backend="cpu")
    ends = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens has ends 0 \.\. 2, expected 0 \.\. N=3"):
        hulukern.token_compact(torch.ones(3, dtype=torch.bool), rows, cu_seqlens=ends, backend="cpu")


@pytest.mark.parametrize("grid", [[(1, 2)], torch.zeros(2, 2), "abc"])
def test_grids_of_the_wrong_form_are_named(grid: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"grid_thw|invalid literal"):
        hulukern.token_score(torch.zeros(4, 12), grid, backend="cpu")  # type: ignore[arg-type]


def test_folding_the_normalisation_is_the_same_up_to_rounding() -> None:
    pixels = torch.randint(0, 256, (20, 588), dtype=torch.uint8)
    weight, bias = torch.randn(16, 588, dtype=torch.float64) / 24, torch.randn(16, dtype=torch.float64)
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    expected = hulukern.patch_embed(pixels, weight.float(), bias.float(), mean=mean, std=std, backend="cpu")
    folded = hulukern.fold_normalization(weight, bias, mean, std)
    got = hulukern.patch_embed(pixels, *(x.float() for x in folded), backend="cpu")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_convolution_weight_is_accepted_and_equal() -> None:
    frames = torch.randint(0, 256, (2, 28, 56, 3), dtype=torch.uint8)
    conv = torch.nn.Conv2d(3, 24, 14, 14)
    got = hulukern.patch_embed_frames(frames, conv.weight, conv.bias, merge_size=1, backend="cpu")
    x = ((frames.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, conv(x).permute(0, 2, 3, 1).reshape(-1, 24), rtol=1e-4, atol=1e-5)


def test_inductor_compiles_an_op_into_a_graph() -> None:
    op = hulukern.OPS["patch_embed_frames"].spec
    harness.check_compile(op, op.cases[0], torch.float32, "cpu", "cpu", "inductor")


def test_second_derivatives_are_refused_instead_of_wrong() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    (g,) = torch.autograd.grad(hulukern.layer_norm(x, w, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm_backward: has no derivative"):
        g.sum().backward()
    patches = torch.randn(8, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="token_score: has no derivative"):
        hulukern.token_score(patches, [(2, 2, 2)]).nan_to_num(posinf=0.0).sum().backward()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: hulukern.layer_norm([1.0], torch.ones(1), torch.ones(1)), "layer_norm: x has type list"),  # type: ignore[call-overload]
        (
            lambda: hulukern.layer_norm(torch.tensor(1.0), torch.ones(1), torch.ones(1)),
            "layer_norm: x has 0 dimensions",
        ),
        (lambda: hulukern.patch_embed(torch.ones(2, 4), None), "patch_embed: weight has type NoneType"),  # type: ignore[arg-type]
        (lambda: hulukern.patch_embed(torch.ones(2, 4), torch.ones(4)), "patch_embed: weight has shape [4]"),
        (lambda: hulukern.rope_attention(None, None, None, None, None), "rope_attention: q has type"),  # type: ignore[arg-type]
        (lambda: hulukern.token_score([[1.0]], [(1, 1, 1)]), "token_score: patches has type list"),  # type: ignore[arg-type]
        (lambda: hulukern.token_score(torch.ones(4, 3), [2, 2, 2]), "token_score: grid_thw has a row 2"),  # type: ignore[list-item]
        (lambda: hulukern.token_score(torch.ones(4, 3), [(2.9, 2, 2)]), "token_score: grid_thw has value 2.9"),  # type: ignore[list-item]
        (lambda: hulukern.token_score(torch.ones(4, 0), [(1, 2, 2)]), "token_score: patches has L=0"),
        (
            lambda: hulukern.token_score_frames(torch.zeros(1, 28, 28, 1).short(), windows=[(0.9, 2)]),  # type: ignore[list-item]
            "token_score_frames: windows has value 0.9",
        ),
        (
            lambda: hulukern.token_score_frames(torch.zeros(1, 28, 28, 1).short(), windows=[(0, 1, 2)]),  # type: ignore[list-item]
            "token_score_frames: windows has a row (0, 1, 2)",
        ),
        (lambda: hulukern.token_score_frames(torch.zeros(1, 28, 28, 0).byte()), "token_score_frames: frames has C=0"),
    ],
)
def test_what_is_no_tensor_or_no_number_is_named(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        call()


_ROWS, _ONES, _MASK = torch.ones(8, 12), torch.ones(12), torch.ones(8, dtype=torch.bool)
_FRAMES, _CT = torch.zeros(2, 28, 28, 3, dtype=torch.uint8), torch.zeros(2, 28, 28, 1, dtype=torch.int16)
_HEADS, _AT, _ENDS = torch.ones(8, 1, 64), torch.zeros(8, 2, dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32)
_CONV, _HALF = torch.ones(5, 3, 2, 2), [0.5] * 2


@pytest.mark.parametrize(
    ("name", "arguments", "options", "says"),
    [
        ("patch_embed", (_ROWS.byte(), _ROWS), {"mean": 0.5, "std": 0.5}, "mean has value 0.5, expected numbers, one"),
        ("patch_embed", (_ROWS.byte(), _ROWS), {"mean": [], "std": []}, "mean has values (), expected 1 finite"),
        ("patch_embed", (_ROWS.byte(), _CONV), {"mean": _HALF, "std": _HALF}, "mean has values (0.5, 0.5), expected 3"),
        ("patch_embed", (_ROWS, _ROWS), {"mean": 0.5, "std": 0.5}, "mean has value 0.5, expected numbers, one"),
        ("patch_embed_normalize", (_ROWS.byte(),), {"mean": None}, "mean, std has value None, expected numbers"),
        ("patch_embed_normalize", (_ROWS.byte(),), {"mean": ["x"]}, "mean has value 'x', expected a number"),
        ("patch_embed_frames", (_FRAMES, _ROWS), {"mean": []}, "weight has shape [8, 12]"),
        ("patch_embed_cut", (_FRAMES,), {"mean": []}, "mean has values (), expected 3 finite"),
        ("patch_embed_cut", (_CT,), {"window": 5}, "window has value 5, expected (lo, hi)"),
        ("patch_embed_cut", (_FRAMES,), {"with_scores": "x"}, "with_scores has value 'x', expected a bool"),
        ("patch_embed_cut", (_FRAMES,), {"dtype": "float32"}, "dtype has value 'float32', expected float32, bfloat16"),
        ("fold_normalization", (_ROWS, None), {"mean": 0.5}, "mean has value 0.5, expected numbers, one per channel"),
        ("fold_normalization", (_CONV, None), {"mean": _HALF}, "mean has 2 values, expected one per channel of weight"),
        ("layer_norm", (_ROWS, _ONES, _ONES), {"eps": "x"}, "eps has value 'x', expected a number"),
        ("layer_norm", (torch.ones(2, 4, 0), _ONES[:0], _ONES[:0]), {}, "x has E=0, expected at least 1 value a row"),
        ("bias_gelu", (_ROWS,), {"approximate": ["tanh"]}, "approximate has type list, expected a str"),
        ("bias_gelu", (_ROWS,), {"backend": 3}, "backend has value 3, expected a str"),
        ("spatial_merge", (_ROWS,), {"merge_size": "x"}, "merge_size has value 'x', expected an int"),
        ("spatial_merge", (_ROWS,), {"merge_size": [2]}, "merge_size has type list, expected an int"),
        ("token_score", (_ROWS, [(2, 2, 2)]), {"threshold": "x"}, "threshold has value 'x', expected a number"),
        ("token_score", (_ROWS, [(2, 2, 2)]), {"merge_size": 2.9}, "merge_size has value 2.9, expected an int"),
        ("token_score_frames", (_CT,), {"windows": 5}, "windows has value 5, expected rows (lo, hi)"),
        ("token_score_frames", (_CT,), {"windows": (0, 5)}, "windows has value 0, expected rows (lo, hi)"),
        ("token_score_frames", (_CT,), {"windows": [(0, float("inf"))]}, "windows has value inf, expected a whole"),
        ("token_compact", (_MASK, [_ROWS, _ROWS]), {}, "tensors[0] has type list, expected a torch.Tensor"),
        ("token_compact", (_MASK, torch.tensor(1.0)), {}, "tensors[0] has shape [], expected [N, ...]"),
        ("token_compact", (None,), {}, "keep has type NoneType, expected a torch.Tensor"),
        ("token_compact", (_MASK, _ROWS), {"fill": 5}, "fill has value 5, expected numbers, one per tensor"),
        ("token_compact", (_MASK, _ROWS), {"bound": 2.5}, "bound has value 2.5, expected an int"),
        ("rope_attention", (_HEADS,) * 3 + (_AT, _ENDS), {"sections": 18}, "sections has value 18, expected pair"),
        ("rope_attention", (_HEADS,) * 3 + (_AT, _ENDS), {"theta": "x"}, "theta has value 'x', expected a number"),
        ("rope_attention", (_HEADS[..., :0],) * 3 + (_AT, _ENDS), {}, "q has D=0, expected at least 2"),
        ("rope_attention_rotate", (_HEADS[..., :0], _AT), {}, "x has D=0, expected at least 2"),
    ],
)
def test_common_mistakes_are_named(name: str, arguments, options, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=re.escape(f"{name}: {says}")):
        getattr(hulukern, name)(*arguments, **options)


def test_one_dimension_is_one_row() -> None:
    x, w = torch.randn(8), torch.ones(8)
    torch.testing.assert_close(hulukern.layer_norm(x, w, w), hulukern.layer_norm(x[None], w, w)[0])
    torch.testing.assert_close(hulukern.bias_gelu(x, w), hulukern.bias_gelu(x[None], w)[0])


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("80-real;90a-real;100a-real;120", 90, True),
        ("80-real;90a-real;100a-real;120", 75, False),
        ("80-real;90a-real;100a-real;120", 89, True),
        ("80-real;90a-real;100a-real;120", 103, False),  # an "a" is for its own
        ("80-real;90a-real;100a-real;120", 121, True),
        ("80-virtual", 90, True),
        ("90a", 100, False),
        ("native", 90, True),
    ],
)
def test_a_library_without_code_for_the_device_is_not_chosen(archs: str, capability: int, expected: bool) -> None:
    assert holds_code_for(archs, capability) is expected


def test_launches_go_to_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        entered.append(of)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    x = torch.empty(2)
    for current, expected in ((x.device.index, []), (1, [x.device])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert on_its_device(lambda *arguments: arguments)(None, x, 3) == (None, x, 3)
        assert entered == expected


def test_scratch_that_cannot_be_had_names_the_op() -> None:
    """And not what an earlier call was told."""
    code = """
import resource
import torch, hulukern
from hulukern import _C
torch.set_num_threads(1)
N = 5_000_000
x, positions = torch.zeros(N, 1, 2), torch.zeros(N, 1, dtype=torch.int32)
ends = torch.tensor([0, N], dtype=torch.int32)
hulukern.rope_attention(x[:2], x[:2], x[:2], positions[:2], torch.tensor([0, 2], dtype=torch.int32), backend="cpu")
try:
    _C.bias_gelu(False, 1, x[:2, 0], None, x[:2, 0], 7)
except ValueError as error:
    assert "bias_gelu" in str(error)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
try:
    hulukern.rope_attention(x, x, x, positions, ends, backend="cpu")
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "rope_attention: has no memory for its scratch, expected some\n", done.stderr
