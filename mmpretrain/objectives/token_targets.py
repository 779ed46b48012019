"""Which tokens a language model predicts, and where."""

import torch
from torch import Tensor


def next_tokens(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The next token at each position but the last.

    Args:
        ids: int64 [b, L].
        lengths: int64 [b].

    Returns: (the following token, int64 [b, L - 1]; whether there is one, bool [b, L - 1]).
    """
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    return ids[:, 1:], positions < (lengths - 1)[:, None]


def true_positions(mask: Tensor, number: int | None) -> tuple[Tensor, Tensor]:
    """The (rows, columns) where a mask is true, int64 [n] each; they index a tensor as the mask itself does.

    Args:
        mask: bool [b, L].
        number: n, exactly; None if it is not known: the host then waits for the device to count.
    """
    found = mask.nonzero() if number is None else torch.nonzero_static(mask, size=number)
    return found[:, 0], found[:, 1]
