"""What is kept of texts that are longer than they may be (CLIPA, Li et al. 2023, section 3.2)."""

from enum import Enum

import torch
from torch import Tensor

from mmpretrain.seeds import hash64, torch_draws, torch_uniform


class Shorten(str, Enum):
    """Which tokens of a text that is too long are kept."""

    truncate = "truncate"
    """The first ones."""
    random = "random"
    """Any, in their order."""
    block = "block"
    """As many in a row, from anywhere."""


def shortened(text: Tensor, lengths: Tensor, seeds: Tensor, longest: int, how: Shorten) -> tuple[Tensor, Tensor]:
    """Texts of at most `longest` tokens: their first and last one (start and end), and what of those between is kept.

    Args:
        text: int64 [b, L]; lengths: int64 [b]; seeds: int64 [b].
        longest: at least 3.
        how: which tokens are kept.

    Returns: (int64 [b, min(L, longest)], lengths int64 [b]).
    """
    width = text.shape[1]
    if width <= longest:
        return text, lengths
    inner, positions = longest - 2, torch.arange(width, device=text.device)
    if how == Shorten.random:
        is_inner = (positions > 0) & (positions < (lengths - 1)[:, None])
        # Halved: what is no inner token comes behind all that are.
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
