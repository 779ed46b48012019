"""Attention, and the choice of its kernel by device and precision. All kernels compute the same function."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prefers_explicit(device: torch.device) -> bool:
    """Return True if explicit softmax(q k^T) v is faster than torch's fused kernel.

    It is on the CPU under bf16 autocast: 1.7 to 3.3 times faster at 24 to 577 tokens, forward and backward. In float32 and
    on other devices the fused kernel is faster.
    """
    if device.type != "cpu":
        return False
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v, with the softmax in float32 or wider.

    Args:
        q, k, v: queries, keys and values, [b, heads, L, d].
        attn_mask: bool, broadcast to [b, heads, L, L]; True where a query may attend to a key.
        is_causal: mask the keys after each query's own position.

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
    """Set `fused_attn` of the attention modules in timm blocks by the rule of `prefers_explicit`.

    A masked pass always uses the fused kernel: the explicit path of older timm releases does not accept boolean masks.
    """
    is_fused = is_masked or not prefers_explicit(device)
    for block in blocks:
        attn = getattr(block, "attn", None)
        if hasattr(attn, "fused_attn"):
            attn.fused_attn = is_fused  # type: ignore[union-attr]
