"""Text decoder with cross-attention to image tokens, for CoCa (Yu et al. 2022) and CapPa (Tschannen et al. 2023)."""

import torch
from torch import Tensor, nn

from mmpretrain.models.attention import attention
from mmpretrain.models.blocks import Block
from mmpretrain.models.rows import Rows


class CrossAttention(nn.Module):
    """Multi-head cross-attention."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, rows: Rows | None = None) -> Tensor:
        """Attend from each sequence to its own context.

        Args:
            x: queries, [b, l, d], or [R, l, d] with `rows`.
            context: keys and values, [b, N, c].
            rows: layout of the texts in x; each text attends to its own row of `context`. None: one text per row.

        Returns: a tensor of the shape of x.
        """
        q = self.query(x) if rows is None else rows.unpack(self.query(x))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out_proj(seen if rows is None else rows.pack(seen))


class AttentionPooler(nn.Module):
    """Attentional pooling (CoCa, section 3.2): learned queries attend to N tokens and give one output token each."""

    def __init__(self, width: int, context_width: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.norm_context = nn.LayerNorm(context_width)
        self.attention = CrossAttention(width, context_width, num_heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, context: Tensor) -> Tensor:
        """Pool [b, N, c] into [b, num_queries, d]."""
        queries = self.queries.to(context.dtype).expand(len(context), -1, -1)
        return self.norm(self.attention(queries, self.norm_context(context)))


class FusionBlock(nn.Module):
    """Decoder block: self-attention over text and an MLP, then cross-attention to image tokens and an MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.text = Block(width, num_heads, hidden)
        self.norm_cross = nn.LayerNorm(width)
        self.cross = CrossAttention(width, width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, rows: Rows, context: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Compute text states [R, l, d] from x [R, l, d] and context [b, N, d].

        mask, is_causal: as in `models.blocks`.
        """
        x = self.text(x, mask, is_causal)
        x = x + self.cross(self.norm_cross(x), context, rows)
        return x + self.mlp(self.norm_mlp(x))


class FusionDecoder(nn.Module):
    """Transformer decoder over text states, with cross-attention to image tokens in every block.

    Args:
        width, depth, num_heads: shape of the decoder.
        image_width: width of the image tokens.
        num_queries: number of queries that pool the image tokens first; 0: no pooling, only a linear projection.
    """

    def __init__(self, width: int, depth: int, num_heads: int, image_width: int, num_queries: int) -> None:
        super().__init__()
        self.pooler = AttentionPooler(width, image_width, num_queries, num_heads) if num_queries else None
        self.image_proj = nn.Linear(image_width, width) if not num_queries else None
        self.blocks = nn.ModuleList(FusionBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        branch_std = width**-0.5 * (2 * depth) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.normal_(block.text.attn.in_proj_weight, std=width**-0.5)  # type: ignore[union-attr, arg-type]
            for linear in (block.text.attn.out_proj, block.cross.out_proj, block.text.mlp.c_proj, block.mlp[2]):  # type: ignore[union-attr, index]
                nn.init.normal_(linear.weight, std=branch_std)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Tensor, rows: Rows, image_tokens: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Compute text states [R, l, d] from x [R, l, d] and image_tokens [b, N, c].

        mask, is_causal: as in `models.blocks`.
        """
        context = self.image_proj(image_tokens) if self.pooler is None else self.pooler(image_tokens)  # type: ignore[misc]
        for block in self.blocks:
            x = block(x, rows, context, mask, is_causal)
        return self.norm(x)
