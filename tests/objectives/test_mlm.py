"""Masked language modelling: BERT's head on torch's own layers, and which tokens are chosen and hidden."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from mmpretrain.batch import Batch
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import TokenMask, TokenMaskSpec, mask_tokens
from mmpretrain.objectives.base import IndependentObjective, hooks_of
from mmpretrain.objectives.mlm import MLM
from mmpretrain.schedules import Clock, TrainingProgress
from mmpretrain.seeds import draw, hash64, uniform
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.objectives.references import text_states

LENGTHS = (3, 20, 9, 32, 1, 5, 2, 12)


@dataclass(frozen=True)
class Vocabulary:
    """What an objective may ask of a tokenizer."""

    vocab_size: int
    mask_id: int | None = None


def model_with(**text: Any) -> ImageTextModel:
    return tiny.randomize(ImageTextModel(tiny.vit(), tiny.text(**{"causal": False, **text}), embed_dim=12))


def with_words(batch: Batch) -> Batch:
    """The batch with starts of words: some have one token, some have more."""
    samples, (text, _) = batch.streams["pairs"], batch.texts("pairs")
    return replace(batch, streams={"pairs": replace(samples, word_starts=text % 3 != 0)})


def hidden_by_hand(batch: Batch, spec: TokenMaskSpec) -> list[dict[int, int]]:
    """For each text the token that stands at each chosen position, drawn one by one from the sample's seed."""
    samples, (text, lengths) = batch.streams["pairs"], batch.texts("pairs")
    hidden = []
    for row, seed in enumerate(samples.seeds.tolist()):

        def salted(what: str, seed: int = seed) -> int:
            return (seed ^ hash64(what, spec.name)) & (1 << 64) - 1

        found = {}
        word = 0
        for place in range(int(lengths[row])):
            if not spec.whole_words or (samples.word_starts is not None and samples.word_starts[row, place]):
                word = place
            is_inside = 0 < place < int(lengths[row]) - 1  # neither the start token nor the end token
            if is_inside and uniform(salted("token-chosen"), word) < spec.ratio:
                action = uniform(salted("token-action"), word)
                found[place] = int(text[row, place])
                if action < spec.replaced:
                    found[place] = spec.mask_id
                elif action < spec.replaced + spec.randomised:
                    # The bits are an int64, whose remainder has the sign of the divisor, as Python's has.
                    bits = draw(salted("token-other"), place)
                    found[place] = (bits - (1 << 64) if bits >> 63 else bits) % spec.vocab_size
        hidden.append(found)
    return hidden


@pytest.mark.parametrize("whole_words", [False, True])
def test_loss_is_that_of_berts_head_on_torchs_layers_text_by_text(whole_words: bool) -> None:
    model = model_with().double()
    assert model.text is not None
    mlm = tiny.randomize(MLM(model, mask_ratio=0.4, whole_words=whole_words)).double()
    batch = with_words(tiny.batch(LENGTHS))
    embeddings = model.text.token_embedding.weight
    config = BertConfig(
        hidden_size=tiny.WIDTH, vocab_size=tiny.VOCAB_SIZE, layer_norm_eps=1e-5, hidden_act="gelu", pad_token_id=0
    )
    head = BertLMPredictionHead(config).double()
    head.load_state_dict(
        {
            "transform.dense.weight": mlm.dense.weight, "transform.dense.bias": mlm.dense.bias,
            "transform.LayerNorm.weight": mlm.norm.weight, "transform.LayerNorm.bias": mlm.norm.bias,
            "decoder.weight": embeddings, "decoder.bias": mlm.bias, "bias": mlm.bias,
        }
    )  # fmt: skip
    expected, hits = torch.zeros((), dtype=torch.float64), 0
    text, lengths = batch.texts("pairs")
    found = hidden_by_hand(batch, mlm.mask(TrainingProgress()))
    for ids, length, hidden in zip(text, lengths.tolist(), found, strict=True):
        seen = ids[:length].clone()
        for place, token in hidden.items():
            seen[place] = token
        places = list(hidden)
        logits = head(text_states(model.text, seen))[0, places]
        expected = expected + F.cross_entropy(logits, ids[places], reduction="sum")
        hits += int((logits.argmax(-1) == ids[places]).sum())
    assert sum(map(len, found)) > 15
    loss, others = mlm.loss(Encodings(model, batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert int(others["accuracy"]) == hits
    assert mlm.count(batch).item() == sum(map(len, found))


# ---------------------------------------------------------------------------------------------- masks


def masked(spec: TokenMaskSpec, rows: int = 2000, length: int = 24) -> tuple[Tensor, Tensor, Tensor, TokenMask]:
    """(ids, lengths, starts of words, mask) of many texts of length 4 to `length`."""
    ids = torch.randint(1, 40, (rows, length))
    lengths = torch.randint(4, length + 1, (rows,))
    starts = torch.rand(rows, length) < 0.6
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows,))
    return ids, lengths, starts, mask_tokens(ids, lengths, seeds, spec, starts)


@pytest.mark.parametrize("whole_words", [False, True])
def test_start_end_and_padding_are_never_chosen_and_what_is_not_chosen_is_unchanged(whole_words: bool) -> None:
    ids, lengths, _, mask = masked(TokenMaskSpec("mlm", 0.9, 50, 40, whole_words=whole_words))
    columns = torch.arange(ids.shape[1])
    inside = (columns > 0) & (columns < lengths[:, None] - 1)
    assert not mask.chosen[~inside].any()
    assert mask.chosen[inside].double().mean() > 0.8
    assert torch.equal(mask.ids[~mask.chosen], ids[~mask.chosen])


@pytest.mark.parametrize(("replaced", "randomised"), [(0.8, 0.1), (0.5, 0.5), (0.0, 0.3), (1.0, 0.0), (0.0, 0.0)])
def test_chosen_tokens_become_the_mask_token_another_one_or_stay(replaced: float, randomised: float) -> None:
    ids, lengths, _, mask = masked(TokenMaskSpec("mlm", 0.3, 50, 40, replaced, randomised))
    num_inside, num_chosen = int((lengths - 2).sum()), int(mask.chosen.sum())
    now, before = mask.ids[mask.chosen], ids[mask.chosen]
    # One of the 40 random tokens is the one that was there.
    shares = {
        "chosen": (num_chosen / num_inside, 0.3, num_inside),
        "masked": (float((now == 50).double().mean()), replaced, num_chosen),
        "other": (float(((now != 50) & (now != before)).double().mean()), randomised * 39 / 40, num_chosen),
    }
    for name, (found, share, number) in shares.items():
        assert abs(found - share) <= 4 * (share * (1 - share) / number) ** 0.5, name
    others = now[(now != 50) & (now != before)]
    if len(others) > 1000:  # all ids of the vocabulary, equally often
        counts = torch.bincount(others, minlength=40).double()
        assert ((counts - len(others) / 40) ** 2 / (len(others) / 40)).sum() < 72.1  # 0.999 quantile, 39 degrees


def test_tokens_of_a_word_are_chosen_and_hidden_together_and_words_independently() -> None:
    _, lengths, starts, mask = masked(TokenMaskSpec("mlm", 0.3, 50, 40, 0.5, 0.5, whole_words=True))
    chosen_words = []
    for row, length in enumerate(lengths.tolist()):
        starts_here, chosen, hidden = starts[row].tolist(), mask.chosen[row].tolist(), mask.ids[row].tolist()
        first = next((place for place in range(1, length - 1) if starts_here[place]), length)
        words: list[set[tuple[bool, bool]]] = []
        for place in range(first, length - 1):
            if starts_here[place]:
                words.append(set())
            words[-1].add((chosen[place], hidden[place] == 50))
        assert all(len(word) == 1 for word in words)
        chosen_words += [is_chosen for word in words for is_chosen, _ in word]
    share = sum(chosen_words) / len(chosen_words)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / len(chosen_words)) ** 0.5
    # Of one word after another both are chosen as often as independent draws have it; the pairs overlap by one.
    both = sum(one and other for one, other in pairwise(chosen_words)) / (len(chosen_words) - 1)
    assert abs(both - 0.09) < 6 * (0.09 * 0.91 / len(chosen_words)) ** 0.5


def test_whole_words_need_to_know_where_words_begin() -> None:
    model = model_with()
    mlm = MLM(model, whole_words=True)
    with pytest.raises(
        ValueError, match="whole words are to be hidden, but the tokenizer does not say where they begin"
    ):
        mlm.count(tiny.batch([4, 5]))


def test_a_mask_does_not_depend_on_the_batch_and_is_another_at_each_visit() -> None:
    spec = TokenMaskSpec("mlm", 0.3, 50, 40)
    ids, lengths, seeds = torch.randint(1, 40, (20, 30)), torch.full((20,), 16), torch.arange(20) * 977
    whole = mask_tokens(ids, lengths, seeds, spec, None)
    alone = mask_tokens(ids[7:8, :16], lengths[7:8], seeds[7:8], spec, None)
    assert torch.equal(alone.ids[0], whole.ids[7, :16]) and torch.equal(alone.chosen[0], whole.chosen[7, :16])
    for other in (
        mask_tokens(ids, lengths, seeds + 1, spec, None),
        mask_tokens(ids, lengths, seeds, replace(spec, name="b"), None),
    ):
        assert not torch.equal(other.chosen, whole.chosen)


def test_the_ratio_may_follow_a_schedule() -> None:
    mlm = MLM(model_with(), mask_ratio={"linear": {"0%": 0.5, "100%": 0.1}})
    ratios = [mlm.mask(TrainingProgress(samples, Clock(10, 100, 1000))).ratio for samples in (0, 500, 1000)]
    assert ratios == pytest.approx([0.5, 0.3, 0.1])


# ---------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    ("given", "tokenizer", "mask_id", "vocab_size"),
    [
        (None, Vocabulary(60, 7), 7, 60),  # the tokenizer's own
        (None, Vocabulary(50), 59, 50),  # the last row, which no word has
        (None, Vocabulary(80, 7), 7, 60),  # never a token without a row
        (55, Vocabulary(50), 55, 50),
        (7, Vocabulary(60, 7), 7, 60),
    ],
)
def test_the_mask_token_is_the_tokenizers_or_a_row_that_no_word_has(
    given: int | None, tokenizer: Vocabulary, mask_id: int, vocab_size: int
) -> None:
    mlm = MLM(model_with(), mask_id=given)
    mlm.set_tokenizer(tokenizer)
    spec = mlm.mask(TrainingProgress())
    assert (spec.mask_id, spec.vocab_size) == (mask_id, vocab_size)


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        (None, Vocabulary(60), r"^objective\.mlm has id 59 as its mask token, .* model\.text\.vocab_size=61$"),
        (3, Vocabulary(60, 7), r"^objective\.mlm has id 3 as its mask token, but the tokenizer uses it"),
        (
            60,
            Vocabulary(50),
            r"^objective\.mlm\.mask_id is 60; expected one of the 60 rows of model\.text\.vocab_size$",
        ),
        (-1, Vocabulary(50), r"^objective\.mlm\.mask_id is -1; expected one of the 60 rows"),
        (None, Vocabulary(99, 98), r"^objective\.mlm\.mask_id is 98; expected one of the 60 rows"),
    ],
)
def test_a_mask_token_that_is_a_word_or_has_no_row_is_refused(
    given: int | None, tokenizer: Vocabulary, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MLM(model_with(), mask_id=given).set_tokenizer(tokenizer)


# ---------------------------------------------------------------------------------------------- the rest


def test_examples_show_prediction_and_original_of_each_chosen_token() -> None:
    model = model_with()
    mlm = tiny.randomize(MLM(model, mask_ratio=0.5))
    batch = tiny.batch([6, 9])
    encodings = Encodings(model, batch)
    states, (rows, columns) = mlm.predict(encodings)
    guesses = (states @ encodings.token_embeddings.T + mlm.bias).argmax(-1).tolist()
    shown = dict(zip(zip(rows.tolist(), columns.tolist(), strict=True), guesses, strict=True))
    assert shown

    def decode(ids: Sequence[int]) -> str:
        return f"w{ids[0]}"

    text, lengths = batch.texts("pairs")
    for row, example in enumerate(mlm.examples(encodings, decode)):
        words = [f"w{token}" for token in text[row, : lengths[row]].tolist()]
        expected = [f"[w{shown[row, i]} → {word}]" if (row, i) in shown else word for i, word in enumerate(words)]
        assert example.text == " ".join(expected) and not example.images


def test_it_is_independent_logs_its_perplexity_and_starts_as_bert() -> None:
    mlm = MLM(model_with(width=128, num_heads=4))
    assert isinstance(mlm, IndependentObjective)
    assert hooks_of(mlm).perplexity
    assert float(mlm.dense.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not mlm.dense.bias.any() and not mlm.bias.any()


def test_a_text_encoder_that_is_missing_or_causal_is_refused() -> None:
    for model in (ImageTextModel(tiny.vit(), None), model_with(causal=True)):
        with pytest.raises(
            ValueError, match=r"^objective\.mine needs a bidirectional text encoder; .* leave out causal_lm"
        ):
            MLM(model, config_path="objective.mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 0}, r"^objective\.mlm\.mask_ratio is 0"),
        ({"mask_ratio": 1.0}, r"^objective\.mlm\.mask_ratio is 1\.0"),
        ({"replaced": -0.1}, r"^objective\.mlm has replaced=-0\.1, randomised=0\.1; expected fractions"),
        ({"replaced": 0.8, "randomised": 0.3}, r"randomised=0\.3; expected fractions whose sum is at most 1$"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLM(model_with(), **arguments)
