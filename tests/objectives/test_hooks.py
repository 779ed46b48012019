"""Hooks of an objective: a teacher that starts from the first weights and follows them, and misspelt hooks."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmpretrain.checkpoints import store
from mmpretrain.objectives.base import Hooks, check_objective, hooks_of
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.training.probe import reached_parameters
from mmpretrain.training.task import Encodings, Task
from tests import runs, tiny

TEACHER = '''
import copy

import torch
from torch import nn


class MeanTeacher(nn.Module):
    """Follow an average of one's own image encoder: the sum over images of 1 - <x_i, teacher(x_i)>."""

    def __init__(self, model, decay: float = 0.9, stream: str = "pairs") -> None:
        super().__init__()
        self.streams, self.decay = (stream,), decay
        self.teacher = copy.deepcopy(model.image).requires_grad_(False)

    def after_init(self, model) -> None:
        self.teacher.load_state_dict(model.image.state_dict())

    @torch.no_grad()
    def after_step(self, model, progress, skipped) -> None:
        for ours, theirs in zip(self.teacher.parameters(), model.image.parameters()):
            ours.lerp_(theirs, (1 - self.decay) * (1 - skipped))

    def count(self, batch):
        return torch.tensor(len(batch.streams[self.streams[0]]))

    def loss(self, encodings):
        (stream,) = self.streams
        with torch.no_grad():
            target = self.teacher(encodings.pixels(stream)).pooled
        found = encodings.image(stream).pooled
        return (1 - torch.cosine_similarity(found, target, dim=-1)).sum()
'''
TEACHER_YAML = """
mean_teacher:
  _target_: teacher.MeanTeacher
  weight: 1.0
"""


def train(folder: Path, pairs: Path, *overrides: str) -> runs.Finished:
    (folder / "teacher.py").write_text(TEACHER)
    (folder / "conf" / "objective").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "objective" / "mean_teacher.yaml").write_text(TEACHER_YAML)
    search = f"hydra.searchpath=[file://{folder}/conf]"
    settings = ("objective=[infonce,mean_teacher]", "schedule=constant", "checkpoint.keep_last=0", *overrides)
    return runs.train(folder, f"data.root={pairs}", search, *settings, environment={"PYTHONPATH": str(folder)})


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return store.load_tensors(run / "checkpoints" / f"step_{step:08d}", "model")


def test_a_teacher_starts_from_loaded_weights_follows_each_step_and_resumes(pairs: Path, tmp_path: Path) -> None:
    first, whole, cut = (tmp_path / name for name in ("first", "whole", "cut"))
    for folder in (first, whole, cut):
        folder.mkdir()
    assert runs.train(first, f"data.root={pairs}", "trainer.duration=2steps", "run.seed=5").code == 0
    overrides = (f"init_from={first / 'run'}", "checkpoint.every=1steps")
    finished = train(whole, pairs, *overrides, "trainer.duration=4steps")
    assert finished.code == 0, finished.stderr

    start = weights(first / "run", 2)
    steps = [weights(whole / "run", step) for step in range(1, 5)]
    name = "trunk.blocks.0.attn.qkv.weight"
    teacher = start[f"model.image.{name}"]
    for step in steps:
        teacher = torch.lerp(teacher, step[f"model.image.{name}"], torch.tensor(1 - 0.9))
        torch.testing.assert_close(step[f"objectives.mean_teacher.teacher.{name}"], teacher)

    assert train(cut, pairs, *overrides, "trainer.duration=2steps").code == 0
    assert train(cut, pairs, *overrides, "trainer.duration=4steps").code == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert runs.tensors(cut / "run", file) == runs.tensors(whole / "run", file)


def test_hooks_that_an_objective_leaves_out_have_defaults() -> None:
    hooks = hooks_of(InfoNCE(tiny.image_text()))
    assert (hooks.num_views, hooks.perplexity, hooks.examples) == (0, False, None)
    hooks.set_tokenizer(None)  # type: ignore[arg-type]
    hooks.after_init(tiny.image_text())
    assert hooks.after_step is not Hooks.after_step


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("after_stp", "after_step"),
        ("afterinit", "after_init"),
        ("example", "examples"),
        ("num_view", "num_views"),
        ("constrain", "after_step(model, progress, skipped)"),
        ("fit", "set_tokenizer(tokenizer)"),
    ],
)
def test_a_misspelt_hook_is_refused(name: str, meant: str) -> None:
    kind = type("Mine", (nn.Module,), {name: lambda self: None, "helper": lambda self: None})
    message = rf"^objective.mine: Mine.{name} is no hook .* did you mean {re.escape(meant)}"
    with pytest.raises(ValueError, match=message):
        check_objective(kind(), "objective.mine")
    others = {"helper": lambda self: None, "_after_stp": None}
    check_objective(type("Mine", (nn.Module,), {**INDEPENDENT, **others})(), "objective.mine")


INDEPENDENT = {
    "streams": ("pairs",),
    "count": lambda self, batch: torch.tensor(len(batch.streams["pairs"])),
    "loss": lambda self, encodings: encodings.image_embedding("pairs").sum(),
}
COUPLED = {
    "streams": ("pairs",),
    "embed": lambda self, encodings: ({"image": encodings.image_embedding("pairs")}, {}),
    "loss": lambda self, rows, shared: rows["image"].sum(),
}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"streams": "pairs"}, r"Mine.streams is 'pairs'; expected the streams"),
        ({"streams": None}, r"Mine.streams is None; expected the streams"),
        ({"streams": ()}, r"Mine.streams is \(\); expected the streams"),
        ({"loss": None}, r"Mine lacks methods; expected loss, and count .* or embed"),
        ({"count": None}, r"Mine lacks methods"),
    ],
)
def test_an_objective_without_what_it_needs_is_refused(members: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^objective.mine: {message}"):
        check_objective(type("Mine", (nn.Module,), {**INDEPENDENT, **members})(), "objective.mine")


def test_an_objective_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^objective.mine: Mine is no torch.nn.Module"):
        check_objective(type("Mine", (), INDEPENDENT)(), "objective.mine")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({**INDEPENDENT, "count": lambda self, batch: 2}, r"count returned a int; expected a tensor with one number"),
        (
            {**INDEPENDENT, "loss": lambda self, encodings: encodings.image_embedding("pairs").sum(dim=1)},
            r"loss returned a tensor \[2\]; expected one number",
        ),
        (
            {**INDEPENDENT, "loss": lambda self, encodings: encodings.image_embedding("pairs").detach().sum()},
            r"loss returned a number without a gradient",
        ),
        (
            {**INDEPENDENT, "loss": lambda self, encodings: (encodings.image_embedding("pairs").sum(), {"hits": 1})},
            r"loss returned 'hits' as a int; expected a sum",
        ),
        (
            {**COUPLED, "embed": lambda self, encodings: {"image": encodings.image_embedding("pairs")}},
            r"embed returned a dict; expected two dictionaries",
        ),
        ({**COUPLED, "embed": lambda self, encodings: ({}, {})}, r"embed returned no rows"),
        (
            {**COUPLED, "embed": lambda self, encodings: ({"image": encodings.image_embedding("pairs").sum()}, {})},
            r"embed returned 'image' as a tensor \[\]; expected a tensor with one row for each of the 2 samples",
        ),
        ({**COUPLED, "loss": lambda self, rows, shared: rows["image"].sum(dim=1)}, r"loss returned a tensor \[2\]"),
    ],
)
def test_wrong_outputs_of_an_objective_are_refused(members: dict[str, object], message: str) -> None:
    task = Task(tiny.image_text(), {"mine": type("Mine", (nn.Module,), members)()})
    with pytest.raises(ValueError, match=f"^objective.mine: {message}"):
        reached_parameters(task, tiny.batch([5, 7]))


def test_a_coupled_objective_needs_no_shared_tensors() -> None:
    task = Task(tiny.image_text(), {"mine": type("Mine", (nn.Module,), COUPLED)()})
    assert any(name.startswith("model.image") for name in reached_parameters(task, tiny.batch([5, 7]))["mine"])


def test_an_objective_under_another_name_says_that_name(pairs: Path, tmp_path: Path) -> None:
    second = "+objective.mae2={_target_: mmpretrain.objectives.mae.MAE, mask_ratio: 0.001}"
    finished = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=1steps", second)
    assert finished.code == 2
    assert "objective.mae2.mask_ratio is 0.001" in finished.errors[0]


@pytest.mark.parametrize("part", ["model", "image", "a buffer"])
def test_an_objective_that_keeps_a_part_of_the_model_is_refused(part: str) -> None:
    model = tiny.image_text()
    objective: Any = type("Mine", (nn.Module,), INDEPENDENT)()
    if part == "a buffer":
        objective.register_buffer("mean", model.pixel_mean)
    else:
        objective.kept = model if part == "model" else model.image
    with pytest.raises(
        ValueError, match=r"^objective.mine: Mine keeps a part of the model, (kept|mean).*; expected a copy"
    ):
        check_objective(objective, "objective.mine", model)


def test_an_objective_may_keep_a_copy_of_the_model() -> None:
    model = tiny.image_text()
    objective: Any = type("Mine", (nn.Module,), INDEPENDENT)()
    objective.teacher = copy.deepcopy(model.image).requires_grad_(False)
    check_objective(objective, "objective.mine", model)


def test_pixels_of_a_view_are_normalised_as_those_of_the_image() -> None:
    model, batch = tiny.image_text(), tiny.batch([5, 7])
    views = torch.randint(0, 256, (2, 2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), dtype=torch.uint8)
    samples = replace(batch.streams["pairs"], views=views)
    encodings = Encodings(model, replace(batch, streams={"pairs": samples}))
    assert torch.equal(encodings.pixels("pairs", 1), model.normalize(views[:, 1]))
    assert torch.equal(encodings.view("pairs", 1).pooled, model.image(encodings.pixels("pairs", 1)).pooled)
    assert torch.equal(encodings.pixels("pairs"), model.normalize(batch.images("pairs")))
    with pytest.raises(ValueError, match=r"^data.train.pairs.views has too few for an objective that reads number 3"):
        encodings.pixels("pairs", 2)
