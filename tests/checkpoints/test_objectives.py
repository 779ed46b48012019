"""Objectives that are loaded with a checkpoint: what they compute, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mmpretrain.batch import Batch, Samples
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config import config_yaml, instantiate
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.objectives.base import hooks_of
from mmpretrain.training.task import Encodings, Task
from tests.saved_runs import MODEL, save_run

OBJECTIVES = "mmpretrain.objectives"
NODES: dict[str, dict[str, Any]] = {
    "mae": {"_target_": f"{OBJECTIVES}.mae.MAE", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "mlm": {"_target_": f"{OBJECTIVES}.mlm.MLM", "mask_ratio": 0.5, "weight": {"piecewise": {"0%": 0, "50%": 1}}},
    "unused": {"_target_": f"{OBJECTIVES}.infonce.InfoNCE", "weight": 0},
}


def save_heads(folder: Path, nodes: dict[str, dict[str, Any]] = NODES) -> Task:
    """Write a run with the objectives of `nodes`; returns what was saved."""
    text = {**MODEL["text"], "causal": False, "vocab_size": 49409}
    save_run(folder)
    config = config_yaml.read(folder / "config.yaml") | {"model": {**MODEL, "text": text}, "objective": nodes}
    model = instantiate.instantiate(config["model"], 3, "model")
    task = Task(model, {}).eval()
    for name, node in nodes.items():
        if node.get("weight") != 0:
            arguments = {key: value for key, value in node.items() if key != "weight"}
            task.objectives[name] = instantiate.instantiate(arguments, 4, f"objective.{name}", model=model)  # type: ignore[index]
            hooks_of(task.objectives[name]).set_tokenizer(ClipTokenizer(16))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (folder / "config.yaml").write_text(config_yaml.to_yaml(config))
    average = {name: tensor * 2 for name, tensor in task.state_dict().items()}
    parts = {"model": task.state_dict(), "optimizer": {"x": torch.ones(())}, "ema": average}
    store.save(folder / "checkpoints", 9, parts, {"samples": 9}, keep_last=1)
    return task


def batch() -> Batch:
    """Two samples with noise and words."""
    text, lengths = ClipTokenizer(16)(["a cat and a dog", "some of the other words there are"])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    return Batch({"pairs": Samples(torch.arange(2), torch.arange(2), torch.tensor([3, 4]), images, text, lengths)})


def test_loaded_objectives_compute_the_losses_of_those_that_were_saved(tmp_path: Path) -> None:
    task, loaded = save_heads(tmp_path), load_checkpoint(tmp_path)
    assert list(loaded.objectives) == ["mae", "mlm"] and loaded.objectives is loaded.objectives
    given = batch()
    for name, objective in loaded.objectives.items():
        assert not objective.training
        expected, found = (
            each.loss(Encodings(model, given))
            for each, model in ((task.objectives[name], task.model), (objective, loaded.model))
        )
        assert torch.equal(expected[0], found[0]) if name == "mlm" else torch.equal(expected, found)
    head = load_checkpoint(tmp_path, ema=True).objectives["mae"].predict.weight
    assert torch.equal(head, 2 * task.objectives["mae"].predict.weight)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_target_", "os.system", "objective.mae._target_ is 'os.system', which came with the checkpoint"),
        ("_target_", "mmpretrain.models.vit.TimmEncoder", "which came with the checkpoint"),
        ("_target_", f"{OBJECTIVES}.mae.Block", "which came with the checkpoint"),
        ("_target_", f"{OBJECTIVES}.base.Example", "which came with the checkpoint"),
        ("_target_", f"{OBJECTIVES}.base.CoupledObjective", "objective mae cannot be built (TypeError"),
        ("_target_", None, "objective.mae._target_ is None"),
        ("norm_pix", {"_target_": "os.system", "command": "touch ran"}, "objective.mae.norm_pix._target_"),
        ("_partial_", True, "partial is no torch.nn.Module"),
        ("decoder_depth", 10**9, "objective.mae.decoder_depth is 1000000000; expected at most"),
        ("decoder_depth", 10**4, "the objective mae has more weights than the checkpoint"),
        ("decoder_width", 10**5, "the objective mae has more weights than the checkpoint"),
        ("decoder_depth", 2, "the checkpoint does not hold the weights of the objective mae in"),
        ("decoder_depth", "x", "objective mae cannot be built (TypeError"),
        ("stream", "../x", "leads to files elsewhere"),
        ("stream", "${oc.env:HOME}", "an interpolation"),
        ("colour", 1, "objective mae cannot be built (TypeError"),
        ("weight", "x", "objective.mae.weight is 'x'"),
    ],
)
def test_an_objective_that_no_run_wrote_is_refused_when_it_is_asked_for(
    saved_heads: Path, name: str, value: Any, message: str
) -> None:
    before = (saved_heads / "config.yaml").read_text()
    plain = yaml.safe_load(before)
    plain["objective"]["mae"][name] = value
    (saved_heads / "config.yaml").write_text(yaml.safe_dump(plain))
    try:
        loaded = load_checkpoint(saved_heads)  # the model is sound
        with pytest.raises(ValueError, match=r".") as raised:
            loaded.objectives  # noqa: B018
    finally:
        (saved_heads / "config.yaml").write_text(before)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not Path("ran").exists()


@pytest.fixture(scope="module")
def saved_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_heads(folder, {"mae": NODES["mae"]})
    return folder


def test_an_objective_of_ones_own_is_loaded_once_its_module_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_heads.py").write_text(
        "from mmpretrain.objectives.mae import MAE\n\n\nclass Mine(MAE):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    save_heads(tmp_path / "run", {"mine": {**NODES["mae"], "_target_": "own_heads.Mine"}})
    with pytest.raises(ValueError, match=r"is 'own_heads.Mine'.* name its module: trust=\[own_heads\]"):
        load_checkpoint(tmp_path / "run").objectives  # noqa: B018
    (mine,) = load_checkpoint(tmp_path / "run", trust=["own_heads"]).objectives.values()
    assert isinstance(mine, nn.Module) and type(mine).__name__ == "Mine"
