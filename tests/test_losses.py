"""Losses against open_clip's and against plain loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmpretrain.losses import (
    info_nce,
    multi_positive_info_nce,
    sigmoid_loss,
    token_cross_entropy,
)


def leaves(b: int = 7, e: int = 5, scale: float = 13.0, bias: float = -3.0) -> list[Tensor]:
    """(image, text, logit_scale, logit_bias) in float64, gradients wanted."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(b, e, dtype=torch.float64, generator=generator), dim=-1) for _ in range(2)]
    scalars = [torch.tensor([value], dtype=torch.float64) for value in (scale, bias)]
    return [tensor.requires_grad_() for tensor in rows + scalars]


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours.squeeze(), theirs.squeeze(), rtol=1e-10, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 13.0, 100.0])
def test_info_nce_is_open_clips(scale: float) -> None:
    image, text, logit_scale, _ = leaves(scale=scale)
    theirs = ClipLoss()(image, text, logit_scale)
    assert_same_gradients(info_nce(image, text, logit_scale), theirs, [image, text, logit_scale])


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (120.0, -15.0)])
def test_sigmoid_loss_is_open_clips(scale: float, bias: float) -> None:
    inputs = leaves(scale=scale, bias=bias)
    assert_same_gradients(sigmoid_loss(*inputs), SigLipLoss()(*inputs), inputs)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("scale", [1.0, 13.0, 100.0])
def test_chunks_of_any_size_give_the_same_loss_and_gradients(num_rows: int, scale: float) -> None:
    """Held against the plain graph of all similarities at once, copies and groups among them."""
    image, text, logit_scale, bias = leaves(scale=scale)
    ids, groups = torch.tensor([4, 9, 4, 2, 9, 9, 7]), torch.tensor([0, 0, 1, 2, 1, 3, 0])
    chunk_bytes = num_rows * len(image) * image.element_size()

    def logits() -> Tensor:
        return logit_scale * image @ text.T

    own = torch.eye(len(image), dtype=torch.bool)
    copies = (ids[:, None] == ids) & ~own
    labels = torch.arange(len(image))
    masked = logits().masked_fill(copies, -torch.inf)
    plain = (F.cross_entropy(masked, labels) + F.cross_entropy(masked.T, labels)) / 2
    assert_same_gradients(info_nce(image, text, logit_scale, ids, chunk_bytes), plain, [image, text, logit_scale])
    targets = (groups[:, None] == groups).double()
    targets = targets / targets.sum(1, keepdim=True)
    plain = (F.cross_entropy(logits(), targets) + F.cross_entropy(logits().T, targets)) / 2
    assert_same_gradients(
        multi_positive_info_nce(image, text, logit_scale, groups, chunk_bytes), plain, [image, text, logit_scale]
    )
    signs = 2 * own.double() - 1
    plain = -F.logsigmoid(signs * (logits() + bias)).masked_fill(copies, 0.0).sum() / len(image)
    inputs = [image, text, logit_scale, bias]
    assert_same_gradients(sigmoid_loss(*inputs, ids, chunk_bytes), plain, inputs)


@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss"])
def test_a_second_derivative_is_refused(name: str) -> None:
    image, text, scale, bias = leaves(scale=10.0)
    loss = info_nce(image, text, scale) if name == "info_nce" else sigmoid_loss(image, text, scale, bias)
    (gradient,) = torch.autograd.grad(loss.square(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("loss", "others"),
    [(info_nce, ()), (multi_positive_info_nce, (torch.arange(4),)), (sigmoid_loss, (torch.zeros(()),))],
)
def test_rows_narrower_than_float32_are_refused(loss: Callable[..., Tensor], others: tuple[Tensor, ...]) -> None:
    rows = torch.eye(4, dtype=torch.bfloat16)
    for image, text in ((rows, rows), (rows.float(), rows)):
        with pytest.raises(ValueError, match=r"^rows are torch\.bfloat16; expected torch\.float32 or float64"):
            loss(image, text, torch.ones(()), *others)


def test_losses_without_gradients_are_the_same() -> None:
    image, text, logit_scale, bias = leaves()
    groups = torch.tensor([0, 0, 1, 2, 1, 3, 0])
    for loss in (
        lambda: info_nce(image, text, logit_scale),
        lambda: multi_positive_info_nce(image, text, logit_scale, groups),
        lambda: sigmoid_loss(image, text, logit_scale, bias),
    ):
        with torch.no_grad():
            without = loss()
        assert not without.requires_grad and torch.equal(without, loss().detach())


def test_info_nce_takes_no_copy_for_a_negative() -> None:
    image, text, logit_scale, _ = leaves()
    ids = [4, 9, 4, 2, 9, 9, 7]
    terms = []
    for i, own in enumerate(ids):
        others = [j for j, other in enumerate(ids) if j == i or other != own]
        for queries, gallery in ((image, text), (text, image)):
            logits = [logit_scale * (queries[i] * gallery[j]).sum() for j in others]
            terms.append(torch.logsumexp(torch.cat(logits), 0) - logit_scale * (queries[i] * gallery[i]).sum())
    theirs = torch.cat(terms).sum() / (2 * len(ids))
    assert_same_gradients(info_nce(image, text, logit_scale, torch.tensor(ids)), theirs, [image, text, logit_scale])


def test_sigmoid_loss_takes_no_copy_for_a_negative() -> None:
    inputs = image, text, logit_scale, logit_bias = leaves()
    ids = [4, 9, 4, 2, 9, 9, 7]
    total = torch.zeros(1, dtype=torch.float64)
    for i in range(len(ids)):
        for j in range(len(ids)):
            if i == j or ids[i] != ids[j]:
                sign = 1 if i == j else -1
                total = total + torch.log1p(torch.exp(-sign * (logit_scale * (image[i] @ text[j]) + logit_bias)))
    ours = sigmoid_loss(image, text, logit_scale, logit_bias, torch.tensor(ids))
    assert_same_gradients(ours, total / len(ids), inputs)


@pytest.mark.parametrize("ids", [None, torch.zeros(4, dtype=torch.int64)])
@pytest.mark.parametrize("rows", [1, 4])
def test_contrastive_losses_and_gradients_stay_finite_without_negatives(rows: int, ids: Tensor | None) -> None:
    inputs = leaves(b=rows)
    ids = None if ids is None else ids[:rows]
    for loss in (info_nce(*inputs[:3], ids), sigmoid_loss(*inputs, ids)):
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert all(torch.isfinite(value).all() for value in (loss, *gradients) if value is not None)


def test_info_nce_without_negatives_is_zero() -> None:
    image, text, logit_scale, _ = leaves()
    assert info_nce(image, text, logit_scale, torch.zeros(7, dtype=torch.int64)).item() == 0


def test_multi_positive_info_nce_by_hand() -> None:
    """Three pairs, the first two of one group; every similarity is written down."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    text = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    # s <x_i, y_j>:   y1   y2   y3
    logits = [[1.6, 2.0, 0.0], [1.2, 0.0, 2.0], [1.92, 1.2, 1.6]]
    positives = [[0, 1], [0, 1], [2]]
    rows, columns = 0.0, 0.0
    for i in range(3):
        over_row = math.log(sum(math.exp(logits[i][j]) for j in range(3)))
        over_column = math.log(sum(math.exp(logits[j][i]) for j in range(3)))
        rows += sum(over_row - logits[i][k] for k in positives[i]) / len(positives[i])
        columns += sum(over_column - logits[k][i] for k in positives[i]) / len(positives[i])
    loss = multi_positive_info_nce(image, text, scale, torch.tensor([7, 7, -3]))
    assert loss.item() == pytest.approx((rows + columns) / 6, rel=1e-12)


def test_multi_positive_info_nce_of_groups_of_one_is_info_nce() -> None:
    image, text = (F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(9.0, dtype=torch.float64)
    alone = multi_positive_info_nce(image, text, scale, torch.arange(6))
    torch.testing.assert_close(alone, info_nce(image, text, scale), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 32])
def test_token_cross_entropy_is_torchs_whatever_the_chunks(num_tokens: int, has_bias: bool) -> None:
    states = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    embeddings = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if has_bias else None
    labels = torch.randint(0, 11, (num_tokens,))
    inputs = [tensor for tensor in (states, embeddings, bias) if tensor is not None]
    logits = F.linear(states, embeddings, bias)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(3 * expected, inputs)
    for chunk_bytes in (1, 5 * 11 * 4, 1 << 26):  # one token at a time, five, all
        loss, hits = token_cross_entropy(states, embeddings, labels, bias, chunk_bytes)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert int(hits) == int((logits.argmax(-1) == labels).sum())
        for ours, theirs in zip(torch.autograd.grad(3 * loss, inputs), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(token_cross_entropy(states, embeddings, labels, bias)[0], loss.detach())


def test_token_cross_entropy_under_autocast_sums_in_float32() -> None:
    states, embeddings = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (300,))
    exact = F.cross_entropy(F.linear(states, embeddings), labels, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = token_cross_entropy(states, embeddings, labels)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-3)
    loss.backward()
    assert states.grad is not None and states.grad.dtype == torch.float32
    (expected,) = torch.autograd.grad(exact, states)
    assert float((states.grad - expected).norm() / expected.norm()) < 0.02


class _Blocks(TorchDispatchMode):
    """Keeps the memory of every float matrix of a shape, so that none is used for two of them."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.kept = shape, {}  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.shape == self.shape:
            self.kept[out.untyped_storage().data_ptr()] = out
        return out


def test_groups_take_no_further_blocks_of_similarities() -> None:
    image, text, logit_scale, _ = leaves(b=16)
    groups = torch.arange(16) % 5
    for loss in (
        lambda: info_nce(image, text, logit_scale),
        lambda: multi_positive_info_nce(image, text, logit_scale, groups),
    ):
        with _Blocks((16, 16)) as blocks:
            loss()
        assert len(blocks.kept) == 2
