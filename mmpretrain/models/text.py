"""Text encoder: CLIP's transformer, causal or bidirectional.

Parameters have open_clip's names, so that weights can be exchanged without renaming.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Packing
from mmpretrain.errors import check_number
from mmpretrain.models.blocks import Block, of_picks
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.layers import layers_above_blocks
from mmpretrain.models.rows import Rows


class TextTransformer(nn.Module):
    """Text tower of CLIP (Radford et al. 2021).

    Args:
        vocab_size: number of rows of the token embedding; at least the tokenizer's vocabulary.
        context_length: length of the longest text in tokens, start and end included.
        width: d, width of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: width of a block's MLP as a multiple of `width`.
        causal: if True, tokens attend to themselves and the tokens before them; if False, to all tokens of the text.
        pool: `last` pools the state of the end token, `mean` averages the states of all tokens.
        dropout: dropout probability of the embeddings and of each residual branch; BERT and GPT use .1.

    Raises: ValueError if `width` is not a multiple of `num_heads`, or a number is out of range.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        context_length: int = 77,
        width: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        causal: bool = True,
        pool: Literal["last", "mean"] = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context_length": context_length, "width": width, "depth": depth}
        for name, size in {**sizes, "num_heads": num_heads}.items():
            check_number(f"model.text.{name}", size, at_least=1)
        check_number("model.text.mlp_ratio", mlp_ratio, above=0)
        check_number("model.text.dropout", dropout, at_least=0, below=1)
        if width % num_heads:
            raise ValueError(f"model.text.width is {width}; expected a multiple of num_heads = {num_heads}")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.width = width
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.causal = causal
        self.pool = pool
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.drop = nn.Dropout(dropout)
        blocks = nn.ModuleList(Block(width, num_heads, int(width * mlp_ratio), dropout=dropout) for _ in range(depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self._init_weights(depth)

    @property
    def token_embeddings(self) -> Tensor:
        """Token embedding matrix, [vocabulary, d]."""
        return self.token_embedding.weight

    @property
    def blocks(self) -> Iterable[Any]:
        """Blocks of the transformer, as Any: the type of a container's items does not know their attributes."""
        return cast(nn.ModuleList, self.transformer["resblocks"])

    def _init_weights(self, depth: int) -> None:
        """Apply CLIP's initialisation, which scales residual branches down with depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        branch_std = self.width**-0.5 * (2 * depth) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=branch_std)

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter (see `layers.layers_above`)."""
        return layers_above_blocks(
            self,
            stem="token_embedding|positional_embedding",
            blocks=r"transformer\.resblocks\.(\d+)",
            norm="ln_final",
        )

    def forward(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Encode token ids.

        Args:
            ids: token ids, int64 [b, L].
            lengths: number of tokens of each text, int64 [b].
            packing: computes several texts per row; None: one text per row.
        """
        rows = Rows(lengths, ids.shape[1], packing)
        x = self.drop(self.token_embedding(rows.pack(ids)) + F.embedding(rows.positions, self.positional_embedding))
        mask = rows.mask(self.causal)
        is_causal = self.causal and mask is None
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask, is_causal)

        def tokens() -> Tensor:
            return rows.unpack(self.ln_final(last(x, mask, is_causal)))

        def pooled(encoding: Encoding) -> Tensor:
            if self.pool == "last" and self.training and self.drop.p:
                # Reuse the token states that other objectives read: a second run of the block would draw new dropout masks.
                return of_picks(encoding.tokens, (lengths - 1)[:, None])[:, 0]
            if self.pool == "last":
                return self.ln_final(rows.unpack_tokens(last(x, mask, is_causal, rows.token_indices(lengths - 1))))
            states = encoding.tokens
            is_token = torch.arange(states.shape[1], device=ids.device) < lengths[:, None]
            return (states * is_token[..., None]).sum(1) / lengths[:, None].to(states.dtype)

        return Encoding(tokens, pooled)
