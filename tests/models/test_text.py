"""Text encoders against open_clip's, and padding that never matters."""

from typing import Literal

import open_clip
import pytest
import torch
from torch import Tensor

from mmpretrain.data.packing import packed
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.text import TextTransformer
from tests import tiny

LENGTHS = [3, 4, 4, 9, 15, 17, 32]


def tokens(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Random ids whose largest one stands at the end, as CLIP's end token does, and zeros after it."""
    sizes = torch.tensor(lengths)
    ids = torch.randint(0, tiny.VOCAB_SIZE - 1, (len(lengths), max(lengths)))
    ids[torch.arange(len(lengths)), sizes - 1] = tiny.VOCAB_SIZE - 1
    return ids * (torch.arange(max(lengths)) < sizes[:, None]), sizes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_text_transformer_with_open_clips_weights_is_open_clips(dtype: torch.dtype, tolerance: float) -> None:
    theirs = open_clip.transformer.TextTransformer(
        context_length=tiny.CONTEXT_LENGTH,
        vocab_size=tiny.VOCAB_SIZE,
        width=tiny.WIDTH,
        heads=2,
        layers=2,
        output_dim=12,
    )
    theirs = tiny.randomize(theirs).to(dtype)
    state = theirs.state_dict()
    projection = state.pop("text_projection")
    model = ImageTextModel(tiny.vit(), tiny.text(), embed_dim=12).to(dtype).eval()
    assert model.text is not None
    model.text.load_state_dict(state, strict=True)
    model.text_projection.load_state_dict({"weight": projection.T})
    ids, lengths = tokens()
    encoding = model.encode_text(ids, lengths, packed(lengths, ids.shape[1]))
    expected = theirs(torch.nn.functional.pad(ids, (0, tiny.CONTEXT_LENGTH - ids.shape[1])))
    torch.testing.assert_close(model.text_projection(encoding.pooled), expected, rtol=tolerance, atol=tolerance)
    unit = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model.project_text(encoding.pooled), unit, rtol=tolerance, atol=tolerance)


def test_initial_weights_have_open_clips_deviations() -> None:
    theirs = open_clip.transformer.TextTransformer(vocab_size=500, width=128, heads=2, layers=2, output_dim=None)
    ours = TextTransformer(vocab_size=500, width=128, depth=2, num_heads=2).state_dict()
    assert set(ours) == set(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert float(ours[name].std()) == pytest.approx(float(value.std()), rel=0.1, abs=1e-3), name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_packing_changes_nothing_gradients_included(causal: bool, pool: Literal["last", "mean"]) -> None:
    model = tiny.text(causal=causal, pool=pool).double()
    ids, lengths = tokens([9, 3, 32, 4, 17, 4, 15])
    packing = packed(lengths, ids.shape[1])
    assert packing is not None and packing.num_rows == 3
    weights = torch.randn(len(ids), 24, dtype=torch.float64)
    is_token = torch.arange(ids.shape[1]) < lengths[:, None]
    results = []
    for encoding in (model(ids, lengths, packing), model(ids, lengths)):
        total = (encoding.pooled * weights).sum() + (encoding.tokens[is_token] ** 3).sum()
        gradients = torch.autograd.grad(total, list(model.parameters()))
        results.append((encoding.pooled, encoding.tokens[is_token], *gradients))
    for in_rows, alone in zip(*results, strict=True):
        torch.testing.assert_close(in_rows, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_what_stands_in_the_padding_never_matters(causal: bool, pool: Literal["last", "mean"]) -> None:
    model = tiny.text(causal=causal, pool=pool).double()
    ids, lengths = tokens()
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    other = torch.where(padding, torch.randint_like(ids, 1, tiny.VOCAB_SIZE), ids)
    for packing in (None, packed(lengths, ids.shape[1])):
        assert torch.equal(model(ids, lengths, packing).pooled, model(other, lengths, packing).pooled)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_each_row_is_what_it_is_alone(causal: bool, pool: Literal["last", "mean"]) -> None:
    model = tiny.text(causal=causal, pool=pool).double()
    ids, lengths = tokens()
    ids[torch.arange(len(ids)), lengths - 1] = 1  # an end token need not be the largest
    together = model(ids, lengths, packed(lengths, ids.shape[1]))
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together.tokens[row, :length], alone.tokens[0], rtol=1e-10, atol=1e-12)
        pooled = alone.tokens[0, -1] if pool == "last" else alone.tokens[0].mean(0)
        torch.testing.assert_close(together.pooled[row], pooled, rtol=1e-10, atol=1e-12)


def test_causal_tokens_see_only_what_stands_before_them_and_bidirectional_ones_all() -> None:
    ids, lengths = tokens([8])
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % tiny.VOCAB_SIZE
    for causal in (True, False):
        model = tiny.text(causal=causal).double()
        changed = (model(ids, lengths).tokens != model(other, lengths).tokens).any(-1)[0].tolist()
        assert changed == ([False] * 5 + [True] * 3 if causal else [True] * 8)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_token_zero_is_a_token(pool: Literal["last", "mean"]) -> None:
    """CLIP's token 0 is `!`: how long a text is has to come from the tokenizer."""
    tokenizer = ClipTokenizer()
    ids, lengths = tokenizer(["a", "!|!|"])
    assert ids[1, 1:5].tolist() == [0, 91, 0, 347]
    assert lengths.tolist() == [3, 6]
    model = tiny.text(vocab_size=tokenizer.vocab_size, causal=False, pool=pool).double()
    encoding = model(ids, lengths)
    alone = model(ids[1:], torch.tensor([6]))
    expected = alone.tokens[0, 5] if pool == "last" else alone.tokens[0].mean(0)
    torch.testing.assert_close(encoding.pooled[1], expected, rtol=1e-10, atol=1e-12)
    other = ids.clone()
    other[1, 3] = 5
    assert not torch.allclose(model(other, lengths).pooled[1], expected)


def test_a_text_longer_than_the_context_is_cut_and_keeps_its_end_token() -> None:
    tokenizer = ClipTokenizer(context_length=8)
    ids, lengths = tokenizer(["a", "one two three four five six seven eight nine ten"])
    assert ids.shape == (2, 8) and lengths.tolist() == [3, 8]
    assert ids[1, -1] == ids[0, 2] == tokenizer.vocab_size - 1
    assert tiny.text(vocab_size=tokenizer.vocab_size, context_length=8)(ids, lengths).tokens.shape == (2, 8, 24)


def test_heads_that_do_not_divide_the_width_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"model.text.width is 24; expected a multiple of num_heads = 5"):
        tiny.text(num_heads=5)
