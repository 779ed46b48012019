"""Which kernel computes attention: the same mathematics, a few times faster or slower by device and precision."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prefers_explicit(device: torch.device) -> bool:
    """Whether softmax(q k^T) v, written out, is faster than torch's fused kernel.

    On the CPU in bf16 it is, at 24 to 577 tokens by 1.7 to 3.3 times, forward and backward; in float32, and on other
    devices, the fused kernel is.
    """
    if device.type != "cpu":
        return False
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32 or wider.

    Args:
        q, k, v: [b, heads, L, d].
        attn_mask: bool, broadcast to [b, heads, L, L], True where a key may be seen.
        is_causal: a query sees its own key and those before it.

    Returns: [b, heads, L, d].
    """
    if not prefers_explicit(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu_(1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(dim=-1) @ v  # under autocast, softmax runs in float32


def choose_kernel(blocks: Iterable[nn.Module], device: torch.device, is_masked: bool = False) -> None:
    """The same choice for the attention modules of timm's blocks, which have a switch for it.

    Their written-out path takes boolean masks only in later releases, so that a masked pass stays fused.
    """
    is_fused = is_masked or not prefers_explicit(device)
    for block in blocks:
        attn = getattr(block, "attn", None)
        if hasattr(attn, "fused_attn"):
            attn.fused_attn = is_fused  # type: ignore[union-attr]
