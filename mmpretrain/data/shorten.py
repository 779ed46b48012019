"""Shortening of texts that exceed the maximum length (CLIPA, Li et al. 2023, section 3.2)."""

from enum import Enum

import torch
from torch import Tensor

from mmpretrain.seeds import hash64, torch_draws, torch_uniform


class Shorten(str, Enum):
    """Choice of the tokens to keep of a text that is too long."""

    truncate = "truncate"
    """Keep the first tokens."""
    random = "random"
    """Keep a random subset of the tokens, in their order."""
    block = "block"
    """Keep consecutive tokens from a random start."""


def shortened(text: Tensor, lengths: Tensor, seeds: Tensor, longest: int, how: Shorten) -> tuple[Tensor, Tensor]:
    """Shorten texts to at most `longest` tokens. The first and last token (start and end) are always kept.

    Args:
        text: token ids, int64 [b, L].
        lengths: number of tokens of each text, int64 [b].
        seeds: random bits of each sample, int64 [b].
        longest: maximum number of tokens, at least 3.
        how: choice of the tokens to keep between the first and the last.

    Returns: (text, int64 [b, min(L, longest)]; lengths, int64 [b]).
    """
    width = text.shape[1]
    if width <= longest:
        return text, lengths
    inner, positions = longest - 2, torch.arange(width, device=text.device)
    if how == Shorten.random:
        is_inner = (positions > 0) & (positions < (lengths - 1)[:, None])
        # Halving keeps the ranks of inner tokens below the fill value, so that all other tokens sort last.
        rank = torch_draws(seeds, width, hash64("shorten")) // 2
        order = rank.masked_fill(~is_inner, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        chosen = order[:, :inner].sort(dim=1).values
    else:
        u = torch_uniform(seeds, 1, hash64("shorten"))
        skipped = (
            (u * (lengths - 2 - inner + 1)[:, None]).long()
            if how == Shorten.block
            else torch.zeros_like(lengths)[:, None]
        )
        chosen = 1 + skipped + positions[:inner]
    kept = torch.cat([torch.zeros_like(lengths)[:, None], chosen, (lengths - 1)[:, None]], dim=1)
    kept = torch.where((lengths > longest)[:, None], kept, positions[:longest])
    return text.gather(1, kept), lengths.clamp(max=longest)
