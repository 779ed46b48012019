"""Patch masks: consistent, uniform, and a function of each sample's own seed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpretrain.models.masking import MaskSpec, PatchMask, block_patch_mask, num_kept, random_patch_mask
from mmpretrain.seeds import draws

RAGGED = MaskSpec("mae", (0.5, 0.9))
FIXED = MaskSpec("mae", (0.75, 0.75))


def seeds_of(num: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(draws(np.uint64(seed), np.arange(num)).view(np.int64))


def kept_sets(mask: PatchMask) -> list[set[int]]:
    """The patches that each sample keeps, read off `keep` and `num_keep`."""
    num_keep = [mask.keep.shape[1]] * len(mask.keep) if mask.num_keep is None else mask.num_keep.tolist()
    return [set(row[:num]) for row, num in zip(mask.keep.tolist(), num_keep, strict=True)]


@pytest.mark.parametrize(
    ("num_patches", "ratio", "expected"),
    [
        (64, 0.6, 26),  # int(64 * (1 - 0.6)) is 25
        (196, 0.75, 49),
        (196, 0.6, 78),
        (10, 0.3, 7),  # 10 * (1 - 0.3) is 7 exactly; int(10 * 0.7) too, but int(10 * (1 - 0.9)) is 0
        (10, 0.9, 1),
        (64, 0.0, 64),
        (4, 0.99, 1),
    ],
)
def test_the_number_of_kept_patches_is_rounded_and_at_least_one(num_patches: int, ratio: float, expected: int) -> None:
    assert num_kept(num_patches, ratio) == expected


@pytest.mark.parametrize("spec", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_kept_and_hidden_patches_are_each_others_complement(spec: MaskSpec) -> None:
    mask = random_patch_mask(seeds_of(200), 64, spec)
    assert mask.keep.dtype == torch.int64 and mask.hidden.dtype == torch.bool and mask.hidden.shape == (200, 64)
    for kept, hidden in zip(kept_sets(mask), mask.hidden, strict=True):
        assert kept == set(range(64)) - set(hidden.nonzero()[:, 0].tolist())


def test_a_fixed_ratio_keeps_the_same_number_and_needs_no_numbers() -> None:
    mask = random_patch_mask(seeds_of(50), 64, MaskSpec("mae", (0.6, 0.6)))
    assert mask.num_keep is None
    assert mask.keep.shape == (50, 26)
    assert mask.hidden.sum(1).tolist() == [38] * 50


def test_ragged_numbers_are_uniform_within_their_bounds() -> None:
    num = 8000
    mask = random_patch_mask(seeds_of(num), 64, RAGGED)
    assert mask.num_keep is not None and mask.keep.shape == (num, 32)
    values, counts = np.unique(mask.num_keep.numpy(), return_counts=True)
    assert values.tolist() == list(range(6, 33))  # 64 * 0.1 rounded to 64 * 0.5, both included
    expected = num / len(values)
    assert ((counts - expected) ** 2 / expected).sum() < 54.1  # the 0.999 quantile at 26 degrees of freedom


def test_each_patch_and_each_pair_of_patches_is_hidden_equally_often() -> None:
    num, num_patches, num_keep = 20_000, 16, 4
    kept = (~random_patch_mask(seeds_of(num), num_patches, FIXED).hidden).double()
    share = num_keep / num_patches
    pair_share = share * (num_keep - 1) / (num_patches - 1)
    together = kept.T @ kept / num
    single = together.diagonal()
    pairs = together[~torch.eye(num_patches, dtype=torch.bool)]
    assert (single - share).abs().max() < 4.5 * np.sqrt(share * (1 - share) / num)
    assert (pairs - pair_share).abs().max() < 4.5 * np.sqrt(pair_share * (1 - pair_share) / num)


def test_the_order_of_kept_patches_is_random_too() -> None:
    """The first column is no particular patch, so that cutting a filler off never favours one."""
    first = random_patch_mask(seeds_of(16_000), 16, FIXED).keep[:, 0]
    counts = torch.bincount(first, minlength=16).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 37.7  # the 0.999 quantile at 15 degrees of freedom


@pytest.mark.parametrize("spec", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_a_mask_does_not_depend_on_the_rest_of_the_batch(spec: MaskSpec) -> None:
    seeds = seeds_of(40)
    order = torch.randperm(40)
    whole = random_patch_mask(seeds, 49, spec)
    shuffled = random_patch_mask(seeds[order], 49, spec)
    alone = random_patch_mask(seeds[7:8], 49, spec)
    assert torch.equal(shuffled.keep, whole.keep[order]) and torch.equal(shuffled.hidden, whole.hidden[order])
    assert torch.equal(alone.keep, whole.keep[7:8]) and torch.equal(alone.hidden, whole.hidden[7:8])
    if whole.num_keep is not None and shuffled.num_keep is not None and alone.num_keep is not None:
        assert torch.equal(shuffled.num_keep, whole.num_keep[order]) and alone.num_keep[0] == whole.num_keep[7]


def test_every_name_and_every_seed_draws_its_own_mask() -> None:
    seeds = seeds_of(100)
    mae, other = (random_patch_mask(seeds, 64, MaskSpec(name, (0.75, 0.75))).hidden for name in ("mae", "distill"))
    overlap = (mae & other).double().sum(1).mean() / 64
    assert abs(overlap - 0.75**2) < 0.02  # as independent masks have it
    assert len({tuple(row) for row in mae.tolist()}) == 100


def test_nothing_is_hidden_at_ratio_zero() -> None:
    mask = random_patch_mask(seeds_of(3), 9, MaskSpec("none", (0.0, 0.0)))
    assert not mask.hidden.any()
    assert mask.keep.sort(1).values.tolist() == [list(range(9))] * 3


@pytest.mark.gpu
def test_a_gpu_draws_the_same_masks() -> None:
    cpu, gpu = (random_patch_mask(seeds_of(64).to(device), 196, RAGGED) for device in ("cpu", "cuda"))
    assert torch.equal(gpu.keep.cpu(), cpu.keep) and torch.equal(gpu.hidden.cpu(), cpu.hidden)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_a_kept_block_may_hold_any_patch(ratio: float) -> None:
    mask = block_patch_mask(seeds_of(2000), (14, 14), MaskSpec("block", (ratio, ratio), "block"))
    assert mask.keep.shape == (2000, num_kept(196, ratio))
    assert (mask.keep.diff(dim=1) > 0).all()
    assert not mask.hidden.all(dim=0).any()
