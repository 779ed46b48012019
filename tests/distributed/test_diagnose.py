"""What mixing costs: measured as it is, and without a trace in the training."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmpretrain.training.diagnose import diagnose, show_examples
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Encodings, Task
from tests import runs
from tests.distributed.pool import Pool
from tests.distributed.steps import DIAGNOSED, diagnosed, make_batches, make_task

WEIGHTS = DIAGNOSED
NO_AUTOCAST = torch.autocast("cpu", enabled=False)
Pools = Callable[[int], Pool]


def encoder_gradients(objective: str) -> dict[str, torch.Tensor]:
    """One objective's weighted gradient on each encoder, from a task that knows no other."""
    task = make_task(tuple(WEIGHTS))
    alone = Task(task.model, {objective: task.objectives[objective]})
    forward_backward(alone, alone, make_batches(1), {objective: WEIGHTS[objective]})
    return {
        encoder: torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for name, p in alone.named_parameters()
                if name.startswith(f"model.{encoder}.")
            ]
        )
        for encoder in ("image", "text")
    }


def assert_right(values: dict[str, float]) -> None:
    gradients = {name: encoder_gradients(name) for name in WEIGHTS}
    for encoder, unseen in (("image", "mlm"), ("text", "mae")):
        for name in WEIGHTS:
            norm = float(gradients[name][encoder].norm())
            assert values.get(f"objectives/{name}_grad_norm_{encoder}", 0.0) == pytest.approx(norm, rel=1e-9)
        first, second = (name for name in WEIGHTS if name != unseen)
        a, b = gradients[first][encoder], gradients[second][encoder]
        cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        assert values[f"objectives/{first}_{second}_cosine_{encoder}"] == pytest.approx(cosine, rel=1e-9)
        assert not any("cosine" in name and unseen in name and name.endswith(encoder) for name in values)


def test_norms_and_cosines_are_those_of_each_objective_alone() -> None:
    values = diagnosed(1)
    assert_right(values)
    for name in WEIGHTS:
        assert values[f"objectives/{name}_time_share"] < 1
        assert math.isfinite(values[f"objectives/{name}_loss"])


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_are_the_same_on_any_number_of_processes(pool: Pools, world_size: int) -> None:
    for values in pool(world_size).run(diagnosed, 2):
        assert_right(values)


def test_nothing_is_left_behind() -> None:
    task = make_task(tuple(WEIGHTS))
    task.register_buffer("moved", torch.zeros(1))

    def move(*_: object) -> None:
        task.moved += 1  # as BatchNorm's means do

    task.register_forward_pre_hook(move)
    diagnose(task, make_batches(1), WEIGHTS, NO_AUTOCAST, None)
    assert all(parameter.grad is None for parameter in task.parameters())
    assert float(task.moved) == 0 and task.training


def test_examples_show_what_was_hidden_and_what_was_made_of_it() -> None:
    task = make_task(("mae", "mlm"))
    (batch,) = make_batches(1)
    shown = dict(show_examples(task, batch, {"mae": 1.0, "mlm": 1.0}, NO_AUTOCAST, lambda ids: f"w{ids[0]}", count=4))
    samples = batch.streams["pairs"].rows(torch.linspace(0, 15, 4).long())
    assert samples.images is not None and samples.text is not None
    for image, example in zip(samples.images, shown["mae"], strict=True):
        own, seen, made = example.images
        assert (own.int() - image.int()).abs().max() <= 1
        hidden = (seen != own).any(0)
        assert hidden.any() and not hidden.all()
        assert torch.equal(made[:, ~hidden], own[:, ~hidden]), "what was seen stays as it is"
    chosen = sum(example.text.count("→") for example in shown["mlm"])
    mlm = task.objectives["mlm"]
    assert chosen == int(mlm.count(type(batch)({"pairs": samples})))  # type: ignore[union-attr]
    assert task.training


def test_a_generated_caption_is_the_likeliest_next_token_again_and_again() -> None:
    task = make_task(("captioning",))
    (batch,) = make_batches(1)
    captioning = task.objectives["captioning"]
    with torch.no_grad():
        ids = captioning.generate(Encodings(task.model, batch), longest=6)  # type: ignore[union-attr]
        encodings = Encodings(task.model, batch).with_text("pairs", ids, torch.full((len(ids),), 6))
        states = captioning.decode(encodings)  # type: ignore[union-attr]
        expected = (states @ encodings.token_embeddings.T).argmax(-1)
    assert torch.equal(ids[:, 1:], expected[:, :-1])
    assert torch.equal(ids[:, 0], batch.streams["pairs"].text[:, 0])  # type: ignore[index]


@pytest.mark.slow
def test_a_diagnosed_run_is_bit_for_bit_the_same(pairs: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, every in (("with", "1steps"), ("without", "null")):
        folder = tmp_path / name
        folder.mkdir()
        settings = ("objective=[infonce,mae]", *runs.TINY_MAE, "trainer.duration=4steps")
        finished = runs.train(folder, f"data.root={pairs}", *settings, f"trainer.diagnose_every={every}")
        assert finished.code == 0, finished.stderr
        outcomes.append(runs.exact_outcome(folder / "run"))
    diagnosed_metrics, metrics = outcomes[0].pop("metrics"), outcomes[1].pop("metrics")
    assert outcomes[0] == outcomes[1]
    for record, other in zip(diagnosed_metrics, metrics, strict=True):
        assert "objectives/infonce_mae_cosine_image" in record
        assert {name: value for name, value in record.items() if not name.startswith("objectives/")} == other
    assert (tmp_path / "with" / "run" / "pictures" / "objectives.mae.png").exists()
