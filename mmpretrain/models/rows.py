"""Layout of texts of different lengths as rows of one length, with one or several texts per row."""

import torch
from torch import Tensor

from mmpretrain.batch import Packing
from mmpretrain.models.attention import Segments, prefers_segments


class Rows:
    """Layout of texts [b, L] in R rows of l tokens, unpacked or packed.

    `mask` confines attention to each text, so that its states do not depend on the other texts in its row.

    Args:
        lengths: number of tokens of each text, int64 [b].
        length: L.
        packing: placement of the texts in the rows; None: one text per row, with R = b and l = L.
    """

    def __init__(self, lengths: Tensor, length: int, packing: Packing | None) -> None:
        self.lengths, self.length, self.packing = lengths, length, packing
        positions = torch.arange(length, device=lengths.device)
        if packing is None:
            self.positions = positions
            """Index of each token within its text, int64 [l], or [R, l] if packed."""
            return
        num_tokens = packing.num_rows * packing.row_length
        slots = packing.slots[:, None] + positions
        is_token = positions < lengths[:, None]
        texts = torch.arange(len(lengths) * length, device=lengths.device)
        # For each of the R x l tokens, its index among the b x L tokens; -1 is padding. The padding of the texts is
        # scattered into one extra element at the end.
        sources = torch.full((num_tokens + 1,), -1, device=lengths.device)
        sources.scatter_(0, slots.where(is_token, num_tokens).flatten(), texts)
        self._sources = sources[:-1].unflatten(0, (packing.num_rows, packing.row_length))
        # For each of the b x L tokens, its index among the R x l tokens; padding has the index of its text's last token.
        self._slots = packing.slots[:, None] + torch.minimum(positions, lengths[:, None] - 1)
        self.positions = self._sources % length

    def pack(self, x: Tensor) -> Tensor:
        """Pack [b, L, ...] into rows [R, l, ...]. No text attends to the padding at the end of a row."""
        if self.packing is None:
            return x
        return x.flatten(0, 1).index_select(0, self._sources.flatten().clamp(min=0)).unflatten(0, self._sources.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """Unpack rows [R, l, d] into texts [b, L, d], with undefined values beyond each text's length."""
        if self.packing is None:
            return x
        return x.flatten(0, 1).index_select(0, self._slots.flatten()).unflatten(0, self._slots.shape)

    def owners(self) -> Tensor:
        """Return the index of the text that owns each token, int64 [R, l]; -1 is padding. Requires packed texts."""
        return self._sources.div(self.length, rounding_mode="floor")

    def mask(self, is_causal: bool) -> Tensor | Segments | None:
        """Return the attention mask, bool [R, 1, 1 or l, l], True where a query may attend to a key.

        With one text per row and `is_causal` it is None: the kernel's own causal mask is sufficient. Packed texts are
        segments where `attention` prefers them.
        """
        if self.packing is None:
            # Under a causal mask only padding attends to padding.
            return None if is_causal else (self.positions < self.lengths[:, None])[:, None, None]
        owners = self.owners()
        if prefers_segments(owners.device):
            return Segments(self._bounds(), self.packing.row_length, owners, is_causal)
        mask = owners[:, :, None] == owners[:, None, :]
        return (mask.tril() if is_causal else mask)[:, None]

    def _bounds(self) -> Tensor:
        """Return the index of the first token of each text and of the padding behind each row's texts, and of the end.

        In ascending order, int32 [b + R + 1]. Rows without padding have an empty segment.
        """
        assert self.packing is not None
        slots, length = self.packing.slots, self.packing.row_length
        taken = slots.new_zeros(self.packing.num_rows).scatter_add_(0, slots // length, self.lengths)
        padding = torch.arange(self.packing.num_rows, device=slots.device) * length + taken
        end = slots.new_full((1,), self.packing.num_rows * length)
        return torch.cat([slots, padding, end]).sort().values.to(torch.int32)

    def token_indices(self, positions: Tensor) -> Tensor:
        """Convert one position per text to token indices within the rows.

        Args:
            positions: index of a token within each text, int64 [b].

        Returns: int64 [R, T], where T is the largest number of texts in a row. Unused entries are 0.
        """
        if self.packing is None:
            return positions[:, None]
        token_indices = positions.new_zeros(self.packing.num_rows, self.packing.most)
        return (
            token_indices.flatten()
            .scatter(0, self._turns(), self.packing.slots % self.packing.row_length + positions)
            .view_as(token_indices)
        )

    def unpack_tokens(self, x: Tensor) -> Tensor:
        """Unpack the states of the tokens in `token_indices`, [R, T, d], into one per text, [b, d]."""
        return x[:, 0] if self.packing is None else x.flatten(0, 1).index_select(0, self._turns())

    def _turns(self) -> Tensor:
        """Return the index of each text among the R x T entries of `token_indices`, int64 [b]."""
        assert self.packing is not None
        return self.packing.slots // self.packing.row_length * self.packing.most + self.packing.turns
