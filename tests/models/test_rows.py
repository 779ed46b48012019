"""Texts of different lengths as rows of one length."""

import pytest
import torch
from torch import Tensor

from mmpretrain.batch import Packing
from mmpretrain.models.attention import Segments
from mmpretrain.models.rows import Rows

LENGTHS = torch.tensor([2, 5, 1, 3])
# Row 0: text 1. Row 1: text 3, then 2. Row 2: text 0.
PACKING = Packing(torch.tensor([10, 0, 8, 5]), torch.tensor([0, 0, 1, 0]), num_rows=3, row_length=5, most=2)
IDS = torch.tensor([[11, 12, 0, 0, 0], [21, 22, 23, 24, 25], [31, 0, 0, 0, 0], [41, 42, 43, 0, 0]])


def packed_rows() -> Rows:
    return Rows(LENGTHS, 5, PACKING)


def test_packed_texts_stand_where_they_should_and_come_back() -> None:
    rows = packed_rows()
    packed = rows.pack(IDS)
    assert packed[0].tolist() == [21, 22, 23, 24, 25]
    assert packed[1, :4].tolist() == [41, 42, 43, 31] and packed[2, :2].tolist() == [11, 12]
    back = rows.unpack(packed[..., None].double())[..., 0]
    is_token = torch.arange(5) < LENGTHS[:, None]
    assert back.shape == IDS.shape and torch.equal(back[is_token], IDS[is_token].double())


def test_tokens_know_their_text_and_their_place_in_it() -> None:
    rows = packed_rows()
    assert rows.owners().tolist() == [[1] * 5, [3, 3, 3, 2, -1], [0, 0, -1, -1, -1]]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4]
    assert rows.positions[1, :4].tolist() == [0, 1, 2, 0] and rows.positions[2, :2].tolist() == [0, 1]
    assert (rows.positions < 5).all(), "what fills a row looks up a position that there is"


def allowed(rows: Rows, is_causal: bool) -> Tensor:
    mask = rows.mask(is_causal)
    assert isinstance(mask, Tensor)
    return mask[:, 0]


def test_a_token_sees_its_own_text_alone() -> None:
    both, before = allowed(packed_rows(), False), allowed(packed_rows(), True)
    assert both[1, 0].tolist() == [True, True, True, False, False]
    assert both[1, 3].tolist() == [False, False, False, True, False]
    assert before[1, 1].tolist() == [True, True, False, False, False]
    assert before[2, 1].tolist() == [True, True, False, False, False]
    assert both.any(-1).all() and before.any(-1).all(), "who sees nothing has no softmax"


@pytest.mark.parametrize("is_causal", [False, True])
def test_segments_are_the_texts_and_the_padding_of_each_row(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = packed_rows()
    dense = rows.mask(is_causal)
    monkeypatch.setattr("mmpretrain.models.rows.prefers_segments", lambda device: True)
    segments = rows.mask(is_causal)
    assert isinstance(segments, Segments) and isinstance(dense, Tensor)
    assert segments.bounds.tolist() == [0, 5, 5, 8, 9, 10, 12, 15] and segments.bounds.dtype == torch.int32
    assert (segments.longest, segments.is_causal) == (5, is_causal)
    assert torch.equal(segments.dense(), dense)
    queries = rows.token_indices(LENGTHS - 1)
    expected = dense.expand(-1, -1, 5, -1)[torch.arange(3)[:, None], 0, queries][:, None]
    assert torch.equal(segments.of_queries(queries), expected)


def test_one_token_of_each_text_is_picked_and_found_again() -> None:
    rows = packed_rows()
    token_indices = rows.token_indices(LENGTHS - 1)
    assert (
        token_indices.shape == (3, 2)
        and token_indices[0, 0] == 4
        and token_indices[1].tolist() == [2, 3]
        and token_indices[2, 0] == 1
    )
    states = rows.pack(IDS)[torch.arange(3)[:, None], token_indices][..., None]
    assert rows.unpack_tokens(states)[:, 0].tolist() == [12, 25, 31, 43]


def test_texts_with_a_row_each_stay_as_they_are() -> None:
    rows = Rows(LENGTHS, 5, None)
    assert rows.pack(IDS) is IDS and rows.unpack(IDS) is IDS
    assert rows.positions.tolist() == [0, 1, 2, 3, 4]
    assert rows.mask(is_causal=True) is None and allowed(rows, False)[3, 0].tolist() == [True, True, True, False, False]
    assert rows.token_indices(LENGTHS - 1).tolist() == [[1], [4], [0], [2]]
    assert rows.unpack_tokens(IDS[:, :1, None]).tolist() == [[11], [21], [31], [41]]
