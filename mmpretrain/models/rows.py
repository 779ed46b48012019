"""What a transformer computes of texts of different lengths: rows of one length, with one text in each or several."""

import torch
from torch import Tensor

from mmpretrain.batch import Packing


class Rows:
    """Texts [b, L] as R rows of l tokens: themselves, or several of them packed into one.

    Several are kept apart by `mask`; nothing that a text's tokens see depends on its neighbours.

    Args:
        lengths: int64 [b], each text's number of tokens.
        length: L.
        packing: where the texts stand; None: each has its own row, and l = L.
    """

    def __init__(self, lengths: Tensor, length: int, packing: Packing | None) -> None:
        self.lengths, self.length, self.packing = lengths, length, packing
        positions = torch.arange(length, device=lengths.device)
        if packing is None:
            self.positions = positions
            """int64 [l] or [R, l], each token's number in its text."""
            return
        num_tokens = packing.num_rows * packing.row_length
        slots = packing.slots[:, None] + positions
        is_token = positions < lengths[:, None]
        texts = torch.arange(len(lengths) * length, device=lengths.device)
        # Of each of the R x l tokens, which of the b x L it is; -1 where none is. Padding is written beyond the end.
        sources = torch.full((num_tokens + 1,), -1, device=lengths.device)
        sources.scatter_(0, slots.where(is_token, num_tokens).flatten(), texts)
        self._sources = sources[:-1].unflatten(0, (packing.num_rows, packing.row_length))
        # Of each of the b x L tokens, which of the R x l it is; padding repeats its text's last.
        self._slots = packing.slots[:, None] + torch.minimum(positions, lengths[:, None] - 1)
        self.positions = self._sources % length

    def pack(self, x: Tensor) -> Tensor:
        """[b, L, ...] -> [R, l, ...]; what fills the rows' ends is seen by no text."""
        if self.packing is None:
            return x
        return x.flatten(0, 1).index_select(0, self._sources.flatten().clamp(min=0)).unflatten(0, self._sources.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """[R, l, d] -> [b, L, d], meaningless beyond each text's length."""
        if self.packing is None:
            return x
        return x.flatten(0, 1).index_select(0, self._slots.flatten()).unflatten(0, self._slots.shape)

    def owners(self) -> Tensor:
        """int64 [R, l], whose token each is where texts are packed; -1: nobody's."""
        return self._sources.div(self.length, rounding_mode="floor")

    def mask(self, is_causal: bool) -> Tensor | None:
        """What a token may see, bool [R, 1, 1 or l, l]; None: all, or all before it where `is_causal`."""
        if self.packing is None:
            # Behind a causal mask padding is seen by padding alone.
            return None if is_causal else (self.positions < self.lengths[:, None])[:, None, None]
        owners = self.owners()
        mask = owners[:, :, None] == owners[:, None, :]
        return (mask.tril() if is_causal else mask)[:, None]

    def token_indices(self, positions: Tensor) -> Tensor:
        """One token of each text, by its number there int64 [b] -> by its number in the row, int64 [R, most texts]."""
        if self.packing is None:
            return positions[:, None]
        token_indices = positions.new_zeros(self.packing.num_rows, self.packing.most)
        return (
            token_indices.flatten()
            .scatter(0, self._turns(), self.packing.slots % self.packing.row_length + positions)
            .view_as(token_indices)
        )

    def unpack_tokens(self, x: Tensor) -> Tensor:
        """What was computed of the picks [R, most texts, d] -> [b, d]."""
        return x[:, 0] if self.packing is None else x.flatten(0, 1).index_select(0, self._turns())

    def _turns(self) -> Tensor:
        """int64 [b], each text's place among R x most."""
        assert self.packing is not None
        return self.packing.slots // self.packing.row_length * self.packing.most + self.packing.turns
