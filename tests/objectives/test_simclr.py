"""SimCLR: the loss written out view by view, which images it reads, and its projection head."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.losses import nt_xent
from mmpretrain.objectives.base import IndependentObjective, hooks_of
from mmpretrain.objectives.simclr import BatchStandardization, SimCLR
from mmpretrain.training.task import Encodings
from tests import runs, tiny

HEAD: dict[str, Any] = {"hidden_width": 20, "embed_dim": 6}


def with_views(batch: Batch, number: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(3)
    samples = batch.streams["pairs"]
    views = torch.randint(0, 256, (len(samples), number, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return replace(batch, streams={"pairs": replace(samples, views=views)})


def nt_xent_by_hand(first: Tensor, second: Tensor, temperature: float, ids: list[int]) -> float:
    """Equation 1 for each of the 2 B views; other copies of its image are no negatives."""
    views = [row.tolist() for row in torch.cat([first, second])]
    b = len(first)
    total = 0.0
    for i, view in enumerate(views):
        similarities = [sum(a * b for a, b in zip(view, other, strict=True)) / temperature for other in views]
        partner = (i + b) % (2 * b)
        others = [j for j in range(2 * b) if j == partner or ids[j % b] != ids[i % b]]
        assert i not in others
        total += math.log(sum(math.exp(similarities[j]) for j in others)) - similarities[partner]
    return total / (2 * b)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 3, 4, 1]], ids=["different", "copies"])
def test_the_loss_is_equation_1_of_the_paper(ids: list[int]) -> None:
    first, second = (nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    for temperature in (0.1, 1.0):
        expected = nt_xent_by_hand(first, second, temperature, ids)
        assert nt_xent(first, second, temperature, torch.tensor(ids)).item() == pytest.approx(expected, rel=1e-12)
    if len(set(ids)) == len(ids):
        assert torch.equal(nt_xent(first, second, 0.1), nt_xent(first, second, 0.1, torch.tensor(ids)))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_loss_of_a_batch_is_that_of_torchs_layers(norm: Any) -> None:
    model = tiny.image_text().double()
    simclr = tiny.randomize(SimCLR(model, 0.2, **HEAD, norm=norm)).double()
    batch = with_views(tiny.batch([3] * 5))
    samples = batch.streams["pairs"]
    batch = replace(batch, streams={"pairs": replace(samples, ids=torch.tensor([0, 1, 0, 3, 4]))})

    def normalisation(width: int) -> nn.Module:
        return nn.BatchNorm1d(width, track_running_stats=False) if norm == "batch" else nn.LayerNorm(width)

    head = nn.Sequential(
        nn.Linear(tiny.WIDTH, 20), normalisation(20), nn.ReLU(),
        nn.Linear(20, 20), normalisation(20), nn.ReLU(), nn.Linear(20, 6),
    ).double()  # fmt: skip
    head.load_state_dict(simclr.head.state_dict())
    assert samples.views is not None
    projected = []
    for number in range(2):  # the statistics of BatchNorm are each view's own
        pooled = model.image.trunk(model.normalize(samples.views[:, number]))
        projected.append(nn.functional.normalize(head(pooled), dim=-1))
    expected = nt_xent_by_hand(projected[0], projected[1], 0.2, [0, 1, 0, 3, 4])
    assert simclr.loss(*simclr.embed(Encodings(model, batch))).item() == pytest.approx(expected, rel=1e-11)


def test_it_reads_the_two_views_and_not_the_image_of_other_objectives() -> None:
    model = tiny.image_text()
    simclr = SimCLR(model, **HEAD)
    batch = with_views(tiny.batch([3] * 4), number=3)
    samples = batch.streams["pairs"]
    assert samples.views is not None and samples.images is not None
    rows, shared = simclr.embed(Encodings(model, batch))
    for name, number in (("first", 0), ("second", 1)):
        torch.testing.assert_close(rows[name], model.image.trunk(model.normalize(samples.views[:, number])))
    assert torch.equal(rows["ids"], samples.ids)
    assert set(shared) == {name for name, _ in simclr.head.named_parameters()}
    third = samples.views.clone()
    third[:, 2] = 255 - third[:, 2]
    changed = replace(samples, images=255 - samples.images, views=third)
    again, _ = simclr.embed(Encodings(model, replace(batch, streams={"pairs": changed})))
    assert all(torch.equal(again[name], value) for name, value in rows.items())
    assert hooks_of(simclr).num_views == 2
    assert not isinstance(simclr, IndependentObjective)


@pytest.mark.parametrize(("number", "missing"), [(0, 1), (1, 2)])
def test_a_stream_with_too_few_views_is_refused(number: int, missing: int) -> None:
    model, batch = tiny.image_text(), tiny.batch([3, 4])
    given = with_views(batch, number) if number else batch
    message = rf"^data\.train\.pairs\.views has too few for an objective that reads number {missing}; .*simclr\.yaml"
    with pytest.raises(ValueError, match=message):
        SimCLR(model, **HEAD).embed(Encodings(model, given))


def test_the_head_runs_in_its_own_precision_under_autocast() -> None:
    model = tiny.image_text()
    simclr = SimCLR(model, **HEAD)
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = simclr.embed(Encodings(model, with_views(tiny.batch([3, 4]))))
    assert rows["first"].dtype == rows["second"].dtype == torch.float32


def test_normalisation_of_the_head_is_batch_norm() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ours = BatchStandardization(5).double()
    theirs = nn.BatchNorm1d(5, track_running_stats=False).double()
    with torch.no_grad():
        ours.weight.copy_(torch.randn(5))
        ours.bias.copy_(torch.randn(5))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    weights = torch.randn(7, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad((module(x) * weights).sum(), x)[0] for module in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.equal(ours(x[:1]), ours.bias[None])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"temperature": 0}, r"temperature is 0; expected a number above 0"),
        ({"hidden_width": 0}, r"hidden_width is 0; expected a number at least 1"),
        ({"embed_dim": 0}, r"embed_dim is 0; expected a number at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective\.slip\.{message}"):
        SimCLR(tiny.image_text(), **{**HEAD, **argument}, config_path="objective.slip")


@pytest.mark.parametrize(
    "given", [(), ("data.train.images.views=${data.train.pairs.views}",)], ids=["own", "the pairs'"]
)
def test_a_stream_of_images_has_views_of_its_own(given: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    mix = ("objective=[infonce,simclr]", "objective.simclr.stream=images", "data.train.images.shards=train")
    small = ("objective.simclr.hidden_width=8", "objective.simclr.embed_dim=4")
    runs.trained(tmp_path, pairs, "trainer.duration=2steps", *mix, *small, *given)
    assert runs.records(tmp_path / "run")[-1]["train/simclr_loss"] > 0
