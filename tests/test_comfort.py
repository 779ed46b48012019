"""What makes training comfortable, by the real command: averaged weights, fp16, best checkpoints, frozen parts."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file
from torch import Tensor

from mmpretrain.build import build_streams, build_task, build_tokenizer
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config.resolve import resolve
from mmpretrain.config.schema import register_schemas
from mmpretrain.data.order import step_positions
from mmpretrain.schedules import TrainingProgress
from mmpretrain.training.ema import EMA
from mmpretrain.training.precision import LossScale
from mmpretrain.training.resume import read_state
from mmpretrain.training.step_metrics import is_better
from tests import runs, tiny


def train(folder: Path, pairs: Path, *overrides: str, code: int = 0) -> runs.Finished:
    finished = runs.train(folder, f"data.root={pairs}", *overrides)
    assert finished.code == code, finished.stderr
    return finished


def weights(folder: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    return load_file(folder / "run" / "checkpoints" / f"step_{step:08d}" / f"{part}.safetensors")


# ---------------------------------------------------------------------------------------------- averaged weights


def test_average_is_that_of_every_steps_weights(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.duration=4steps", "checkpoint.every=1steps", "checkpoint.keep_last=0", "trainer.ema_decay=0.7")
    train(tmp_path, pairs, *settings)
    average = weights(tmp_path, 1, "ema")
    for step in (2, 3, 4):
        own = weights(tmp_path, step)
        average = {name: value * 0.7 + own[name] * 0.3 for name, value in average.items()}
        for name, value in weights(tmp_path, step, "ema").items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    results = runs.results(tmp_path / "run")
    assert "eval-val-ema/image_retrieval_recall@1" in results
    raw, averaged = (load_checkpoint(tmp_path / "run", ema=ema).model.state_dict() for ema in (False, True))
    name = "image_projection.weight"
    assert torch.equal(raw[name], weights(tmp_path, 4)[f"model.{name}"])
    assert torch.equal(averaged[name], weights(tmp_path, 4, "ema")[f"model.{name}"])


def test_a_skipped_step_leaves_the_average_as_it_is() -> None:
    model = tiny.image_text()
    average = EMA(model)
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with torch.no_grad():
        model.image_projection.weight.add_(1.0)  # type: ignore[union-attr]
    average.update(torch.tensor(1.0), 0.9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.tensors.items())
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.applied():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_run_without_average_refuses_to_give_one(pairs: Path, tmp_path: Path) -> None:
    train(tmp_path, pairs, "trainer.duration=1steps")
    with pytest.raises(ValueError, match=r"has no averaged weights; expected a run with trainer\.ema_decay"):
        load_checkpoint(tmp_path / "run", ema=True)


# ---------------------------------------------------------------------------------------------- fp16


def test_fp16_trains_close_to_fp32(pairs: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "fp16"):
        folder = tmp_path / precision
        folder.mkdir()
        train(folder, pairs, "trainer.duration=8steps", f"trainer.precision={precision}")
        losses[precision] = [record["train/loss"] for record in runs.records(folder / "run")]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp16"] != losses["fp32"]
    state = json.loads((runs.checkpoints(tmp_path / "fp16" / "run")[-1] / "state.json").read_text())
    assert state["loss_scale"] == 2.0**16
    assert state["good_steps"] == 8


def test_loss_scale_halves_at_a_bad_step_and_doubles_after_many_good_ones() -> None:
    scale = LossScale("fp16", torch.device("cpu"), None, 1998)
    gradients = [torch.full((3,), 2.0**17)]
    scale.unscale(gradients)
    assert gradients[0].tolist() == [2.0] * 3
    scale.update(torch.tensor(0.0))
    scale.update(torch.tensor(0.0))
    assert scale.state() == (2.0**17, 0)
    scale.update(torch.tensor(1.0))
    assert scale.state() == (2.0**16, 0)
    idle = LossScale("bf16", torch.device("cpu"), None, 0)
    idle.unscale(gradients)
    assert idle.scale is None and gradients[0].tolist() == [2.0] * 3


# ---------------------------------------------------------------------------------------------- the best checkpoint


def test_best_checkpoint_is_kept_and_can_be_named(pairs: Path, tmp_path: Path) -> None:
    metric = "eval-val/contrastive_loss"
    train(
        tmp_path, pairs, "trainer.duration=12steps", "trainer.eval_every=2steps", "eval=[contrastive_loss]",
        f"checkpoint.best={metric}", "checkpoint.keep_last=1", "checkpoint.every=100%", "optimizer.lr=0.05",
    )  # fmt: skip
    losses = {r["step"]: r[metric] for r in runs.records(tmp_path / "run") if metric in r}
    best = min(losses, key=lambda step: losses[step])
    assert len(losses) == 6
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best").read_text() == f"step_{best:08d}\n"
    assert {path.name for path in runs.checkpoints(tmp_path / "run")} == {f"step_{best:08d}", "step_00000012"}
    assert load_checkpoint(folder / "best").state["step"] == best
    assert read_state(load_checkpoint(folder / "best").path).best == losses[best]


def test_a_best_metric_that_nothing_gives_is_told(pairs: Path, tmp_path: Path) -> None:
    finished = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=2steps", "checkpoint.best=eval-val/acc1")
    assert finished.code == 0
    assert "checkpoint.best is 'eval-val/acc1', which no evaluation gave; they gave: eval-val/" in finished.stderr


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    nan = float("nan")
    assert is_better("eval-val/acc1", 0.1, None) and not is_better("eval-val/acc1", nan, None)
    assert is_better("eval-val/acc1", 0.2, 0.1) and not is_better("eval-val/acc1", 0.1, 0.1)
    assert is_better("eval-val/contrastive_loss", 1.0, 2.0) and not is_better("eval-val/contrastive_loss", nan, 2.0)


# ---------------------------------------------------------------------------------------------- frozen parts


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parts_wait_for_their_turn(world_size: int, pairs: Path, tmp_path: Path) -> None:
    finished = runs.train_group(
        tmp_path, world_size, f"data.root={pairs}", "trainer.duration=6steps", "checkpoint.every=1steps",
        "checkpoint.keep_last=0", "trainer.freeze={image.trunk.pos_embed: null, text: 4steps}",
    )  # fmt: skip
    assert [each.code for each in finished] == [0] * world_size, finished[0].stderr
    for step in range(1, 6):
        moved = changed(weights(tmp_path, step), weights(tmp_path, step + 1))
        assert "model.image.trunk.pos_embed" not in moved
        assert "model.image.trunk.patch_embed.proj.weight" in moved
        assert ("model.text.positional_embedding" in moved) == (step >= 4), step


def test_a_locked_tower_is_trained_against_as_it_is(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.duration=3steps", "checkpoint.every=1steps", "trainer.freeze={image: null}")
    train(tmp_path, pairs, *settings)
    moved = changed(weights(tmp_path, 1), weights(tmp_path, 3))
    assert not any(name.startswith("model.image.") for name in moved)
    assert {"model.image_projection.weight", "model.text.token_embedding.weight"} <= moved


def test_what_thaws_is_what_an_objective_reaches(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.freeze={image: 1steps, text: 1steps}", "objective=[mae]", *runs.TINY_MAE, "eval=[]")
    train(tmp_path, pairs, "trainer.duration=3steps", "checkpoint.every=1steps", *settings)
    moved = changed(weights(tmp_path, 1), weights(tmp_path, 3))
    assert any(name.startswith("model.image.") for name in moved)
    assert not any(name.startswith("model.text.") for name in moved)


def test_grey_images_are_trained_on_and_shown(pairs: Path, tmp_path: Path) -> None:
    grey = ("model.image.args.in_chans=1", "+model.image_mean=[0.5]", "+model.image_std=[0.25]")
    grey = (f"+{grey[0]}", *grey[1:])
    train(tmp_path, pairs, "trainer.duration=2steps", *grey)
    assert weights(tmp_path, 2)["model.image.trunk.patch_embed.proj.weight"].shape[1] == 1
    finished = runs.run("mmpretrain.export", [f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"], tmp_path)
    assert finished.code == 2 and "images of 1 channels" in finished.stderr
    refused = train(tmp_path, pairs, "trainer.duration=2steps", grey[0], "run.dir=other", code=2)
    assert "model.image takes 1 channels, and model.image_mean has 3 values" in refused.stderr
    refused = train(tmp_path, pairs, "augmentation=randaugment", *grey, "run.dir=other", code=2)
    assert "images of 1 channels; expected 3" in refused.stderr


def test_an_objective_of_weight_0_leaves_no_trace(pairs: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, overrides in (
        # The text encoder is mlm's, whatever its weight.
        ("without", ("objective=[infonce]", "model.text.causal=false", "model.text.vocab_size=49409")),
        ("with", ("objective=[infonce,mae,mlm,simclr]", *runs.TINY_MAE, "objective.mae.weight=0", "objective.simclr.weight=0",
                  "objective.mlm.weight={piecewise: {0%: 0, 50%: 0}}",
                  "objective.mae.stream=images", "data.train.images.shards=nowhere")),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        train(tmp_path / name, pairs, "trainer.duration=3steps", *overrides)
        outcomes.append(runs.exact_outcome(tmp_path / name / "run"))
    assert outcomes[0] == outcomes[1]


def test_views_are_read_for_an_objective_alone(pairs: Path) -> None:
    """Those that objective=simclr adds to the stream cost nothing where its weight is 0."""
    register_schemas()
    for weight, num_views in ((1.0, 2), (0.0, 0)):
        with initialize_config_module("mmpretrain.conf", version_base="1.3"):
            cfg = resolve(compose("train", [*runs.TINY_RUN, f"data.root={pairs}", "objective=[infonce,simclr]",
                                            f"objective.simclr.weight={weight}"]))  # fmt: skip
        task, _ = build_task(cfg)
        stream = build_streams(cfg, task)["pairs"]
        item = step_positions(stream.order, range(2), 0, 1, 1)[0]
        views = stream.read(item, build_tokenizer(cfg.data.tokenizer, task), TrainingProgress())[0].views
        assert (0 if views is None else views.shape[1]) == num_views


@pytest.mark.parametrize(
    "given", [(), ("data.train.images.views=${data.train.pairs.views}",)], ids=["own", "the pairs'"]
)
def test_views_of_a_stream_of_images(given: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    mix = ("objective=[infonce,simclr]", "objective.simclr.stream=images", "data.train.images.shards=train")
    small = ("objective.simclr.hidden_width=8", "objective.simclr.embed_dim=4")
    train(tmp_path, pairs, "trainer.duration=2steps", *mix, *small, *given)
    assert runs.records(tmp_path / "run")[-1]["train/simclr_loss"] > 0


def test_a_part_that_is_not_there_is_told(pairs: Path, tmp_path: Path) -> None:
    finished = train(tmp_path, pairs, "trainer.duration=1steps", "trainer.freeze={imag: null}", code=2)
    assert finished.stderr == (
        "error: trainer.freeze has 'imag', which is no part of the model; did you mean 'image'?\n"
    )


# ---------------------------------------------------------------------------------------------- all of it, killed


def test_everything_at_once_is_resumed_bit_for_bit(pairs: Path, tmp_path: Path) -> None:
    settings = (
        "trainer.duration=10steps", "trainer.ema_decay=0.9", "trainer.precision=fp16", "checkpoint.every=2steps",
        "trainer.freeze={text: 5steps}", "optimizer=timm", "optimizer.name=lamb",
        "checkpoint.best=eval-val/image_retrieval_recall@5",
        "objective.infonce.positives=group", "data.train.pairs.group=json.label", "augmentation=color_jitter",
        "data.train.pairs.caption={txt: 1, json.caption: 3}",
    )  # fmt: skip
    outcomes: list[dict[str, Any]] = []
    for name, stop in (("whole", None), ("killed", 5)):
        folder = tmp_path / name
        folder.mkdir()
        if stop is not None:
            command = runs.start_train(folder, f"data.root={pairs}", *settings)
            run = folder / "run"
            command.wait_for(lambda run=run: len(runs.checkpoints(run)) >= 2, "two checkpoints")
            command.send(signal.SIGKILL)
            command.wait()
        train(folder, pairs, *settings)
        outcomes.append({**runs.exact_outcome(folder / "run"), "ema": runs.tensors(folder / "run", "ema.safetensors")})
    assert outcomes[0] == outcomes[1]


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_a_finished_run_shows_nothing_of_the_environment_and_keeps_what_it_should(pairs: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "geheim"
    hidden.symlink_to(pairs)
    settings = ("data.root=${oc.env:HIDDEN}", "trainer.duration=4steps", "checkpoint.every=1steps", "run.name=a")
    environment = {"HIDDEN": str(hidden)}
    finished = runs.train(tmp_path, *settings, "checkpoint.keep_last=0", environment=environment)
    assert finished.code == 0, finished.stderr
    run = tmp_path / "run"
    for file in [run / "config.yaml", run / "report.html", *(run / "tensorboard").iterdir()]:
        assert b"geheim" not in file.read_bytes(), file
    assert "root: ${oc.env:HIDDEN}" in (run / "config.yaml").read_text()
    assert len(runs.checkpoints(run)) == 4
    # As a kill between the last save and the deletion leaves it; the same command then only says its results.
    finished = runs.train(tmp_path, *settings, "checkpoint.keep_last=2", environment=environment)
    assert finished.code == 0 and "is finished" in finished.stderr
    assert [path.name for path in runs.checkpoints(run)] == ["step_00000003", "step_00000004"]
    finished = runs.run("mmpretrain.evaluate", [f"checkpoint={run}"], tmp_path, environment)
    assert finished.code == 2
    (line,) = finished.errors
    assert "data.root is '${oc.env:HIDDEN}'" in line and "geheim" not in line
    finished = runs.run(
        "mmpretrain.evaluate", [f"checkpoint={run}", "eval=[retrieval]", f"data.root={pairs}"], tmp_path
    )
    assert finished.code == 0, finished.stderr


@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_a_gradient_of_millions_is_said_where_nothing_clips_it(clip: str, pairs: Path, tmp_path: Path) -> None:
    weight = "objective.infonce.weight={piecewise: {0%: 0.001, 80%: 1.0e+6}}"
    settings = ("trainer.duration=40steps", f"trainer.clip_grad_norm={clip}", "eval=[]", weight)
    finished = train(tmp_path, pairs, *settings)
    said = [line for line in finished.stderr.splitlines() if "had a gradient of norm" in line]
    assert len(said) == (clip == "null")
    assert not said or "step 33 had" in said[0]
