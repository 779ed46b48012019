"""Nothing that is hidden reaches a prediction: hidden patches and words, padding, and what comes later."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmpretrain.batch import Batch, Samples
from mmpretrain.objectives.captioning import Captioning
from mmpretrain.objectives.causal_lm import CausalLM
from mmpretrain.objectives.mae import MAE
from mmpretrain.objectives.mlm import MLM
from mmpretrain.training.task import Encodings
from tests.distributed.steps import make_batches, make_task

PER_TOKEN = ["mlm", "mlm_words", "causal_lm", "captioning", "coca", "cappa"]


def changed(batch: Batch, **parts: Tensor) -> Batch:
    return replace(batch, streams={"pairs": replace(batch.streams["pairs"], **parts)})


def of(batch: Batch) -> tuple[Samples, Tensor, Tensor]:
    """(samples, token ids, lengths)."""
    samples = batch.streams["pairs"]
    assert samples.text is not None and samples.lengths is not None
    return samples, samples.text, samples.lengths


@pytest.mark.parametrize("name", ["mae", "mae_fixed"])
def test_a_hidden_patch_reaches_no_prediction(name: str) -> None:
    task = make_task((name,))
    mae = task.objectives[name]
    assert isinstance(mae, MAE)
    (batch,) = make_batches(1)
    images = batch.streams["pairs"].images
    assert images is not None
    prediction, mask = mae.reconstruct(Encodings(task.model, batch))
    pixels = mask.hidden.reshape(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    noise = torch.randint_like(images, 256)
    again, _ = mae.reconstruct(Encodings(task.model, changed(batch, images=torch.where(pixels, noise, images))))
    assert torch.equal(prediction, again)
    seen, _ = mae.reconstruct(Encodings(task.model, changed(batch, images=torch.where(~pixels, noise, images))))
    assert not torch.equal(prediction, seen)


@pytest.mark.parametrize("name", ["mlm", "mlm_words"])
def test_a_masked_word_reaches_no_state(name: str) -> None:
    task = make_task((name,))
    mlm = task.objectives[name]
    assert isinstance(mlm, MLM)
    (batch,) = make_batches(1)
    samples, text, _ = of(batch)
    encodings = Encodings(task.model, batch)
    spec = mlm.mask(batch.progress)
    mask = encodings.token_mask("pairs", spec)
    masked = mask.chosen & (mask.ids == spec.mask_id)
    assert masked.sum() > 5
    other = torch.where(masked, (text + 7) % 49, text)
    hidden = Encodings(task.model, changed(batch, text=other, word_starts=samples.word_starts))
    states, again = encodings.text("pairs", spec).tokens, hidden.text("pairs", spec).tokens
    assert torch.equal(states, again)
    assert not torch.equal(mlm.loss(encodings)[0], mlm.loss(hidden)[0]), "what is to be predicted is another word"


@pytest.mark.parametrize("name", PER_TOKEN)
def test_padding_changes_nothing(name: str) -> None:
    task = make_task((name,))
    objective = task.objectives[name]
    (batch,) = make_batches(1)
    _, text, lengths = of(batch)
    is_padding = torch.arange(text.shape[1]) >= lengths[:, None]
    assert is_padding.any()
    other = changed(batch, text=torch.where(is_padding, (text + 11) % 49, text))
    first, second = (objective.loss(Encodings(task.model, each)) for each in (batch, other))  # type: ignore[union-attr, call-arg]
    assert torch.equal(first[0], second[0])  # type: ignore[index]
    assert torch.equal(objective.count(batch), objective.count(other))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["causal_lm", "captioning", "coca"])
@pytest.mark.parametrize("place", [1, 4, 9])
def test_a_causal_prediction_ignores_what_comes_after_it(name: str, place: int) -> None:
    task = make_task((name,))
    objective = task.objectives[name]
    (batch,) = make_batches(1)
    _, text, _ = of(batch)
    later = torch.arange(text.shape[1]) > place
    other = changed(batch, text=torch.where(later, (text + 5) % 49, text))

    def states(each: Batch) -> Tensor:
        encodings = Encodings(task.model, each)
        if isinstance(objective, Captioning):
            return objective.decode(encodings)
        assert isinstance(objective, CausalLM)
        return encodings.text("pairs").tokens

    first, second = states(batch), states(other)
    assert torch.equal(first[:, : place + 1], second[:, : place + 1])
    assert not torch.equal(first, second)


def test_a_parallel_prediction_sees_no_word_at_all_nor_how_many_there_are() -> None:
    task = make_task(("cappa",))
    cappa = task.objectives["cappa"]
    assert isinstance(cappa, Captioning)
    cappa.parallel = 1.0
    (batch,) = make_batches(1)
    _, text, lengths = of(batch)
    first = cappa.decode(Encodings(task.model, batch))
    second = cappa.decode(Encodings(task.model, changed(batch, text=(text + 3) % 49)))
    assert torch.equal(first, second)
    fewer = replace(batch.streams["pairs"], lengths=(lengths - 3).clamp(min=2), packing=None)
    assert torch.equal(first, cappa.decode(Encodings(task.model, Batch({"pairs": fewer}))))
    images = batch.streams["pairs"].images
    assert images is not None
    third = cappa.decode(Encodings(task.model, changed(batch, images=255 - images)))
    assert not torch.equal(first, third)


@pytest.mark.parametrize("name", ["flip", "flip_block"])
def test_a_dropped_patch_reaches_no_embedding(name: str) -> None:
    task = make_task((name,))
    objective = task.objectives[name]
    (batch,) = make_batches(1)
    images = batch.streams["pairs"].images
    assert images is not None
    spec = objective.patches(batch.progress)  # type: ignore[union-attr]
    hidden = Encodings(task.model, batch).patch_mask("pairs", spec).hidden
    assert hidden.sum(1).tolist() == [int(hidden[0].sum())] * len(images)
    pixels = hidden.reshape(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    noise = torch.randint_like(images, 256)
    first, unseen, seen = (
        objective.embed(Encodings(task.model, changed(batch, images=each)))[0]["image"]  # type: ignore[union-attr]
        for each in (images, torch.where(pixels, noise, images), torch.where(~pixels, noise, images))
    )
    assert torch.equal(first, unseen)
    assert not torch.equal(first, seen)
