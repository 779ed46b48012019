"""Text encoders: CLIP's causal transformer and its bidirectional sister, computed without padding.

Parameters carry open_clip's names, so that weights go over one to one.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.models.attention import attention
from mmpretrain.usage import check_number


@dataclass(frozen=True)
class TextEncoding:
    """tokens [b, L, d], meaningless beyond each row's length; pooled [b, d]; lengths int64 [b]."""

    tokens: Tensor
    pooled: Tensor
    lengths: Tensor


def by_length(fn: Callable[[Tensor, Tensor], Tensor], rows: Tensor, lengths: Tensor, cuts: Sequence[int]) -> Tensor:
    """Apply `fn` to equal slices of rows, each cut to its own longest, and pad the results back to one tensor.

    Args:
        fn: (rows [b / groups, l, ...], lengths [b / groups]) -> [b / groups, l, d].
        rows: [b, L, ...], sorted by length.
        lengths: int64 [b].
        cuts: what each of the `len(cuts)` slices is cut to; known on the host, so that nothing synchronises.

    Returns: [b, L, d], zero beyond each slice's cut.
    """
    parts = [
        F.pad(fn(slice_rows[:, :cut], slice_lengths), (0, 0, 0, rows.shape[1] - cut))
        for slice_rows, slice_lengths, cut in zip(
            rows.tensor_split(len(cuts)), lengths.tensor_split(len(cuts)), cuts, strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class SelfAttention(nn.Module):
    """Multi-head self-attention with `nn.MultiheadAttention`'s parameters."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """[b, L, d] -> [b, L, d]; attn_mask bool [b, 1, 1, L] is True where a key may be seen."""
        b, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(b, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, attn_mask, is_causal)
        return self.out_proj(out.transpose(1, 2).reshape(b, length, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, hidden)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(hidden, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """[b, L, d] -> [b, L, d]."""
        x = x + self.attn(self.ln_1(x), attn_mask, is_causal)
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """The text tower of CLIP (Radford et al. 2021).

    Args:
        vocab_size, context_length, width, depth, num_heads, mlp_ratio: its shape.
        causal: tokens see only what stands before them; else all but padding.
        pool: `last` is the end token's state, `mean` the mean over tokens.

    Raises: ValueError if the heads do not divide the width, and for sizes below 1.
    """

    projects = False
    pad_id = end_id = None
    adopts_padding = False

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
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context_length": context_length, "width": width, "depth": depth}
        for name, size in {**sizes, "num_heads": num_heads}.items():
            check_number(f"model.text.{name}", size, at_least=1)
        check_number("model.text.mlp_ratio", mlp_ratio, above=0)
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
        blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self._init_weights(depth)

    @property
    def _blocks(self) -> Iterable[Any]:
        """The transformer's blocks; what a container holds has no type that knows its parts."""
        return cast(nn.ModuleList, self.transformer["resblocks"])

    def _init_weights(self, depth: int) -> None:
        """CLIP's initialisation: residual branches are scaled down with depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        branch_std = self.width**-0.5 * (2 * depth) ** -0.5
        for block in self._blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=branch_std)

    def _encode(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Token embeddings [b, l, d], lengths int64 [b] -> [b, l, d]."""
        length = x.shape[1]
        # Causal attention never looks at padding: what follows the end token cannot matter.
        attn_mask = None
        if not self.causal:
            attn_mask = (torch.arange(length, device=x.device) < lengths[:, None])[:, None, None, :]
        x = x + self.positional_embedding[:length]
        for block in self._blocks:
            x = block(x, attn_mask, self.causal)
        return self.ln_final(x)

    def forward(self, ids: Tensor, lengths: Tensor, cuts: Sequence[int]) -> TextEncoding:
        """Encode token ids int64 [b, L], rows sorted by length as `cuts` says (see `by_length`)."""
        # Looked up once for all groups: each look-up's gradient is as large as the vocabulary.
        tokens = by_length(self._encode, self.token_embedding(ids), lengths, cuts)
        if self.pool == "last":
            pooled = tokens[torch.arange(len(ids), device=ids.device), lengths - 1]
        else:
            is_token = torch.arange(tokens.shape[1], device=ids.device) < lengths[:, None]
            pooled = (tokens * is_token[..., None]).sum(1) / lengths[:, None].to(tokens.dtype)
        return TextEncoding(tokens, pooled, lengths)
