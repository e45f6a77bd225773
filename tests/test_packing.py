"""Coordinates and boundaries of packed grids, against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hulukern import grid_cu_seqlens, grid_positions, rope_attention


def test_positions_and_ends_are_transformers() -> None:
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    grid = torch.tensor([[3, 4, 6], [1, 6, 2], [2, 9, 3]])
    merges = torch.tensor([2, 1, 3])
    theirs = get_vision_position_ids(grid, merges)
    ours = grid_positions(grid, merges.tolist())
    assert torch.equal(ours.long(), theirs)
    assert torch.equal(grid_cu_seqlens(grid).long(), get_vision_cu_seqlens(grid).long())


def test_frames_count_from_zero_in_every_grid() -> None:
    positions = grid_positions([(2, 2, 4), (3, 2, 2)], 2, axes="thw")
    assert positions.shape == (28, 3)
    assert positions[:, 0].tolist() == [0] * 8 + [1] * 8 + [0] * 4 + [1] * 4 + [2] * 4
    assert positions[:8, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize("merge", [np.int64(2), [np.int32(2)], np.array([2]), torch.tensor([2])])
def test_merge_sizes_of_any_library(merge: object) -> None:
    assert torch.equal(grid_positions([(1, 4, 2)], merge), grid_positions([(1, 4, 2)], 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("merge", [2.0, 2.9, [2.9], "2", None])
def test_merge_sizes_that_are_no_int_are_refused(merge: object) -> None:
    with pytest.raises(TypeError, match=r"grid_positions: merge_size has .*, expected an int"):
        grid_positions([(1, 4, 2)], merge)  # type: ignore[arg-type]


def test_the_default_device_changes_nothing() -> None:
    grid = torch.tensor([[2, 4, 2]])
    expected = grid_positions(grid, 2, axes="thw"), grid_cu_seqlens(grid)
    with torch.device("meta"):
        got = grid_positions(grid, 2, axes="thw"), grid_cu_seqlens(grid)
    assert all(map(torch.equal, got, expected))


def test_nothing_packed() -> None:
    assert grid_positions([]).shape == (0, 2)
    assert grid_cu_seqlens([]).tolist() == [0]
    assert grid_cu_seqlens([(0, 4, 4), (2, 0, 3)]).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("grid", "merge", "axes", "says"),
    [
        ([(1, 3, 2)], 2, "hw", "divisible by merge_size=2"),
        ([(1, 2, 2)], 0, "hw", "merge_size"),
        ([(1, 2, 2)], [1, 1], "hw", "one for each of 1 grids"),
        ([(1, -2, 2)], 1, "hw", "row 0"),
        ([(1, 2, 2)], 1, "wh", "axes"),
    ],
)
def test_bad_grids(grid: list[tuple[int, int, int]], merge: int | list[int], axes: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        grid_positions(grid, merge, axes=axes)


def test_a_packed_product_is_read_in_place_and_gets_its_gradient() -> None:
    qkv = torch.randn(12, 3, 2, 64, requires_grad=True)
    positions, ends = grid_positions([(2, 2, 3)]), grid_cu_seqlens([(2, 2, 3)])
    out = rope_attention(*qkv.unbind(1), positions, ends)
    apart = rope_attention(*(x.contiguous() for x in qkv.unbind(1)), positions, ends, sections=[16, 16], scale=0.125)
    assert torch.equal(out, apart)
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad[:, 2].abs().sum() > 0
    with pytest.raises(ValueError, match="positions_q, cu_seqlens_q"):
        rope_attention(*qkv.unbind(1), positions, ends, positions_q=positions)
    with pytest.raises(ValueError, match="does not divide into 3 axes"):
        rope_attention(*qkv.unbind(1), grid_positions([(2, 2, 3)], axes="thw"), ends)
