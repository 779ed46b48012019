"""Patch and token masks: pure functions of per-sample seeds, on the CPU or on the device."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.seeds import hash64, torch_draws, torch_uniform


@dataclass(frozen=True)
class PatchMask:
    """Mask over the N patches of b samples.

    `keep`: int64 [b, K], indices of the kept patches; columns from `num_keep` on are filler.
    `num_keep`: int64 [b], number of kept patches of each sample. None if it is K for all: attention then needs no mask.
    `hidden`: bool [b, N], True where a patch is hidden.
    """

    keep: Tensor
    num_keep: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class MaskSpec:
    """Parameters of a patch mask.

    `name`: salt of the random draws; masks of different names are independent.
    `ratio`: smallest and largest fraction of the patches that is hidden.
    `kind`: `random` hides patches at random; `block` keeps one rectangle of the grid.
    """

    name: str
    ratio: tuple[float, float]
    kind: Literal["random", "block"] = "random"


@dataclass(frozen=True)
class TokenMaskSpec:
    """Parameters of a token mask for masked language modelling (BERT, Devlin et al. 2019).

    A new mask is drawn at each visit of a sample, as in RoBERTa.

    `name`: salt of the random draws; masks of different names are independent.
    `ratio`: probability with which a token is chosen.
    `mask_id`: id of the mask token.
    `vocab_size`: random tokens are drawn from the ids below it.
    `replaced`, `randomised`: fractions of the chosen tokens that become the mask token and a random token; the rest is
        unchanged.
    `whole_words`: choose whole words instead of single tokens.
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
    """Masked token ids, int64 [b, L], and the chosen positions, bool [b, L]."""

    ids: Tensor
    chosen: Tensor


def num_kept(num_patches: int, ratio: float) -> int:
    """Return the number of patches that are kept when the fraction `ratio` is hidden; at least 1.

    The product is rounded, not truncated, since floating-point error may put it just below an integer.
    """
    return max(1, round(num_patches * (1 - ratio)))


def chosen_tokens(
    length: int, lengths: Tensor, seeds: Tensor, spec: TokenMaskSpec, word_starts: Tensor | None
) -> Tensor:
    """Return the positions that `mask_tokens` chooses in texts padded to `length`, bool [b, length]."""
    columns = torch.arange(length, device=lengths.device)
    can_be_chosen = (columns > 0) & (columns < (lengths - 1)[:, None])
    return can_be_chosen & (_token_draws("token-chosen", length, seeds, spec, word_starts) < spec.ratio)


def _token_draws(what: str, length: int, seeds: Tensor, spec: TokenMaskSpec, word_starts: Tensor | None) -> Tensor:
    """Draw a uniform number in [0, 1) for each token, float64 [b, length].

    With `whole_words` all tokens of a word share the number of its first token. `what` is a salt.
    """
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

    Every token except the first and last of a text (start and end) is chosen with probability `ratio`. The result for a
    sample does not depend on the padded length, its row in the batch, or the device.

    Args:
        ids: token ids, int64 [b, L].
        lengths: number of tokens of each text, int64 [b].
        seeds: sample seeds, int64 [b].
        spec: parameters of the mask; with `whole_words` all tokens of a word are treated like its first token.
        word_starts: bool [b, L], True at the first token of a word; required for whole words.

    Raises: ValueError if `spec.whole_words` is set and `word_starts` is None.
    """
    chosen = chosen_tokens(ids.shape[1], lengths, seeds, spec, word_starts)
    u_action = _token_draws("token-action", ids.shape[1], seeds, spec, word_starts)
    others = torch_draws(seeds, ids.shape[1], hash64("token-other", spec.name)).remainder(spec.vocab_size)
    replaced = chosen & (u_action < spec.replaced)
    randomised = chosen & ~replaced & (u_action < spec.replaced + spec.randomised)
    hidden = torch.where(replaced, torch.full_like(ids, spec.mask_id), ids)
    return TokenMask(torch.where(randomised, others, hidden), chosen)


def patch_mask(seeds: Tensor, grid_size: tuple[int, int], spec: MaskSpec) -> PatchMask:
    """Draw a mask for each sample.

    Args:
        seeds: sample seeds, int64 [b].
        grid_size: rows and columns of patches.
        spec: parameters of the mask.
    """
    if spec.kind == "block":
        return block_patch_mask(seeds, grid_size, spec)
    return random_patch_mask(seeds, grid_size[0] * grid_size[1], spec)


def block_patch_mask(seeds: Tensor, grid_size: tuple[int, int], spec: MaskSpec) -> PatchMask:
    """Keep one rectangle of patches at a random position in the grid (FLIP, Li et al. 2023, table 2: block masking).

    The rectangle has about the aspect ratio of the grid. If it has more patches than are to be kept, the surplus is hidden
    at one end of its top or bottom row.

    Args:
        seeds: sample seeds, int64 [b].
        grid_size: rows and columns of patches.
        spec: parameters of the mask; only its smallest ratio is used.
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
    # Rows and columns are counted from a random side, so that the surplus can be cut at any of the four corners.
    row = torch.where(u[:, 2:3] < 0.5, row, rows - 1 - row)
    column = torch.where(u[:, 3:4] < 0.5, column, columns - 1 - column)
    inside = (
        (row >= top[:, None])
        & (row < top[:, None] + height)
        & (column >= left[:, None])
        & (column < left[:, None] + width)
    )
    # Sort the patches inside the rectangle first, row by row; the surplus is at the end of its last row.
    order = (~inside).long().mul(rows * columns).add(row * columns + column).argsort(dim=1)
    keep = order[:, :kept].sort(dim=1).values
    hidden = torch.ones_like(inside).scatter(1, keep, False)
    return PatchMask(keep, None, hidden)


def random_patch_mask(seeds: Tensor, num_patches: int, spec: MaskSpec) -> PatchMask:
    """Hide patches uniformly at random (MAE, He et al. 2022, section 3).

    Args:
        seeds: sample seeds, int64 [b].
        num_patches: N.
        spec: parameters of the mask; with a range of ratios each sample draws its number of kept patches uniformly.
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
    """Return the total number of patches that `patch_mask` hides over all samples, an int64 scalar.

    The positions of the hidden patches are not drawn.
    """
    most = num_kept(num_patches, spec.ratio[0])
    # All blocks have the size of the smallest ratio.
    fewest = most if spec.kind == "block" else num_kept(num_patches, spec.ratio[1])
    return (num_patches - _drawn_num_keep(seeds, fewest, most, spec)).sum()
