"""Which patches are hidden: pure functions of per-sample seeds, on the CPU or on the device."""

from dataclasses import dataclass
from typing import Literal

import torch
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
    """A way to draw patch masks.

    `name`: what it is drawn under. `ratio`: the smallest and largest part that is hidden. `kind`: `random`, or `block`:
    what stays is one rectangle of the grid.
    """

    name: str
    ratio: tuple[float, float]
    kind: Literal["random", "block"] = "random"


@dataclass(frozen=True)
class TokenMaskSpec:
    """A way to hide tokens for masked language modelling (BERT, Devlin et al. 2019; drawn anew each time, RoBERTa).

    `name`: what it is drawn under. `ratio`: the part that is chosen. Of the chosen ones `replaced` become the mask
    token, `randomised` any token, and the rest stay as they are. `whole_words`: a word is chosen as a whole.
    """

    name: str
    ratio: float
    mask_id: int
    vocab_size: int
    replaced: float = 0.8
    randomised: float = 0.1
    whole_words: bool = False


@dataclass(frozen=True)
class TokenMask:
    """Token ids int64 [b, L] with some of them hidden, and which were chosen, bool [b, L]."""

    ids: Tensor
    chosen: Tensor


def num_kept(num_patches: int, ratio: float) -> int:
    """How many of `num_patches` stay when `ratio` is hidden: rounded, since int() would floor floats; at least one."""
    return max(1, round(num_patches * (1 - ratio)))


def chosen_tokens(
    length: int, lengths: Tensor, seeds: Tensor, spec: TokenMaskSpec, word_starts: Tensor | None
) -> Tensor:
    """Which tokens `mask_tokens` chooses of texts padded to `length`, bool [b, length]."""
    columns = torch.arange(length, device=lengths.device)
    can_be_chosen = (columns > 0) & (columns < (lengths - 1)[:, None])
    return can_be_chosen & (_token_draws("token-chosen", length, seeds, spec, word_starts) < spec.ratio)


def _token_draws(what: str, length: int, seeds: Tensor, spec: TokenMaskSpec, word_starts: Tensor | None) -> Tensor:
    """A draw for each token, float64 [b, length] in [0, 1); with whole words that of its word's first one."""
    u = torch_uniform(seeds, length, hash64(what, spec.name))
    if not spec.whole_words:
        return u
    if word_starts is None:
        raise ValueError("whole words are to be hidden, but the tokenizer does not say where they begin")
    columns = torch.arange(length, device=seeds.device)
    return u.gather(1, torch.where(word_starts, columns, 0).cummax(dim=1).values)


def mask_tokens(
    ids: Tensor, lengths: Tensor, seeds: Tensor, spec: TokenMaskSpec, word_starts: Tensor | None
) -> TokenMask:
    """Choose tokens to predict, and hide most of them.

    Every token but a row's first and last (start and end) is chosen with probability `ratio`, whatever the padded
    shape, the row's place or the device.

    Args:
        ids: int64 [b, L]; lengths: int64 [b]; seeds: int64 [b].
        spec: how; with `whole_words` all tokens of a word share their first one's fate.
        word_starts: bool [b, L], where a word begins; needed for whole words.

    Raises: ValueError if whole words are asked for and `word_starts` is None.
    """
    chosen = chosen_tokens(ids.shape[1], lengths, seeds, spec, word_starts)
    u_action = _token_draws("token-action", ids.shape[1], seeds, spec, word_starts)
    others = torch_draws(seeds, ids.shape[1], hash64("token-other", spec.name)).remainder(spec.vocab_size)
    replaced = chosen & (u_action < spec.replaced)
    randomised = chosen & ~replaced & (u_action < spec.replaced + spec.randomised)
    hidden = torch.where(replaced, torch.full_like(ids, spec.mask_id), ids)
    return TokenMask(torch.where(randomised, others, hidden), chosen)


def patch_mask(seeds: Tensor, grid_size: tuple[int, int], spec: MaskSpec) -> PatchMask:
    """The mask that `spec` draws for each sample, seeds int64 [b], on a grid of (rows, columns) patches."""
    if spec.kind == "block":
        return block_patch_mask(seeds, grid_size, spec)
    return random_patch_mask(seeds, grid_size[0] * grid_size[1], spec)


def block_patch_mask(seeds: Tensor, grid_size: tuple[int, int], spec: MaskSpec) -> PatchMask:
    """Keep one rectangle of patches, anywhere in the grid (FLIP, Li et al. 2023, table 2: block masking).

    Args:
        seeds: int64 [b].
        grid_size: rows and columns.
        spec: its smallest ratio counts; the rectangle has about the grid's proportions, and where its number of patches
            is not that which is to stay, some of an outer row are hidden, too, from one of its ends.
    """
    rows, columns = grid_size
    kept = num_kept(rows * columns, spec.ratio[0])
    height = max(1, min(rows, round((kept * rows / columns) ** 0.5)))
    width = min(columns, -(-kept // height))
    height = -(-kept // width)
    u = torch_uniform(seeds, 4, hash64("block-mask", spec.name))
    top = (u[:, 0] * (rows - height + 1)).long()
    left = (u[:, 1] * (columns - width + 1)).long()
    place = torch.arange(rows * columns, device=seeds.device)
    row, column = (place // columns).expand(len(seeds), -1), (place % columns).expand(len(seeds), -1)
    # Counted from either side, so that what is hidden of the rectangle is of any of its corners.
    row = torch.where(u[:, 2:3] < 0.5, row, rows - 1 - row)
    column = torch.where(u[:, 3:4] < 0.5, column, columns - 1 - column)
    inside = (
        (row >= top[:, None])
        & (row < top[:, None] + height)
        & (column >= left[:, None])
        & (column < left[:, None] + width)
    )
    # Inside first, in their order; of the rectangle's last row only as many as are to stay.
    order = (~inside).long().mul(rows * columns).add(row * columns + column).argsort(dim=1)
    keep = order[:, :kept].sort(dim=1).values
    hidden = torch.ones_like(inside).scatter(1, keep, False)
    return PatchMask(keep, None, hidden)


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
    num_keep = _drawn_num_keep(seeds, fewest, most, spec)
    return PatchMask(order[:, :most], num_keep, ranks >= num_keep[:, None])


def _drawn_num_keep(seeds: Tensor, fewest: int, most: int, spec: MaskSpec) -> Tensor:
    u = torch_uniform(seeds, 1, hash64("num-keep", spec.name))[:, 0]
    return fewest + (u * (most - fewest + 1)).long()


def num_hidden(seeds: Tensor, num_patches: int, spec: MaskSpec) -> Tensor:
    """How many patches `patch_mask` hides of all samples together, int64, without drawing which."""
    most = num_kept(num_patches, spec.ratio[0])
    # A block has one size, that of the smallest ratio.
    fewest = most if spec.kind == "block" else num_kept(num_patches, spec.ratio[1])
    return (num_patches - _drawn_num_keep(seeds, fewest, most, spec)).sum()
