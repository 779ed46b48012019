"""Checkpoints between others: the arithmetic in NumPy, and the command, whose folders every other command reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.interpolate import interpolate, own_scales
from mmpretrain.checkpoints.load import find, load_checkpoint
from mmpretrain.config import config_yaml
from mmpretrain.config.schema import InterpolateConfig
from mmpretrain.data.classes import Classes
from mmpretrain.interpolate import run
from mmpretrain.objectives.base import hooks_of
from mmpretrain.objectives.classification import Classification
from mmpretrain.training.task import Task
from tests import runs, tiny
from tests.saved_runs import save_run


def save_two(folder: Path) -> tuple[Task, Task]:
    """Two runs of one model, `a` and `b` with other weights."""
    first = save_run(folder / "a")
    second = save_run(folder / "b")
    tiny.randomize(second)
    store.save(folder / "b" / "checkpoints", 10, {"model": second.state_dict(), "optimizer": {}}, {"samples": 7}, 0)
    return first, second


def test_it_is_the_weighted_sum_of_each_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        {
            "model.w": torch.randn(5, 3, generator=generator),
            "model.steps": torch.tensor(k),
            "objectives.infonce.logit_scale": torch.randn(1, generator=generator),
            f"objectives.only{k}.w": torch.ones(2),
        }
        for k in range(3)
    ]
    weights = [0.2, 0.5, 0.3]
    found = interpolate(tensors, weights)
    assert set(found) == {"model.w", "model.steps", "objectives.infonce.logit_scale"}
    for name in ("model.w", "objectives.infonce.logit_scale"):
        expected = sum(w * each[name].numpy().astype(np.float64) for w, each in zip(weights, tensors, strict=True))
        np.testing.assert_array_equal(found[name].numpy(), expected.astype(np.float32))
    assert found["model.steps"] == 2
    for k in range(3):
        alone = interpolate(tensors, [float(i == k) for i in range(3)])
        assert torch.equal(alone["model.w"], tensors[k]["model.w"])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"model.w": torch.zeros(2, 3)}, r"model\.w is \[2, 3\] in one and \[2, 2\] in another; expected"),
        ({"model.w": torch.zeros(2, 2), "model.v": torch.zeros(1)}, r"model\.v is \[1\] in one and absent in another"),
        ({}, r"model\.w is absent in one and \[2, 2\] in another"),
    ],
)
def test_other_models_are_refused_in_one_line(other: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=rf"^the checkpoints are not of one model: {told}"):
        interpolate([other, {"model.w": torch.zeros(2, 2)}], [0.5, 0.5])


def test_the_command_writes_runs_that_others_load(tmp_path: Path) -> None:
    first, second = save_two(tmp_path)
    (tmp_path / "a").rename(tmp_path / "run.seed=0")  # a name that Hydra could not parse without quotes
    arguments = ["checkpoints=[run.seed=0,b]", "alpha=[0,0.25,1]", "output=between"]
    finished = runs.run("mmpretrain.interpolate", arguments, tmp_path)
    assert finished.code == 0, finished.stderr
    folders = [f"between/alpha_{alpha}" for alpha in ("0", "0.25", "1")]
    assert finished.stdout.split() == folders
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ends = [load_checkpoint(tmp_path / folder) for folder in (folders[0], folders[2])]
    for loaded, task in zip(ends, (first, second), strict=True):
        assert torch.equal(loaded.model.embed_images(images), task.model.embed_images(images))
        assert loaded.scalars["logit_scale"] == task.logit_scale
        assert loaded.num_samples == 7
    assert not torch.equal(ends[0].model.embed_images(images), ends[1].model.embed_images(images))
    between = load_checkpoint(tmp_path / folders[1]).model.state_dict()
    a, b = first.model.state_dict(), second.model.state_dict()
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])
    again = runs.run("mmpretrain.interpolate", [*arguments[:2], "output=between"], tmp_path)
    assert again.code == 2
    assert again.errors == ["error: between/alpha_0 has checkpoints already; expected a new folder: output=..."]


def add_classifier(folder: Path, classes: list[str]) -> None:
    """Let a run of `save_run` be one that trained a classifier beside its other objectives."""
    loaded = load_checkpoint(folder)
    head = Classification(loaded.model, Classes(classes, [[name] for name in classes]), dropout=0.1)
    config = config_yaml.read(folder / "config.yaml")
    config["objective"]["classification"] = {"_target_": "mmpretrain.objectives.classification.Classification"}
    (folder / "config.yaml").write_text(config_yaml.to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"classes": {"classification": classes}}))
    tensors = store.load_tensors(find(folder)[1], "model")
    tensors |= {f"objectives.classification.{name}": tensor for name, tensor in head.state_dict().items()}
    store.save(folder / "checkpoints", 20, {"model": tensors, "optimizer": {}}, {"samples": 7}, 0)


@pytest.mark.parametrize(
    ("of_first", "kept"),
    [
        (["cat", "dog"], ["sigmoid", "infonce", "classification"]),
        (["dog", "cat"], ["sigmoid", "infonce"]),  # the rows of its head have other meanings
        (["cat", "dog", "elk"], ["sigmoid", "infonce"]),
        ([], ["sigmoid", "infonce"]),  # as between a pre-trained and a fine-tuned run
    ],
)
def test_objectives_that_all_have_are_kept(tmp_path: Path, of_first: list[str], kept: list[str]) -> None:
    save_two(tmp_path)
    if of_first:
        add_classifier(tmp_path / "a", of_first)
    add_classifier(tmp_path / "b", ["cat", "dog"])
    run(
        InterpolateConfig(
            checkpoints=[f"{tmp_path}/a", f"{tmp_path}/b"], alpha=0.5, output=f"{tmp_path}/between", ema=False
        )
    )
    loaded = load_checkpoint(tmp_path / "between" / "alpha_0.5")
    assert list(loaded.objectives) == kept
    head = loaded.objectives.get("classification")
    assert head is None or hooks_of(head).class_names == ["cat", "dog"]


def test_a_scale_that_another_objective_learned_is_interpolated_too(tmp_path: Path) -> None:
    save_two(tmp_path)
    for name, objective, scale in (("a", "infonce", 20.0), ("b", "classification", 30.0)):
        folder = tmp_path / name
        tensors = {k: t for k, t in store.load_tensors(find(folder)[1], "model").items() if k.startswith("model.")}
        tensors[f"objectives.{objective}.logit_scale"] = torch.tensor([scale]).log()
        if objective == "classification":
            tensors["objectives.classification.head.weight"] = torch.zeros(2, 12)
        config = config_yaml.read(folder / "config.yaml")
        target = {"infonce": "infonce.InfoNCE", "classification": "classification.Classification"}[objective]
        config["objective"] = {objective: {"_target_": f"mmpretrain.objectives.{target}"}}
        (folder / "config.yaml").write_text(config_yaml.to_yaml(config))
        store.save(folder / "checkpoints", 30, {"model": tensors, "optimizer": {}}, {"samples": 7}, 0)
    run(InterpolateConfig([f"{tmp_path}/a", f"{tmp_path}/b"], alpha=0.5, output=f"{tmp_path}/between", ema=False))
    loaded = load_checkpoint(tmp_path / "between" / "alpha_0.5")
    assert loaded.scalars["logit_scale"] == pytest.approx((20 * 30) ** 0.5)
    assert list(loaded.objectives) == ["infonce"]


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        ([{"objectives.a.logit_scale": 0}, {"objectives.b.logit_scale": 1}], ["a", "b"]),
        ([{"objectives.a.logit_scale": 0}, {"objectives.a.logit_scale": 1}], []),
        ([{"objectives.a.logit_scale": 0}, {"objectives.b.head": 1}], []),
        ([{"objectives.a.logit_scale": 0, "objectives.a.logit_bias": 1}, {"objectives.b.logit_scale": 1}], []),
    ],
)
def test_scales_of_other_names_are_found(checkpoints: list[dict[str, Any]], expected: list[str]) -> None:
    names = [list(dict.fromkeys(name.split(".")[1] for name in each)) for each in checkpoints]
    assert own_scales(checkpoints, names) == [f"objectives.{name}.logit_scale" for name in expected]


def test_equal_shares_are_refused(tmp_path: Path) -> None:
    cfg = InterpolateConfig(["a", "b"], alpha=[0.1, 0.10000001], output=str(tmp_path), ema=False)
    with pytest.raises(ValueError, match=r"^alpha is \[0\.1, 0\.10000001\], where two are equal to six digits"):
        run(cfg)


def test_without_alpha_it_is_the_mean(tmp_path: Path) -> None:
    first, second = save_two(tmp_path)
    finished = runs.run("mmpretrain.interpolate", ["checkpoints=[a,b,b]", "output=soup"], tmp_path)
    assert finished.code == 0, finished.stderr
    soup = load_checkpoint(tmp_path / "soup").model.state_dict()
    a, b = first.model.state_dict(), second.model.state_dict()
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (a[name] + 2 * b[name]) / 3)


@pytest.mark.slow
def test_a_run_begins_with_an_interpolated_checkpoint_and_does_not_resume_it(pairs: Path, tmp_path: Path) -> None:
    shared = ("checkpoint.every=1steps", "checkpoint.keep_last=0", "trainer.ema_decay=0.5")
    runs.trained(tmp_path, pairs, "trainer.duration=2steps", *shared, "run.dir=a")
    checkpoints = "checkpoints=[a/checkpoints/step_00000001,a]"
    for given in ((), ("ema=true",)):
        name = "ema" if given else "plain"
        finished = runs.run("mmpretrain.interpolate", [checkpoints, f"output={name}", *given], tmp_path)
        assert finished.code == 0, finished.stderr
        part = "ema" if given else "model"
        ends = [runs.weights(tmp_path / "a", step, part) for step in (1, 2)]
        middle = runs.weights(tmp_path / name, 0)
        assert set(middle) == set(ends[0])
        for tensor in middle:
            torch.testing.assert_close(middle[tensor], (ends[0][tensor] + ends[1][tensor]) / 2)
    runs.trained(tmp_path, pairs, "trainer.duration=1steps", "init_from=plain", "run.dir=b", "optimizer.lr=0")
    begun = runs.weights(tmp_path / "b", 1)
    for name, tensor in runs.weights(tmp_path / "plain", 0).items():
        torch.testing.assert_close(begun[name], tensor)
    scores = runs.run(
        "mmpretrain.evaluate", ["checkpoint=plain", "output=scores.json", "cache=none", "device=cpu"], tmp_path
    )
    assert scores.code == 0, scores.stderr
    assert "eval-val/image_retrieval_recall@1" in json.loads((tmp_path / "scores.json").read_text())
    refused = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=2steps", *shared, "run.dir=plain")
    assert refused.code == 2 and "has no 'step'; expected it as the run wrote it" in refused.errors[0]


@pytest.mark.slow
def test_adapters_are_merged_before_they_are_interpolated(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    runs.trained(tmp_path, pairs, "trainer.duration=1steps", "run.dir=a")
    lora = ("trainer.lora.rank=2", "init_from=a", "optimizer.lr=0.1", "schedule=constant")
    runs.trained(tmp_path, pairs, "trainer.duration=3steps", *lora, "run.dir=b")
    ends = [load_checkpoint(tmp_path / name).model.state_dict() for name in ("a", "b")]
    assert not torch.equal(*(end["text.transformer.resblocks.0.mlp.c_fc.weight"] for end in ends))
    interpolated = run(InterpolateConfig([str(tmp_path / "a"), str(tmp_path / "b")], 0.3, str(tmp_path / "c"), False))
    middle = load_checkpoint(interpolated[0]).model.state_dict()
    for name, tensor in middle.items():
        torch.testing.assert_close(tensor, 0.7 * ends[0][name] + 0.3 * ends[1][name])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"checkpoints": ["a"]}, r"checkpoints is \['a'\]; expected at least two"),
        ({"alpha": 2}, r"alpha is 2; expected a number at least 0 and at most 1"),
        ({"alpha": ["x"]}, r"alpha is \['x'\]; expected a number or a list of them"),
        ({"alpha": []}, r"alpha is \[\]; expected a number or a list of them"),
        ({"checkpoints": ["a", "b", "b"], "alpha": 0.5}, r"alpha is given with 3 checkpoints; expected two"),
        ({"checkpoints": ["a", "nowhere"]}, r"nowhere holds no checkpoint"),
        ({"ema": True}, r"has no averaged weights; expected a run with trainer.ema_decay"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    given: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_two(tmp_path)
    with pytest.raises(ValueError, match=told) as error:
        run(InterpolateConfig(**{"checkpoints": ["a", "b"], "output": "out", "ema": False, **given}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
