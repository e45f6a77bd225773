"""Proof by exhaustion that fragment index maps and tile layouts of tensor-core kernels are right.

The maps of the PTX ISA (mma.m16n8k16, m16n8k8, ldmatrix) are bijections; the layout of every tile is free of bank
conflicts; and the products that attention is built from put every value where it belongs, one at a time.
"""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

from hulukern.ops.rope_attention.spec import HEAD_DIMS

DTYPES = {torch.bfloat16: 5, torch.float16: 4}
LANES = [(lane, lane // 4, lane % 4) for lane in range(32)]


def fragment_a(k: int) -> list[tuple[int, int]]:
    """(row, column) of every 16-bit value of A [16, k], in (lane, register, half) order."""
    registers = range(k // 4)
    return [
        (g + r % 2 * 8, 2 * t + r // 2 * 8 + half)
        for _, g, t in LANES
        for r, half in itertools.product(registers, (0, 1))
    ]


def fragment_b(k: int) -> list[tuple[int, int]]:
    return [(2 * t + 8 * r + half, g) for _, g, t in LANES for r, half in itertools.product(range(k // 8), (0, 1))]


def fragment_d() -> list[tuple[int, int]]:
    return [(g + e // 2 * 8, 2 * t + e % 2) for _, g, t in LANES for e in range(4)]


@pytest.mark.parametrize("k", [8, 16])
def test_fragments_hold_every_element_once(k: int) -> None:
    assert sorted(fragment_a(k)) == sorted(itertools.product(range(16), range(k)))
    assert sorted(fragment_b(k)) == sorted(itertools.product(range(k), range(8)))
    assert sorted(fragment_d()) == sorted(itertools.product(range(16), range(8)))


def test_two_results_are_one_operand() -> None:
    """What pack_operand relies on: D of columns 8j and 8j + 8, packed in pairs, is A of k = 16."""
    d = fragment_d()
    joined = []
    for lane in range(32):
        left = d[4 * lane : 4 * lane + 4]
        right = [(r, c + 8) for r, c in left]
        joined += [left[0], left[1], left[2], left[3], right[0], right[1], right[2], right[3]]
    assert joined == fragment_a(16)


def banks(byte: int, width: int) -> set[int]:
    return {(byte + b) // 4 % 32 for b in range(width)}


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_tiles_are_free_of_bank_conflicts(library: ctypes.CDLL, D: int) -> None:
    """ldmatrix reads 8 rows of 16 bytes at once, cp.async and packed access 8 lanes of 16 bytes."""
    stride = 2 * library.hk_sim_tile_stride(D)
    assert stride % 16 == 0
    assert stride // 16 % 2 == 1  # odd, hence invertible modulo the 8 groups of 4 banks
    assert stride >= 2 * D
    assert stride < 2 * D + 32
    for first, unit in itertools.product(range(0, 64, 8), range(D // 8)):
        touched = [banks((first + r) * stride + 16 * unit, 16) for r in range(8)]
        assert set.union(*touched) == set(range(32)), "a matrix of 8 x 8"
    units = D // 8
    worst = 0
    for start in range(0, 64 * units, 8):
        touched = [banks((i // units) * stride + i % units * 16, 16) for i in range(start, start + 8)]
        worst = max(worst, max(sum(b in t for t in touched) for b in range(32)))
    # Rows without padding follow each other in memory. With padding, 8 lanes that cross into the next row may meet
    # one bank twice: a write in two turns instead of one, where 8 units are no whole row.
    assert worst == (1 if D in (64, 72, 128) else 2)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_addresses_in_a_tile_are_distinct(library: ctypes.CDLL, D: int) -> None:
    stride = library.hk_sim_tile_stride(D)
    assert len({r * stride + d for r in range(64) for d in range(D)}) == 64 * D


def products(library: ctypes.CDLL, dtype: torch.dtype, *operands: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    a, tile, p = (x.to(dtype).contiguous() for x in operands)
    rows, columns = np.full((16, 64), np.nan, np.float32), np.full((16, a.shape[1]), np.nan, np.float32)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (a, tile, p)]
    results = [x.ctypes.data_as(ctypes.c_void_p) for x in (rows, columns)]
    status = library.hk_sim_products(DTYPES[dtype], a.shape[1], *pointers, *results)
    assert status == 0, library.hk_last_error().decode()
    return rows, columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_every_value_of_an_operand_goes_where_it_belongs(library: ctypes.CDLL, D: int, dtype: torch.dtype) -> None:
    """A product is linear in each operand: right for each unit vector is right for all."""
    g = torch.Generator().manual_seed(D)
    tile = torch.randint(-64, 65, (64, D), generator=g).float()  # exact in 16 bits, sums exact in fp32
    rows_of_a, rows_of_p = torch.zeros(16, D), torch.zeros(16, 64)
    for row in range(16):
        # One value per row of A and of P at a time, at a place that moves: every place is visited.
        for step in range(max(D, 64)):
            rows_of_a.zero_()
            rows_of_p.zero_()
            rows_of_a[row, step % D] = 1
            rows_of_p[row, step % 64] = 1
            if row not in (0, 5, 8, 15) and step % 7:
                continue
            rows, columns = products(library, dtype, rows_of_a, tile, rows_of_p)
            expected_rows, expected_columns = np.zeros_like(rows), np.zeros_like(columns)
            expected_rows[row] = tile[:, step % D]
            expected_columns[row] = tile[step % 64]
            assert np.array_equal(rows, expected_rows)
            assert np.array_equal(columns, expected_columns)
    a, p = (torch.randint(-16, 17, (16, n), generator=g).float() for n in (D, 64))
    rows, columns = products(library, dtype, a, tile, p)
    assert np.array_equal(rows, (a @ tile.t()).numpy())
    assert np.array_equal(columns, (p @ tile).numpy())
