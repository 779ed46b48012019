"""Rows of different lengths as one matrix of tokens."""

import pytest
import torch
from torch import Tensor

from mmpretrain.models.groups import LengthGroups

IDS = torch.arange(1, 26).reshape(5, 5)
GROUPS = LengthGroups(5, (2, 5))


def test_packed_rows_are_their_slices_cut_and_come_back_with_zeros_beyond() -> None:
    packed = GROUPS.pack(IDS)
    assert packed.tolist() == [1, 2, 6, 7, 11, 12, *range(16, 26)]
    rows = GROUPS.unpack(packed[:, None].double())
    assert rows[..., 0].tolist() == [[1, 2, 0, 0, 0], [6, 7, 0, 0, 0], [11, 12, 0, 0, 0], *IDS[3:].tolist()]


def test_a_function_of_slices_sees_each_with_its_own_others() -> None:
    seen = []

    def double(part: Tensor, lengths: Tensor, name: str) -> Tensor:
        seen.append((tuple(part.shape), lengths.tolist(), name))
        return 2 * part

    lengths = torch.tensor([1, 2, 2, 4, 5])
    tokens = GROUPS.pack(IDS)[:, None]
    assert torch.equal(GROUPS.map(double, tokens, GROUPS.rows(lengths), ["short", "long"]), 2 * tokens)
    assert seen == [((3, 2, 1), [1, 2, 2], "short"), ((2, 5, 1), [4, 5], "long")]


def test_tokens_are_found_by_their_number_in_the_row() -> None:
    places = torch.tensor([0, 1, 1, 3, 4])
    assert torch.equal(GROUPS.pack(IDS)[GROUPS.find(places)], IDS[torch.arange(5), places])
    assert torch.equal(GROUPS.places(IDS.device), GROUPS.pack(torch.arange(5).expand(5, 5)))


def test_masks_show_the_first_tokens_of_each_row() -> None:
    short, long = GROUPS.first(torch.tensor([1, 2, 2, 4, 5]))
    assert short[:, 0, 0].tolist() == [[True, False], [True, True], [True, True]]
    assert long[:, 0, 0].tolist() == [[True, True, True, True, False], [True] * 5]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_slices_are_those_of_tensor_split(num_groups: int) -> None:
    groups = LengthGroups(5, (5,) * num_groups)
    expected = [part.tolist() for part in IDS.tensor_split(num_groups)]
    assert [part.tolist() for part in groups.slices(groups.pack(IDS))] == expected
