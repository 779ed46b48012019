"""Texts that are longer than they may be: what stays of them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmpretrain.data.shorten import Shorten, shortened

START, END = 1, 2
LENGTHS = [3, 6, 7, 12, 20, 20]


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Start, numbers that rise, end, and zeros."""
    rows = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[0], row[length - 1] = START, END
        row[1 : length - 1] = torch.arange(10, 10 + length - 2)
    return rows, torch.tensor(LENGTHS), torch.arange(len(LENGTHS)) * 7919


@pytest.mark.parametrize("how", ["truncate", "random", "block"])
def test_start_and_end_stay_and_what_is_between_keeps_its_order(how: Shorten) -> None:
    text, lengths, seeds = texts()
    short, short_lengths = shortened(text, lengths, seeds, 7, how)
    assert short.shape == (len(LENGTHS), 7)
    assert short_lengths.tolist() == [min(length, 7) for length in LENGTHS]
    for row, length, own in zip(short.tolist(), short_lengths.tolist(), text.tolist(), strict=True):
        assert row[0] == START and row[length - 1] == END
        inner = row[1 : length - 1]
        assert inner == sorted(set(inner)) and set(inner) <= set(own) and min(inner) >= 10
    assert torch.equal(short[:3], text[:3, :7]), "what is short enough stays as it is"


def test_each_way_keeps_what_it_says() -> None:
    text, lengths, seeds = texts()
    assert shortened(text, lengths, seeds, 7, "truncate")[0][4].tolist() == [START, 10, 11, 12, 13, 14, END]
    block = [shortened(text, lengths, seeds + shift, 7, "block")[0][4] for shift in range(40)]
    firsts = {int(row[1]) for row in block}
    assert all(torch.equal(row[1:6], torch.arange(int(row[1]), int(row[1]) + 5)) for row in block)
    assert min(firsts) == 10 and max(firsts) == 23, "from anywhere, the last place included"
    drawn = [tuple(shortened(text, lengths, seeds + shift, 7, "random")[0][4].tolist()) for shift in range(40)]
    assert len(set(drawn)) > 35 and any(b - a > 1 for row in drawn for a, b in pairwise(row[1:6]))
    counts = torch.bincount(torch.tensor([token for row in drawn for token in row[1:6]]), minlength=28)[10:28]
    assert counts.min() > 0, "each token is kept at some time"


def test_what_stays_belongs_to_the_sample_and_not_to_its_batch() -> None:
    text, lengths, seeds = texts()
    for how in ("random", "block"):
        together = shortened(text, lengths, seeds, 7, how)[0]  # type: ignore[arg-type]
        alone = shortened(text[3:4, :12], lengths[3:4], seeds[3:4], 7, how)[0]  # type: ignore[arg-type]
        assert torch.equal(alone[0], together[3])
