"""The transformer block of the text encoders, the decoders and open_clip's towers.

Parameters carry open_clip's names, so that weights go over one to one.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.models.attention import attention
from mmpretrain.models.groups import LengthGroups

Masks = Sequence[Tensor | None]
"""What may be seen in each slice of a batch, bool [b_g, 1, 1 or l_g, l_g], True where a key may be; None: all of it."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with `nn.MultiheadAttention`'s parameters."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, groups: LengthGroups, masks: Masks, is_causal: bool, picks: Tensor | None = None
    ) -> Tensor:
        """[T, d] -> [T, d], or with `picks`, int64 [b], [b, d]: what one token of each row, by its number there, sees."""
        if picks is not None:
            return self._of_picks(x, groups, groups.first(picks + 1) if is_causal else masks, picks)

        def attend(qkv: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            return attention(q, k, v, mask, is_causal).transpose(1, 2).flatten(2)

        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(groups.map(attend, qkv, masks))

    def _of_picks(self, x: Tensor, groups: LengthGroups, masks: Masks, picks: Tensor) -> Tensor:
        width = x.shape[-1]

        def attend(kv: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
            k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q = q.unflatten(-1, (1, self.num_heads, -1)).transpose(1, 2)
            return attention(q, k, v, mask).transpose(1, 2).flatten(2)

        q = F.linear(x[groups.find(picks)], self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
        return self.out_proj(groups.map(attend, kv, groups.rows(q), masks))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width, num_heads, hidden: its shape; `hidden` is the MLP's.
        activation: the MLP's; None: GELU.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, hidden)),
            ("gelu", nn.GELU() if activation is None else activation),
            ("c_proj", nn.Linear(hidden, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(
        self, x: Tensor, groups: LengthGroups, masks: Masks, is_causal: bool, picks: Tensor | None = None
    ) -> Tensor:
        """[T, d] -> [T, d], or with `picks`, int64 [b], the state of one token of each row alone, [b, d]."""
        attended = self.attn(self.ln_1(x), groups, masks, is_causal, picks)
        x = (x if picks is None else x[groups.find(picks)]) + attended
        return x + self.mlp(self.ln_2(x))
