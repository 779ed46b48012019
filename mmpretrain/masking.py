"""Which patches are hidden: pure functions of per-sample seeds, on the CPU or on the device."""

from dataclasses import dataclass

from torch import Tensor

from mmpretrain.seeds import hash64, torch_draws, torch_uniform


@dataclass(frozen=True)
class PatchMask:
    """Which of N patches each of b samples keeps.

    `keep` int64 [b, K]: the kept patches first; columns from a sample's own number on are filler.
    `num_keep` int64 [b], or None where every sample keeps all K, so that attention needs no mask.
    `hidden` bool [b, N].
    """

    keep: Tensor
    num_keep: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class MaskSpec:
    """A way to draw patch masks: the name it is drawn under, and the smallest and largest part that is hidden."""

    name: str
    ratio: tuple[float, float]


def num_kept(num_patches: int, ratio: float) -> int:
    """How many of `num_patches` stay when `ratio` is hidden: rounded, since int() would floor floats; at least one."""
    return max(1, round(num_patches * (1 - ratio)))


def random_patch_mask(seeds: Tensor, num_patches: int, spec: MaskSpec) -> PatchMask:
    """Hide patches uniformly at random (MAE, He et al. 2022, section 3).

    Args:
        seeds: int64 [b], one per sample.
        num_patches: N.
        spec: with a range of ratios each sample draws its own number of kept patches, uniformly.
    """
    salt = hash64("patch-mask", spec.name)
    order = torch_draws(seeds, num_patches, salt).argsort(dim=1)
    fewest, most = num_kept(num_patches, spec.ratio[1]), num_kept(num_patches, spec.ratio[0])
    ranks = order.argsort(dim=1)
    if fewest == most:
        return PatchMask(order[:, :most], None, ranks >= most)
    u = torch_uniform(seeds, 1, hash64("num-keep", spec.name))[:, 0]
    num_keep = fewest + (u * (most - fewest + 1)).long()
    return PatchMask(order[:, :most], num_keep, ranks >= num_keep[:, None])
