"""What nvcc made of the kernels: nothing spills, no product is padded."""

from __future__ import annotations

import ctypes

import pytest

import hulukern
from bench import static_cuda


def library_has_cuda() -> str:
    native = ctypes.CDLL(str(next(iter(hulukern.__path__))) + "/lib/libhulukern.so")
    native.hk_cuda_archs.restype = ctypes.c_char_p
    return native.hk_cuda_archs().decode()


@pytest.fixture(scope="module")
def found() -> list[dict]:  # type: ignore[type-arg]
    if "80-real" not in library_has_cuda():
        pytest.skip("the library has no kernels for sm_80")
    try:
        return static_cuda.rows(["80"], [])
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_no_kernel_spills_or_pads(found: list[dict]) -> None:  # type: ignore[type-arg]
    assert {r["op"] for r in found} == {
        "bias_gelu", "layer_norm", "patch_embed", "rope_attention", "shared", "spatial_merge", "token_compact",
        "token_score",
    }  # fmt: skip
    assert static_cuda.faults(found) == []


def test_products_at_72_are_what_the_shape_needs(found: list[dict]) -> None:  # type: ignore[type-arg]
    """4 products of k = 16 and 1 of k = 8 along D; 9 wide along values: no 80, no 96."""
    of_72 = [r for r in found if r["kernel"] == "attention_forward" and r["constants"][1] == 72]
    assert len(of_72) == 2
    for r in of_72:
        columns, steps, tiles = 8, 4, 2  # of 64 keys, of 16 keys, of 16 rows
        assert r["tensor"] == {"HMMA.16816": tiles * (columns * 4 + steps * 9), "HMMA.1688": tiles * columns}
        assert r["tensor_ratio"] == 1
        assert 16 in r["global_bytes"]


@pytest.mark.parametrize(
    ("mangled", "kernel"),
    [
        ("_ZN2hk17attention_forwardILi5ELi72EEEvNS_13AttentionWalkE", ("attention_forward", [5, 72])),
        ("_ZN2hk18attention_backwardILi4ELi64ELb1EEEvNS_21AttentionBackwardWalkE", ("attention_backward", [4, 64, 1])),
        ("_ZN2hk23patch_embed_cut_patchesIhLi5ELi4EEEvNS_7CutWalkE", ("patch_embed_cut_patches", [5, 4])),
    ],
)
def test_names_of_kernels(mangled: str, kernel: tuple[str, list[int]]) -> None:
    assert static_cuda.kernel_of(mangled) == kernel
