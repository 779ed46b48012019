"""Rows of different lengths as one matrix of tokens: next to nothing is computed on padding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LengthGroups:
    """Rows sorted by length, in equal slices that are each cut to their own longest, as one matrix of T tokens.

    What looks at each token alone (norms, projections, MLPs) takes all T of them at once; attention goes slice by slice.

    Args:
        num_rows: b.
        cuts: what each of the `len(cuts)` slices is cut to; known on the host, so that nothing synchronises.
    """

    def __init__(self, num_rows: int, cuts: Sequence[int]) -> None:
        rows, more = divmod(num_rows, len(cuts))
        self.shapes = [(rows + (i < more), cut) for i, cut in enumerate(cuts)]  # as torch.tensor_split has them
        self._sizes = [rows * cut for rows, cut in self.shapes]

    def slices(self, tokens: Tensor) -> list[Tensor]:
        """[T, ...] -> [b_g, l_g, ...] of each slice."""
        parts = tokens.split(self._sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[b, ...] -> [b_g, ...] of each slice."""
        return rows.split([rows for rows, _ in self.shapes])

    def pack(self, rows: Tensor) -> Tensor:
        """[b, L, ...] -> [T, ...]."""
        parts = zip(self.rows(rows), self.shapes, strict=True)
        return _joined([part[:, :cut].flatten(0, 1) for part, (_, cut) in parts])

    def unpack(self, tokens: Tensor) -> Tensor:
        """[T, d] -> [b, L, d], L the longest cut, zero beyond each slice's own."""
        longest = max(cut for _, cut in self.shapes)
        return _joined([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in self.slices(tokens)])

    def map(self, fn: Callable[..., Tensor], tokens: Tensor, *others: Sequence[Any]) -> Tensor:
        """Apply `fn(slice [b_g, l_g, ...], what the others have for it) -> [b_g, l_g, d]`: [T, ...] -> [T, d]."""
        parts = zip(self.slices(tokens), *others, strict=True)
        return _joined([fn(*part).flatten(0, 1) for part in parts])

    def places(self, device: torch.device) -> Tensor:
        """int64 [T], each token's number in its row."""
        return torch.cat([torch.arange(cut, device=device).repeat(rows) for rows, cut in self.shapes])

    def find(self, places: Tensor) -> Tensor:
        """int64 [b], where among the T tokens each row's token number `places` [b] stands."""
        starts, start = [], 0
        for rows, cut in self.shapes:
            starts.append(start + cut * torch.arange(rows, device=places.device))
            start += rows * cut
        return torch.cat(starts) + places

    def first(self, lengths: Tensor) -> list[Tensor]:
        """Masks of attention to each row's first `lengths` [b] tokens, bool [b_g, 1, 1, l_g] for each slice."""
        parts = zip(self.rows(lengths), self.shapes, strict=True)
        return [(torch.arange(cut, device=lengths.device) < part[:, None])[:, None, None] for part, (_, cut) in parts]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
