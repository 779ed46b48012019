"""Averaged weights."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmpretrain import optim
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.schedules import ScheduledValue, TrainingProgress
from mmpretrain.training.ema import EMA, average_of
from mmpretrain.training.task import Task
from tests import runs, tiny
from tests.optim.tasks import fill_gradients, make_task
from tests.optim.tasks import step as take_step


def test_average_is_that_of_every_steps_weights(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.duration=4steps", "checkpoint.every=1steps", "checkpoint.keep_last=0", "trainer.ema_decay=0.7")
    runs.trained(tmp_path, pairs, *settings)
    average = runs.weights(tmp_path / "run", 1, "ema")
    for step in (2, 3, 4):
        own = runs.weights(tmp_path / "run", step)
        average = {name: value * 0.7 + own[name] * 0.3 for name, value in average.items()}
        for name, value in runs.weights(tmp_path / "run", step, "ema").items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    results = runs.results(tmp_path / "run")
    assert "eval-val-ema/image_retrieval_recall@1" in results
    raw, averaged = (load_checkpoint(tmp_path / "run", ema=ema).model.state_dict() for ema in (False, True))
    name = "image_projection.weight"
    assert torch.equal(raw[name], runs.weights(tmp_path / "run", 4)[f"model.{name}"])
    assert torch.equal(averaged[name], runs.weights(tmp_path / "run", 4, "ema")[f"model.{name}"])


def test_a_skipped_step_leaves_the_average_as_it_is() -> None:
    model = tiny.image_text()
    average = EMA(model, ScheduledValue(0.9, "x"))
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with torch.no_grad():
        model.image_projection.weight.add_(1.0)  # type: ignore[union-attr]
    average.update(TrainingProgress(), torch.tensor(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.tensors.items())
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.applied():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_run_without_average_refuses_to_give_one(pairs: Path, tmp_path: Path) -> None:
    runs.trained(tmp_path, pairs, "trainer.duration=1steps")
    with pytest.raises(ValueError, match=r"has no averaged weights; expected a run with trainer\.ema_decay"):
        load_checkpoint(tmp_path / "run", ema=True)


def copies(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole training state."""
    return {name: tensor.clone() for name, tensor in (task.state_dict() | optim.optimizer_tensors(optimizer)).items()}


def test_the_average_of_a_schedule_free_optimiser_is_that_of_the_paper() -> None:
    """Defazio et al. 2024, equations 2 to 4 for SGD: y of the gradients, z of the steps, and x, their average."""
    task, beta, lr = make_task(), 0.9, 0.1
    optimizer = optim.optimizer_by_name(
        task.named_parameters(), "schedulefree.SGDScheduleFree", lr, 0.0, {}, {"momentum": beta}
    )
    assert isinstance(optimizer, optim.AveragingOptimizer)
    optimizer.train()
    average = average_of(task, optimizer, None)
    assert average is not None
    z = {name: parameter.detach().double().clone() for name, parameter in task.named_parameters()}
    x = {name: value.clone() for name, value in z.items()}
    for t in range(4):
        fill_gradients(task, t)
        for name, parameter in task.named_parameters():
            assert parameter.grad is not None
            z[name] -= lr * parameter.grad.double()
            x[name] += (z[name] - x[name]) / (t + 1)
        take_step(optimizer)
        before, numbers = copies(task, optimizer), optim.optimizer_numbers(optimizer)
        for name, value in average.tensors.items():
            torch.testing.assert_close(value.double(), x.get(name, value.double()), rtol=1e-5, atol=1e-5)
        averaged = average.tensors
        with average.applied():
            assert all(torch.equal(value, averaged[name]) for name, value in task.state_dict().items())
        after = copies(task, optimizer)
        assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
        assert optim.optimizer_numbers(optimizer) == numbers
    assert not torch.equal(averaged["model.image_projection.weight"], before["model.image_projection.weight"])
    for name, parameter in task.named_parameters():
        y = (1 - beta) * z[name] + beta * x[name]
        torch.testing.assert_close(parameter.double(), y, rtol=1e-5, atol=1e-5)


def test_a_moving_average_beside_the_optimisers_own_is_refused() -> None:
    task = make_task()
    optimizer = optim.optimizer_by_name(task.named_parameters(), "schedulefree.AdamWScheduleFree", 0.1, 0.0, {})
    with pytest.raises(
        ValueError, match=r"^trainer.ema_decay is 0.9, but AdamWScheduleFree averages the weights itself"
    ):
        average_of(task, optimizer, 0.9)


@pytest.mark.slow
def test_evaluating_a_schedule_free_run_and_resuming_it_change_no_bit(pairs: Path, tmp_path: Path) -> None:
    settings = (
        "optimizer=library", "optimizer.name=schedulefree.AdamWScheduleFree", "schedule=constant",
        "trainer.duration=4steps", "checkpoint.every=1steps", "checkpoint.keep_last=0",
    )  # fmt: skip
    runs.trained(tmp_path, pairs, *settings, "run.dir=whole")
    for name in ("config.yaml", "checkpoints/step_00000002"):
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        source = tmp_path / "whole" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "again" / name)
    finished = runs.trained(tmp_path, pairs, *settings, "run.dir=again", "trainer.eval_every=1steps")
    assert "at step 2" in finished.stderr
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        assert runs.tensors(tmp_path / "again", name) == runs.tensors(tmp_path / "whole", name), name
    assert "eval-val-ema/image_retrieval_recall@1" in runs.results(tmp_path / "whole")
    assert runs.tensors(tmp_path / "whole", "ema.safetensors") != runs.tensors(tmp_path / "whole", "model.safetensors")
