"""The written-out attention is the fused one."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from mmpretrain.models.attention import attention, choose_kernel, prefers_explicit


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_both_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch, is_causal: bool, is_masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = (torch.arange(7) < torch.tensor([[4], [7]]))[:, None, None, :] if is_masked else None
    if is_masked and is_causal:
        visible = mask & torch.ones(7, 7, dtype=torch.bool).tril()  # the fused kernel takes one or the other
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    else:
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    monkeypatch.setattr("mmpretrain.models.attention.prefers_explicit", lambda device: True)
    explicit = attention(q, k, v, mask, is_causal)
    torch.testing.assert_close(explicit, fused, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(fused)
    for ours, theirs in zip(
        torch.autograd.grad((explicit * weights).sum(), (q, k, v)),
        torch.autograd.grad((fused * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_bf16_on_the_cpu_is_written_out() -> None:
    cpu = torch.device("cpu")
    assert not prefers_explicit(cpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert prefers_explicit(cpu) and not prefers_explicit(torch.device("cuda"))
        block = Block(8, 2)
        choose_kernel([block], cpu)
        assert not block.attn.fused_attn
        choose_kernel([block], cpu, is_masked=True)
        assert block.attn.fused_attn
    choose_kernel([block], cpu)
    assert block.attn.fused_attn
