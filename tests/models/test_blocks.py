"""The transformer block against PyTorch's attention, and some tokens' states alone against all of them."""

import pytest
import torch
from torch import Tensor, nn

from mmpretrain.models.blocks import Block
from tests import tiny

LENGTHS = torch.tensor([2, 3, 3, 6, 7])


def new_block() -> Block:
    block = Block(8, 2, 16)
    nn.init.xavier_uniform_(block.attn.in_proj_weight)
    return tiny.randomize(block).double()  # type: ignore[return-value]


def padding_mask() -> Tensor:
    """Keys that are no padding, bool [5, 1, 1, 7]."""
    return (torch.arange(7) < LENGTHS[:, None])[:, None, None]


def square_mask() -> Tensor:
    """Any keys, but always the token's own, bool [5, 1, 7, 7]."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(5, 1, 7, 7, generator=generator) < 0.4) | torch.eye(7, dtype=torch.bool)


def expected_states(block: Block, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """One row after the other through `nn.MultiheadAttention`, [5, 7, 8]."""
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=x.dtype)
    theirs.load_state_dict(block.attn.state_dict())
    seen = torch.ones(5, 1, 7, 7, dtype=torch.bool) if mask is None else mask.expand(5, 1, 7, 7)
    rows = []
    for i in range(len(x)):
        row, hidden = x[i : i + 1], ~seen[i, 0]
        if is_causal:
            hidden = hidden | torch.ones(7, 7, dtype=torch.bool).triu(1)
        y = block.ln_1(row)
        row = row + theirs(y, y, y, attn_mask=hidden)[0]
        rows.append(row + block.mlp(block.ln_2(row)))
    return torch.cat(rows)


MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "padding": (padding_mask(), False),
    "square": (square_mask(), False),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_block_is_pytorchs_attention_and_an_mlp(kind: str) -> None:
    block, (mask, is_causal) = new_block(), MASKS[kind]
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    expected = expected_states(block, x, mask, is_causal)
    torch.testing.assert_close(block(x, mask, is_causal), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_some_tokens_states_alone_are_those_among_all_with_their_gradients(kind: str) -> None:
    block, (mask, is_causal) = new_block(), MASKS[kind]
    x = torch.randn(5, 7, 8, dtype=torch.float64, requires_grad=True)
    token_indices = torch.tensor([[1, 0], [0, 2], [2, 2], [5, 3], [6, 1]])
    weights = torch.randn(5, 2, 8, dtype=torch.float64)
    alone = block(x, mask, is_causal, token_indices)
    among = block(x, mask, is_causal).gather(1, token_indices[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(alone, among, rtol=1e-10, atol=1e-12)
    inputs = [x, *block.parameters()]
    of_alone, of_among = (torch.autograd.grad((part * weights).sum(), inputs) for part in (alone, among))
    for one, other in zip(of_alone, of_among, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
