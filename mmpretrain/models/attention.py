"""Attention, and the choice of its kernel by device and precision. All kernels compute the same function."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older PyTorch
    varlen_attn = None
# Older releases have the argument is_causal instead of window_size.
_HAS_WINDOWS = varlen_attn is None or "window_size" in inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if _HAS_WINDOWS else {"is_causal": True}

_FLASH_CAPABILITY = (8, 0)
_FLASH_WIDTHS = range(8, 257, 8)


@dataclass(frozen=True)
class Segments:
    """Mask of packed rows on CUDA: each token attends to the tokens of its own segment alone.

    Flash attention of variable length computes it without a mask in memory.
    """

    bounds: Tensor
    """int32 [n + 1], index of each segment's first token among the tokens of all rows, and the number of tokens."""
    longest: int
    """Upper bound of the segments' lengths."""
    owners: Tensor
    """Number of the segment that owns each token, int64 [R, l]; the segments of padding share one number."""
    is_causal: bool
    """Mask the keys after each query's own position."""

    def dense(self) -> Tensor:
        """Return the same mask as a bool [R, 1, l, l], for kernels that take no segments."""
        mask = self.owners[:, :, None] == self.owners[:, None, :]
        return (mask.tril() if self.is_causal else mask)[:, None]

    def of_queries(self, token_indices: Tensor) -> Tensor:
        """Return the mask of some queries in each row: int64 [R, m] -> bool [R, 1, m, l]."""
        mask = self.owners.gather(1, token_indices)[:, :, None] == self.owners[:, None, :]
        if self.is_causal:
            mask &= torch.arange(self.owners.shape[1], device=mask.device) <= token_indices[..., None]
        return mask[:, None]


def prefers_segments(device: torch.device) -> bool:
    """Return True if `attention` computes packed rows by segments: on CUDA under autocast, where PyTorch can."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY
    )


def _has_flash(q: Tensor) -> bool:
    """Return True if flash attention takes queries of this type and width."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in _FLASH_WIDTHS


def _within_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Compute attention within segments of rows; shapes as in `attention`."""
    if not _has_flash(q):
        return attention(q, k, v, segments.dense())
    tokens = [each.transpose(1, 2).flatten(0, 1) for each in (q, k, v)]
    bounds, longest = segments.bounds, segments.longest
    attended = varlen_attn(*tokens, bounds, bounds, longest, longest, **(_CAUSAL if segments.is_causal else {}))
    return cast(Tensor, attended.unflatten(0, (len(q), -1)).transpose(1, 2))


def prefers_explicit(device: torch.device) -> bool:
    """Return True if explicit softmax(q k^T) v is faster than torch's fused kernel.

    It is on the CPU under bf16 autocast: 1.7 to 3.3 times faster at 24 to 577 tokens, forward and backward. In float32 and
    on other devices the fused kernel is faster.
    """
    if device.type != "cpu":
        return False
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | Segments | None = None, is_causal: bool = False
) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v, with the softmax in float32 or wider.

    Args:
        q, k, v: queries, keys and values, [b, heads, L, d].
        attn_mask: bool, broadcast to [b, heads, L, L], True where a query may attend to a key; or segments of the rows.
        is_causal: mask the keys after each query's own position.

    Returns: [b, heads, L, d].
    """
    if isinstance(attn_mask, Segments):
        return _within_segments(q, k, v, attn_mask)
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
