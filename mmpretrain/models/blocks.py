"""Transformer block of the text encoders, the decoders and open_clip's towers.

Parameters have open_clip's names, so that weights can be exchanged without renaming.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.models.attention import Segments, attention


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | Segments | None, is_causal: bool = False, token_indices: Tensor | None = None
    ) -> Tensor:
        """Compute self-attention over x [b, l, d], for all tokens or only for selected queries.

        Args:
            x: tokens, [b, l, d].
            mask: bool [b, 1, 1 or l, l], True where a query may attend to a key, or segments of the rows; None: no mask.
            is_causal: mask the keys after each query's own position.
            token_indices: int64 [b, m], indices of the tokens that act as queries; None: all of them.

        Returns: [b, l, d], or [b, m, d] with `token_indices`.
        """
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        if token_indices is None:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, *heads))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
        else:
            width = x.shape[-1]
            q = F.linear(of_picks(x, token_indices), self.in_proj_weight[:width], self.in_proj_bias[:width])
            q = q.unflatten(-1, heads).transpose(1, 2)
            kv = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).unflatten(-1, (2, *heads))
            k, v = kv.permute(2, 0, 3, 1, 4)
            if is_causal:
                mask, is_causal = (
                    (torch.arange(x.shape[1], device=x.device) <= token_indices[..., None])[:, None],
                    False,
                )
            elif isinstance(mask, Segments):
                mask = mask.of_queries(token_indices)
            elif mask is not None and mask.shape[2] > 1:
                mask = of_picks(mask[:, 0], token_indices)[:, None]
        return self.out_proj(attention(q, k, v, mask, is_causal).transpose(1, 2).flatten(2))


def of_picks(x: Tensor, token_indices: Tensor) -> Tensor:
    """Gather tokens of x [b, l, d] by their indices int64 [b, m]; returns [b, m, d]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], token_indices]  # len() fixes the size in torch.export


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        width: number of channels of the tokens.
        num_heads: number of attention heads.
        hidden: hidden width of the MLP.
        activation: activation of the MLP; None: GELU.
        dropout: dropout probability of both residual branches.
    """

    def __init__(
        self, width: int, num_heads: int, hidden: int, activation: nn.Module | None = None, dropout: float = 0.0
    ) -> None:
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
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | Segments | None, is_causal: bool = False, token_indices: Tensor | None = None
    ) -> Tensor:
        """Compute the states of all tokens [b, l, d], or only of those in `token_indices`, [b, m, d].

        The arguments are those of `SelfAttention.forward`.
        """
        attended = self.drop(self.attn(self.ln_1(x), mask, is_causal, token_indices))
        x = (x if token_indices is None else of_picks(x, token_indices)) + attended
        return x + self.drop(self.mlp(self.ln_2(x)))
