"""Random layers draw from the samples' seeds: the same on any number of ranks and micro-batches."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from mmpretrain.batch import Samples
from mmpretrain.data.packing import packed
from mmpretrain.models.rows import Rows
from mmpretrain.models.text import TextTransformer
from mmpretrain.seeds import draw, hash64
from mmpretrain.training.randomness import SampleRandomness

SEEDS = torch.tensor([5, -7, 1 << 60, 12345, 3, 99])


def samples(rows: slice = slice(None), lengths: list[int] | None = None) -> Samples:
    seeds = SEEDS[rows]
    sizes = None if lengths is None else torch.tensor(lengths)[rows]
    packing = None if sizes is None else packed(sizes, 8)
    return Samples(torch.arange(len(seeds)), torch.arange(len(seeds)), seeds, lengths=sizes, packing=packing)


def drawn(fn: Callable[[slice], Any], rows: slice = slice(None)) -> Any:
    """What `fn` of some of the rows gives where it draws for them."""
    with SampleRandomness() as random, random.of(samples(rows), "test"):
        return fn(rows)


X = torch.linspace(0.2, 1, 4 * 8).view(1, 4, 8).repeat(6, 1, 1)  # the same for every sample: what differs is drawn
IMAGES = X.view(6, 2, 4, 4)
torch.manual_seed(0)
MULTI_HEAD = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
DRAWING = {
    "Dropout": lambda rows: nn.Dropout(0.3)(X[rows]),
    "Dropout in place": lambda rows: nn.Dropout(0.3, inplace=True)(X[rows].clone()),
    "dropout of rows": lambda rows: F.dropout(X[rows, 0, 0], 0.5),
    "dropout of an odd width": lambda rows: F.dropout(X[rows, :, :5], 0.3),
    "Dropout1d": lambda rows: nn.Dropout1d(0.4)(X[rows]),
    "Dropout2d": lambda rows: nn.Dropout2d(0.4)(IMAGES[rows]),
    "DropPath": lambda rows: DropPath(0.4)(X[rows]),
    "StochasticDepth": lambda rows: StochasticDepth(0.4, "row")(X[rows]),
    "PatchDropout": lambda rows: PatchDropout(0.5, num_prefix_tokens=1)(X[rows]),
    "attention": lambda rows: F.scaled_dot_product_attention(*(X[rows, None],) * 3, dropout_p=0.3),
    "causal attention": lambda rows: F.scaled_dot_product_attention(*(X[rows, None],) * 3, None, 0.3, True),
    "windows": lambda rows: F.dropout(X[rows].reshape(-1, 2, 8), 0.3).view(-1, 4, 8),
    "rand": lambda rows: torch.rand(len(X[rows]), 3),
    "rand of a size": lambda rows: torch.rand((len(X[rows]), 3), dtype=torch.float64),
    "randn": lambda rows: torch.randn(len(X[rows]), 3),
    "rand_like": lambda rows: torch.rand_like(X[rows]),
    "randn_like": lambda rows: torch.randn_like(X[rows]),
    "uniform_": lambda rows: torch.empty_like(X[rows]).uniform_(-2, 3),
    "normal_": lambda rows: torch.empty_like(X[rows]).normal_(1, 2),
    "bernoulli": lambda rows: torch.bernoulli(X[rows].abs() / 3),
    "bernoulli of a number": lambda rows: torch.bernoulli(X[rows], 0.3),
    "method bernoulli": lambda rows: X[rows].bernoulli(p=0.3),
    "uniform_ by names": lambda rows: torch.empty_like(X[rows]).uniform_(**{"from": 0.5, "to": 2.0}),
    "rand_like by name": lambda rows: torch.rand_like(input=X[rows]),
    "rand with a gradient": lambda rows: torch.rand(len(X[rows]), 3, requires_grad=True).detach(),
    "torch.dropout": lambda rows: torch.dropout(input=X[rows], p=0.3, train=True),
    "attention by names": lambda rows: F.scaled_dot_product_attention(
        query=X[rows, None], key=X[rows, None], value=X[rows, None], dropout_p=0.3
    ),
    "MultiheadAttention": lambda rows: MULTI_HEAD(*(X[rows],) * 3, need_weights=False)[0],
    "MultiheadAttention with weights": lambda rows: MULTI_HEAD(*(X[rows],) * 3)[0],
    "bernoulli_": lambda rows: torch.empty_like(X[rows]).bernoulli_(0.3),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_sample_draws_the_same_whoever_stands_beside_it(name: str) -> None:
    fn = DRAWING[name]
    whole = drawn(fn)
    parts = torch.cat([drawn(fn, slice(0, 1)), drawn(fn, slice(1, 4)), drawn(fn, slice(4, 6))])
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(whole, whole[:1].expand_as(whole)), "samples that draw alike"


def test_draws_are_those_of_the_hash() -> None:
    key = hash64("test")
    u = drawn(lambda rows: torch.rand(6, 2, 3, dtype=torch.float64))
    for s, i, j in ((0, 0, 0), (1, 1, 2), (5, 0, 1)):
        seed = draw((int(SEEDS[s]) ^ hash64(key, 0)) % 2**64, 0)
        assert float(u[s, i, j]) == (draw(draw(seed, i), j) >> 11) * 2.0**-53


def test_calls_of_a_pass_and_passes_draw_anew_and_keys_name_passes() -> None:
    def once(random: SampleRandomness, *key: str) -> Tensor:
        with random.of(samples(), *key):
            return torch.rand(6, 4)

    with SampleRandomness() as random:
        first, second, other = once(random, "a"), once(random, "a"), once(random, "b")
    assert not torch.equal(first, second) and not torch.equal(first, other)
    with SampleRandomness() as random:
        assert torch.equal(once(random, "b"), other) and torch.equal(once(random, "a"), first)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_it_should_and_its_mean(p: float) -> None:
    x = torch.ones(6, 1000, 100)
    with SampleRandomness() as random, random.of(samples(), "test"):
        y = F.dropout(x, p)
    kept = (y != 0).double()
    assert torch.unique(y).tolist() == pytest.approx([0, 1 / (1 - p)])
    error = math.sqrt(p * (1 - p) / kept.numel())
    assert float(kept.mean()) == pytest.approx(1 - p, abs=5 * error)
    neighbours = ((kept[..., 1:] - 1 + p) * (kept[..., :-1] - 1 + p)).mean()  # four share a draw, sixteen bits each
    assert abs(float(neighbours)) < 5 * p * (1 - p) / math.sqrt(kept.numel())


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_everything(p: float, expected: float) -> None:
    y = drawn(lambda rows: F.dropout(torch.ones(6, 3, 7), p))
    assert torch.equal(y, torch.full_like(y, expected))


def test_normal_draws_are_normal() -> None:
    x = drawn(lambda rows: torch.empty(6, 20_000, dtype=torch.float64).normal_(1, 2))
    assert torch.isfinite(x).all()
    assert float(x.mean()) == pytest.approx(1, abs=0.03) and float(x.std()) == pytest.approx(2, abs=0.03)
    assert float((x < -1).double().mean()) == pytest.approx(0.1587, abs=0.005)


def test_dropout_passes_gradients_of_what_it_keeps() -> None:
    x = torch.rand(6, 4, 8, dtype=torch.float64, requires_grad=True)
    y = drawn(lambda rows: F.dropout(x, 0.25))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_that_drops_nothing_of_note_is_attention(is_causal: bool) -> None:
    q, k, v = torch.randn(3, 6, 2, 5, 4, dtype=torch.float64)
    mask = None if is_causal else torch.rand(6, 1, 5, 5) > 0.3
    mask = None if mask is None else mask | torch.eye(5, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    y = drawn(lambda rows: F.scaled_dot_product_attention(q, k, v, mask, 1e-9, is_causal))
    torch.testing.assert_close(y, expected)
    shared = drawn(
        lambda rows: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask, 1e-9, is_causal, enable_gqa=True)
    )
    torch.testing.assert_close(
        shared, F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask, is_causal=is_causal, enable_gqa=True)
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_that_drops_nothing_of_note_is_torchs(need_weights: bool) -> None:
    expected = MULTI_HEAD.eval()(X, X, X, need_weights=need_weights)
    MULTI_HEAD.train().dropout = 1e-9
    found = drawn(lambda rows: MULTI_HEAD(X, X, X, need_weights=need_weights))
    MULTI_HEAD.dropout = 0.3
    torch.testing.assert_close(found, expected)


def test_attention_by_names_that_drops_nothing_is_torchs() -> None:
    x = X[:, None]
    assert torch.equal(
        drawn(lambda rows: F.scaled_dot_product_attention(query=x, key=x, value=x)),
        F.scaled_dot_product_attention(x, x, x),
    )


def test_queries_that_see_nothing_get_nothing() -> None:
    x, mask = X[:, None], torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    y = drawn(lambda rows: F.scaled_dot_product_attention(x, x, x, mask, 0.1))
    assert torch.isfinite(y).all() and not y[:, :, 2].any()


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_a_probability_that_is_none_is_refused_as_ever(p: float) -> None:
    with pytest.raises(ValueError, match="dropout probability"):
        drawn(lambda rows: F.dropout(X, p))


def test_evaluation_and_generators_of_ones_own_are_left_alone() -> None:
    own = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(lambda rows: torch.rand(6, 3, generator=torch.Generator().manual_seed(1))), own)
    assert torch.equal(drawn(lambda rows: nn.Dropout(0.5).eval()(X)), X)
    torch.manual_seed(3)
    expected = F.dropout(X, 0.5)
    torch.manual_seed(3)
    with SampleRandomness():  # of no samples
        assert torch.equal(F.dropout(X, 0.5), expected)


def test_rows_that_are_not_the_samples_are_refused_or_left_to_torch() -> None:
    with (
        SampleRandomness() as random,
        random.of(samples(), "test"),
        pytest.raises(ValueError, match=r"shape \[7, 2\].*not the 6 samples"),
    ):
        F.dropout(torch.ones(7, 2), 0.5)
    torch.manual_seed(3)
    expected = F.dropout(torch.ones(7, 2), 0.5)
    torch.manual_seed(3)
    with SampleRandomness(strict=False) as random, random.of(samples(), "test"):
        assert torch.equal(F.dropout(torch.ones(7, 2), 0.5), expected)


def test_packed_texts_draw_what_padded_ones_do() -> None:
    one = samples(lengths=[8, 3, 5, 2, 6, 2])
    assert one.packing is not None and one.lengths is not None
    x = torch.ones(6, 8, 12)
    with SampleRandomness() as random, random.of(one, "text"):
        padded = F.dropout(x, 0.3)
    rows = Rows(one.lengths, 8, one.packing)
    with SampleRandomness() as random, random.of(one, "text"):
        unpacked = rows.unpack(F.dropout(rows.pack(x), 0.3))
    is_token = torch.arange(8) < one.lengths[:, None]
    assert torch.equal(unpacked[is_token], padded[is_token])


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_text_encoder_draws_the_same_packed_or_not(pool: Any) -> None:
    encoder = TextTransformer(30, 8, 12, 2, 2, pool=pool, dropout=0.2).double()
    one = samples(lengths=[8, 3, 5, 2, 6, 2])
    assert one.lengths is not None
    ids = torch.randint(1, 30, (6, 8))

    def encode(packing: Any) -> Any:
        with SampleRandomness() as random, random.of(one, "text"):
            encoding = encoder(ids, one.lengths, packing)
            return encoding.pooled, encoding.tokens

    (pooled, tokens), (alone, padded) = encode(one.packing), encode(None)
    is_token = torch.arange(8) < one.lengths[:, None]
    torch.testing.assert_close(pooled, alone)
    torch.testing.assert_close(tokens[is_token], padded[is_token])
    encoder.eval()
    assert not torch.allclose(encode(None)[0], alone), "dropout did nothing"


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_model_of_timm_draws_by_sample(name: str) -> None:
    args: dict[str, Any] = {"drop_path_rate": 0.3, "drop_rate": 0.2}
    shapes = {
        "swin": {"depths": (1, 1, 1, 1), "embed_dim": 24, "attn_drop_rate": 0.1},
        "convnext": {"depths": (1, 1, 1, 1)},
    }
    args |= shapes.get(name.partition("_")[0], {"depth": 2, "pos_drop_rate": 0.1, "patch_drop_rate": 0.2})
    model = timm.create_model(name, num_classes=7, **args).train()
    images = torch.rand(1, 3, 224, 224).repeat(6, 1, 1, 1)
    with torch.no_grad():
        whole = drawn(lambda rows: model(images[rows]))
        parts = torch.cat([drawn(lambda rows: model(images[rows]), slice(i, i + 2)) for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-2), "samples that draw alike"
