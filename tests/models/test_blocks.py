"""The transformer block against PyTorch's attention, and one token's state alone against all of them."""

import pytest
import torch
from torch import Tensor, nn

from mmpretrain.models.blocks import Block
from mmpretrain.models.groups import LengthGroups
from tests import tiny

LENGTHS = torch.tensor([2, 3, 3, 6, 7])
GROUPS = LengthGroups(5, (3, 7))


def new_block() -> Block:
    block = Block(8, 2, 16)
    nn.init.xavier_uniform_(block.attn.in_proj_weight)
    return tiny.randomize(block).double()  # type: ignore[return-value]


def states(block: Block, x: Tensor, is_causal: bool, picks: Tensor | None = None) -> Tensor:
    """The block's states of rows [5, 7, 8]."""
    masks = [None, None] if is_causal else GROUPS.first(LENGTHS)
    return block(GROUPS.pack(x), GROUPS, masks, is_causal, picks)


def expected_states(block: Block, x: Tensor, is_causal: bool) -> Tensor:
    """One row after the other through `nn.MultiheadAttention`, [5, 7, 8]."""
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=x.dtype)
    theirs.load_state_dict(block.attn.state_dict())
    rows = torch.zeros_like(x)
    for i, length in enumerate(LENGTHS.tolist()):
        row = x[i : i + 1, :length]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if is_causal else None
        y = block.ln_1(row)
        row = row + theirs(y, y, y, attn_mask=hidden)[0]
        rows[i, :length] = (row + block.mlp(block.ln_2(row)))[0]
    return rows


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_block_on_all_tokens_at_once_is_one_on_each_row(is_causal: bool) -> None:
    block = new_block()
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    is_token = torch.arange(7) < LENGTHS[:, None]
    found = GROUPS.unpack(states(block, x, is_causal))
    torch.testing.assert_close(found[is_token], expected_states(block, x, is_causal)[is_token], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_tokens_state_alone_is_that_among_all_with_its_gradients(is_causal: bool) -> None:
    block = new_block()
    x = torch.randn(5, 7, 8, dtype=torch.float64, requires_grad=True)
    picks = torch.tensor([1, 0, 2, 5, 3])  # a row's last token, its first, one between
    weights = torch.randn(5, 8, dtype=torch.float64)
    alone = states(block, x, is_causal, picks)
    among = states(block, x, is_causal)[GROUPS.find(picks)]
    torch.testing.assert_close(alone, among, rtol=1e-10, atol=1e-12)
    inputs = [x, *block.parameters()]
    of_alone, of_among = (torch.autograd.grad((part * weights).sum(), inputs) for part in (alone, among))
    for one, other in zip(of_alone, of_among, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
