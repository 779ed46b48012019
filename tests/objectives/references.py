"""What objectives read of a model, computed by other means: text by text, with torch's own layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.models.blocks import Block, SelfAttention
from mmpretrain.models.fusion import CrossAttention, FusionDecoder
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.text import TextTransformer


def _attention(num_heads: int, projection: tuple[Tensor, Tensor], out: nn.Linear) -> nn.MultiheadAttention:
    weight, bias = projection
    attention = nn.MultiheadAttention(weight.shape[1], num_heads, batch_first=True, dtype=weight.dtype)
    attention.in_proj_weight, attention.in_proj_bias = nn.Parameter(weight), nn.Parameter(bias)
    attention.out_proj.load_state_dict(out.state_dict())
    return attention.eval()


def _self_attention(ours: SelfAttention) -> nn.MultiheadAttention:
    return _attention(ours.num_heads, (ours.in_proj_weight, ours.in_proj_bias), ours.out_proj)


def _cross_attention(ours: CrossAttention) -> nn.MultiheadAttention:
    parts = (ours.query, ours.key_value)
    projection = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    return _attention(ours.num_heads, projection, ours.out_proj)


def _block(ours: Block, x: Tensor, unseen: Tensor | None) -> Tensor:
    y = ours.ln_1(x)
    x = x + _self_attention(ours.attn)(y, y, y, attn_mask=unseen, need_weights=False)[0]
    return x + ours.mlp(ours.ln_2(x))


def _later(length: int) -> Tensor:
    """Mask of what a causal transformer must not see, bool [l, l]."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def text_states(text: TextTransformer, ids: Tensor) -> Tensor:
    """States [1, l, d] of one text without padding, int64 [l]."""
    x = (text.token_embedding.weight[ids] + text.positional_embedding[: len(ids)])[None]
    for block in text.blocks:
        x = _block(block, x, _later(len(ids)) if text.causal else None)
    return text.ln_final(x)


def decoder_states(decoder: FusionDecoder, x: Tensor, image_tokens: Tensor, is_causal: bool) -> Tensor:
    """States [1, l, d] of the decoder for the inputs x [1, l, d] of one text and its image's tokens [1, N, c]."""
    if decoder.pooler is None:
        assert decoder.image_proj is not None
        context = decoder.image_proj(image_tokens)
    else:
        pooler = decoder.pooler
        # The image tokens have a width of their own, which MultiheadAttention takes by projecting them first.
        width = pooler.queries.shape[1]
        keys, values = pooler.attention.key_value(pooler.norm_context(image_tokens)).chunk(2, dim=-1)
        plain = torch.eye(width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
        attention = _attention(
            pooler.attention.num_heads,
            (torch.cat([pooler.attention.query.weight, plain[0], plain[0]]),
             torch.cat([pooler.attention.query.bias, plain[1], plain[1]])),
            pooler.attention.out_proj,
        )  # fmt: skip
        context = pooler.norm(attention(pooler.queries[None], keys, values, need_weights=False)[0])
    for block in decoder.blocks:
        x = _block(block.text, x, _later(x.shape[1]) if is_causal else None)
        x = x + _cross_attention(block.cross)(block.norm_cross(x), context, context, need_weights=False)[0]
        x = x + block.mlp(block.norm_mlp(x))
    return decoder.norm(x)


def embeddings(model: ImageTextModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings [b, e] of unit length of the images and of the texts of stream `pairs`."""
    image = model.image_projection(model.image.trunk(model.normalize(batch.images("pairs"))))  # type: ignore[misc, operator]
    text, lengths = batch.texts("pairs")
    assert isinstance(model.text, TextTransformer)
    ends = [text_states(model.text, ids[:length])[0, -1] for ids, length in zip(text, lengths.tolist(), strict=True)]
    return F.normalize(image, dim=-1), F.normalize(model.text_projection(torch.stack(ends)), dim=-1)  # type: ignore[misc]
