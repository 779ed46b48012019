"""Captioning against torch's own layers, text by text: CoCa's decoder and CapPa's parallel prediction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import IndependentObjective, hooks_of
from mmpretrain.objectives.captioning import Captioning
from mmpretrain.seeds import hash64, uniform
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.objectives.references import decoder_states, text_states

LENGTHS = (3, 20, 9, 32, 1, 5, 2)
DECODER: dict[str, Any] = {"decoder_depth": 2, "decoder_heads": 2, "num_queries": 0}


def in_parallel(seeds: Tensor, parallel: float) -> list[bool]:
    """Whether each caption is predicted in parallel: a draw from the sample's own seed."""
    salt = hash64("captioning-parallel")
    return [uniform((seed ^ salt) & (1 << 64) - 1, 0) < parallel for seed in seeds.tolist()]


@pytest.mark.parametrize("num_queries", [0, 5])
@pytest.mark.parametrize("parallel", [0.0, 0.5, 1.0])
def test_loss_is_that_of_torchs_layers_text_by_text(num_queries: int, parallel: float) -> None:
    model = tiny.image_text().double()
    assert model.text is not None
    captioning = tiny.randomize(Captioning(model, 2, 2, num_queries, parallel)).double()
    batch = tiny.batch(LENGTHS)
    samples, (text, lengths) = batch.streams["pairs"], batch.texts("pairs")
    image_tokens = model.image(model.normalize(batch.images("pairs"))).tokens
    is_parallel = in_parallel(samples.seeds, parallel)
    assert parallel in (0, 1) or len(set(is_parallel)) == 2, "both kinds are in the batch"
    expected, hits = torch.zeros((), dtype=torch.float64), 0
    for i, length in enumerate(lengths.tolist()):
        ids = text[i, :length]
        if is_parallel[i]:  # a mask token at every position of the context, whatever the caption and its length
            x = torch.stack([captioning.mask_token + position for position in captioning.positions])[None]
        else:
            x = text_states(model.text, ids)
        states = decoder_states(captioning.decoder, x, image_tokens[i : i + 1], is_causal=not is_parallel[i])
        logits = states[0, : length - 1] @ model.text.token_embedding.weight.T
        expected = expected + F.cross_entropy(logits, ids[1:], reduction="sum")
        hits += int((logits.argmax(-1) == ids[1:]).sum())
    loss, others = captioning.loss(Encodings(model, batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert int(others["accuracy"]) == hits
    assert captioning.count(batch).item() == sum(LENGTHS) - len(LENGTHS)


@pytest.mark.parametrize("parallel", [0.25, 0.75])
def test_the_share_of_captions_in_parallel_is_the_one_asked_for(parallel: float) -> None:
    """Read off the predictions: what is predicted in parallel does not depend on the caption's tokens."""
    model = tiny.image_text()
    captioning = tiny.randomize(Captioning(model, 1, 2, 0, parallel))
    batch = tiny.batch([5] * 400)
    samples, (text, _) = batch.streams["pairs"], batch.texts("pairs")
    other = replace(batch, streams={"pairs": replace(samples, text=(text + 7) % tiny.VOCAB_SIZE)})
    with torch.no_grad():
        first, second = (captioning.decode(Encodings(model, each)) for each in (batch, other))
    unmoved = [torch.equal(one, two) for one, two in zip(first[:, :5], second[:, :5], strict=True)]
    assert unmoved == in_parallel(samples.seeds, parallel)
    assert abs(sum(unmoved) / 400 - parallel) < 4 * (parallel * (1 - parallel) / 400) ** 0.5


def test_a_mask_token_is_learned_only_where_captions_are_predicted_in_parallel() -> None:
    model = tiny.image_text()
    added = {"mask_token", "positions"}
    assert added.isdisjoint(name for name, _ in Captioning(model, **DECODER).named_parameters())
    own = dict(Captioning(model, **DECODER, parallel=0.1).named_parameters())
    assert added <= set(own) and own["positions"].shape == (tiny.CONTEXT_LENGTH, tiny.WIDTH)


@pytest.mark.parametrize("parallel", [0.0, 0.75])
def test_a_generated_caption_is_the_likeliest_token_after_each(parallel: float) -> None:
    """Decoded from left to right, also by a decoder that predicts most captions in parallel in training."""
    model = tiny.image_text().double()
    assert model.text is not None
    captioning = tiny.randomize(Captioning(model, **DECODER, parallel=parallel)).double()
    batch = tiny.batch([3, 9])
    image_tokens = model.image(model.normalize(batch.images("pairs"))).tokens
    expected = []
    for start, tokens in zip(batch.texts("pairs")[0][:, 0].tolist(), image_tokens, strict=True):
        caption = [start]
        while len(caption) < 6:
            x = text_states(model.text, torch.tensor(caption))
            last = decoder_states(captioning.decoder, x, tokens[None], is_causal=True)[0, -1]
            caption.append(int((model.text.token_embedding.weight @ last).argmax()))
        expected.append(caption)
    assert captioning.generate(Encodings(model, batch), longest=6).tolist() == expected
    assert captioning.generate(Encodings(model, batch), longest=99).shape == (2, tiny.CONTEXT_LENGTH)


def test_examples_show_the_generated_caption_up_to_the_end_token_beside_the_samples_own() -> None:
    model = tiny.image_text()
    captioning = tiny.randomize(Captioning(model, **DECODER))
    batch = tiny.batch([4, 4, 4])
    samples, (text, lengths) = batch.streams["pairs"], batch.texts("pairs")
    encodings = Encodings(model, batch)
    generated = captioning.generate(encodings).tolist()
    ends = [generated[0][2], generated[1][5], next(i for i in range(1, tiny.VOCAB_SIZE) if i not in generated[2])]
    text = text.clone()
    text[torch.arange(3), lengths - 1] = torch.tensor(ends)
    batch = replace(batch, streams={"pairs": replace(samples, text=text)})

    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    examples = captioning.examples(Encodings(model, batch), decode)
    for i, example in enumerate(examples):
        end = generated[i].index(ends[i]) if ends[i] in generated[i] else len(generated[i])
        assert example.text == f"{decode(generated[i][:end])}\n({decode(text[i, :4].tolist())})"
        assert torch.equal(example.images[0], batch.images("pairs")[i])
    assert generated[2] == [int(token) for token in examples[2].text.partition("\n")[0].split()]


def test_it_is_independent_and_logs_its_perplexity() -> None:
    objective = Captioning(tiny.image_text(), **DECODER)
    assert isinstance(objective, IndependentObjective)
    assert hooks_of(objective).perplexity


def test_a_text_encoder_that_is_missing_or_bidirectional_is_refused() -> None:
    for model in (ImageTextModel(tiny.vit(), None), ImageTextModel(tiny.vit(), tiny.text(causal=False), embed_dim=12)):
        with pytest.raises(ValueError, match=r"^objective\.mine needs a causal text encoder; .* and leave out mlm"):
            Captioning(model, **DECODER, config_path="objective.mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parallel": -0.1}, r"parallel is -0\.1; expected a fraction of the captions, 0 to 1"),
        ({"parallel": 1.5}, r"parallel is 1\.5; expected a fraction of the captions, 0 to 1"),
        ({"decoder_depth": 0}, r"decoder_depth is 0; expected a number at least 1"),
        ({"decoder_heads": 0}, r"decoder_heads is 0; expected a number at least 1"),
        ({"decoder_heads": 5}, rf"decoder_heads is 5; expected a divisor of model\.text\.width = {tiny.WIDTH}$"),
        ({"num_queries": -1}, r"num_queries is -1; expected a number at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective\.captioning\.{message}"):
        Captioning(tiny.image_text(), **{**DECODER, **arguments})
