"""Prediction targets of language models, and their positions."""

import torch
from torch import Tensor

from mmpretrain.models.encoders import TextEncoder


def check_tied_head(text: TextEncoder, config_path: str) -> None:
    """Raises: ValueError if the token embeddings cannot be the output matrix, because they have another width than states."""
    width = text.token_embeddings.shape[1]
    if width != text.width:
        raise ValueError(
            f"{config_path} predicts tokens with the token embeddings, whose width {width} is not that of the states, "
            f"{text.width}; expected a model.text with the same, unlike ALBERT's or ELECTRA's"
        )


def next_tokens(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next token at each position but the last.

    Args:
        ids: token ids, int64 [b, L].
        lengths: number of tokens of each text, int64 [b].

    Returns: (next token, int64 [b, L - 1]; bool [b, L - 1], False where the text has no next token).
    """
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    return ids[:, 1:], positions < (lengths - 1)[:, None]


def true_positions(mask: Tensor, number: int | None) -> tuple[Tensor, Tensor]:
    """Return the (rows, columns) where a mask is True, int64 [n] each. Indexing with them is equivalent to the mask.

    Args:
        mask: bool [b, L].
        number: n, the exact number of True elements. None: it is counted, which makes the host wait for the device.
    """
    found = mask.nonzero() if number is None else torch.nonzero_static(mask, size=number)
    return found[:, 0], found[:, 1]
