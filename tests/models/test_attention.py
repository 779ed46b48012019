"""The written-out attention is the fused one."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from mmpretrain.batch import Packing
from mmpretrain.data.packing import packed
from mmpretrain.models.attention import attention, choose_kernel, prefers_explicit, prefers_segments
from mmpretrain.models.text import TextTransformer


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


def by_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    _: Tensor,
    longest: int,
    __: int,
    **causal: object,
) -> Tensor:
    """Variable-length attention written out segment by segment: [tokens, heads, d]."""
    parts = []
    for start, end in pairwise(starts.tolist()):
        assert end - start <= longest
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[start:end]))
    return torch.cat(parts)


def packed_texts() -> tuple[Tensor, Tensor, Packing]:
    lengths = torch.randint(2, 20, (12,))
    packing = packed(lengths, 24)
    assert packing is not None and packing.most > 1
    return torch.randint(1, 50, (12, 24)), lengths, packing


@pytest.mark.parametrize("causal", [True, False])
def test_texts_by_segments_have_the_states_and_gradients_of_a_mask(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextTransformer(50, 24, 16, 2, 2, causal=causal).double()
    ids, lengths, packing = packed_texts()
    is_token = torch.arange(24) < lengths[:, None]
    found = []
    for is_segmented in (False, True):
        monkeypatch.setattr("mmpretrain.models.rows.prefers_segments", lambda device, is_so=is_segmented: is_so)
        monkeypatch.setattr("mmpretrain.models.attention._has_flash", lambda q: True)
        monkeypatch.setattr("mmpretrain.models.attention.varlen_attn", by_segments)
        encoding = encoder(ids, lengths, packing)
        states, pooled = encoding.tokens[is_token], encoding.pooled
        loss = (states.square() * torch.arange(16)).sum() + (pooled * torch.arange(16)).sum()
        found.append([states, pooled, *torch.autograd.grad(loss, list(encoder.parameters()))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_segments_need_flash_attention_or_become_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lengths, packing = packed_texts()
    encoder = TextTransformer(50, 24, 16, 2, 2).double()  # flash attention has no float64
    expected = encoder(ids, lengths, packing).pooled
    monkeypatch.setattr("mmpretrain.models.rows.prefers_segments", lambda device: True)
    monkeypatch.setattr("mmpretrain.models.attention.varlen_attn", lambda *_, **__: pytest.fail("no flash attention"))
    assert torch.equal(encoder(ids, lengths, packing).pooled, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_packed_texts_on_the_gpu_have_the_states_of_the_cpu(causal: bool) -> None:
    encoder = TextTransformer(50, 24, 64, 2, 2, causal=causal)
    ids, lengths, packing = packed_texts()
    is_token = torch.arange(24) < lengths[:, None]
    expected = encoder(ids, lengths)
    cuda = torch.device("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert prefers_segments(cuda)
        found = encoder.to(cuda)(ids.to(cuda), lengths.to(cuda), packing.map(lambda tensor: tensor.to(cuda)))
        states, pooled = found.tokens.float().cpu(), found.pooled.float().cpu()
    torch.testing.assert_close(pooled, expected.pooled, rtol=0.05, atol=0.05)
    torch.testing.assert_close(states[is_token], expected.tokens[is_token], rtol=0.05, atol=0.05)
