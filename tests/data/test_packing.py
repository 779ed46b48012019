"""Texts packed into rows."""

import pytest
import torch

from mmpretrain.data.packing import packed, row_length


@pytest.mark.parametrize("num", [2, 3, 30, 128])
def test_every_text_has_a_place_of_its_own(num: int) -> None:
    lengths = torch.randint(2, 40, (num,), generator=torch.Generator().manual_seed(num))
    packing = packed(lengths, 77)
    assert packing is not None and packing.row_length == 77
    texts = torch.zeros(packing.num_rows * 77, dtype=torch.int64)
    in_row: dict[int, list[int]] = {}
    for slot, length in zip(packing.slots.tolist(), lengths.tolist(), strict=True):
        texts[slot : slot + length] += 1
        assert slot // 77 == (slot + length - 1) // 77, "no text goes over a row's end"
        in_row.setdefault(slot // 77, []).append(slot)
    assert texts.sum() == lengths.sum() and texts.max() == 1
    assert len(in_row) == packing.num_rows and max(map(len, in_row.values())) == packing.most
    turns = [sorted(in_row[slot // 77]).index(slot) for slot in packing.slots.tolist()]
    assert packing.turns.tolist() == turns


def test_rows_of_short_texts_are_nearly_full() -> None:
    lengths = torch.randint(8, 40, (128,), generator=torch.Generator().manual_seed(0))
    packing = packed(lengths, 56)
    assert packing is not None and int(lengths.sum()) > 0.96 * packing.num_rows * 56


def test_texts_that_fill_a_row_each_are_not_packed() -> None:
    assert packed(torch.tensor([5, 6, 7]), 8) is None
    assert packed(torch.tensor([8]), 8) is None


@pytest.mark.parametrize(("longest", "expected"), [(3, 8), (8, 8), (9, 16), (73, 77), (77, 77)])
def test_a_rows_length_is_one_of_few(longest: int, expected: int) -> None:
    assert row_length(torch.tensor([2, longest, 3]), 77) == expected
