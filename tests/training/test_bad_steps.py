"""Steps that are skipped, for a gradient that is not finite or a loss spike, and rollbacks, by the real command."""

import json
import math
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmpretrain.training.spikes import LossSpikes, spikes_in
from mmpretrain.training.step import StepLosses
from tests import runs

# ---------------------------------------------------------------------------------------------- the non-finite guard

# A loss with a fault in the rows whose `by` (ids or positions) lie from `first` to `last`: it is not a number, the gradient
# of one parameter is not, or it is a thousand times as large. It logs the smallest position of each forward pass.
OBJECTIVE = """
import os

import torch
from torch import nn


class Fragile(nn.Module):
    def __init__(self, model, fault: str, by: str, first: int, last: int, stream: str = "pairs") -> None:
        super().__init__()
        self.streams = (stream,)
        self.fault, self.by, self.first, self.last = fault, by, first, last
        self.scale = nn.Parameter(torch.ones(1))

    def count(self, batch):
        return torch.tensor(len(batch.streams[self.streams[0]]))

    def loss(self, encodings):
        (stream,) = self.streams
        samples = encodings.samples(stream)
        if len(samples) > 2:  # not the examples that are tried before the run
            with open(f"positions-{os.environ.get('RANK', 0)}.txt", "a") as log:
                print(int(samples.positions.min()), file=log)
        values = getattr(samples, self.by)
        is_bad = (values >= self.first) & (values <= self.last)
        factor = torch.where(is_bad, {"loss": torch.nan, "gradient": 1.0, "spike": 1e3}[self.fault], 1.0)
        one = (self.scale * torch.where(is_bad & (self.fault == "gradient"), 0.0, 1.0)).sqrt()
        return ((encodings.image_embedding(stream)[:, 0] - 1).square() * factor + one).sum()
"""
OBJECTIVE_YAML = """
fragile:
  _target_: fragile.Fragile
  fault: loss
  by: ids
  first: 1000
  last: 1000
"""


@pytest.fixture
def fragile(tmp_path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Overrides and environment of a run with the fragile objective."""
    (tmp_path / "fragile.py").write_text(OBJECTIVE)
    group = tmp_path / "conf" / "objective"
    group.mkdir(parents=True)
    (group / "fragile.yaml").write_text(OBJECTIVE_YAML)
    overrides = (f"hydra.searchpath=[file://{tmp_path}/conf]", "objective=[infonce,fragile]", "eval=[]")
    return overrides, {"PYTHONPATH": str(tmp_path)}


SPIKES = ("objective.fragile.fault=spike", "trainer.spike.window=5", "trainer.spike.threshold=50")


@pytest.mark.parametrize(
    ("fault", "world_size"),
    [
        pytest.param("loss", 2, marks=pytest.mark.slow),
        ("gradient", 1),
        ("spike", 2),
        pytest.param("loss", 1, marks=pytest.mark.slow),
        pytest.param("gradient", 2, marks=pytest.mark.slow),
        pytest.param("spike", 1, marks=pytest.mark.slow),
    ],
)
def test_a_bad_step_changes_nothing(
    fault: str, world_size: int, fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    commands = runs.start_group(
        tmp_path, world_size, f"data.root={pairs}", *overrides, "trainer.duration=12steps", "trainer.micro_batch_size=4",
        "checkpoint.every=1steps", "checkpoint.keep_last=0", f"objective.fragile.fault={fault}", "objective.fragile.first=7",
        "objective.fragile.last=7", *SPIKES[1:], "trainer.spike.action=skip",
        environment=environment,
    )  # fmt: skip
    finished = [command.wait() for command in commands]
    assert [each.code for each in finished] == [0] * world_size, finished[0].stderr

    (skipped,) = re.findall(r"step (\d+) skipped, its .*samples of pairs: (.*)", finished[0].stderr)
    step, keys = int(skipped[0]), [name.rpartition(":")[2] for name in skipped[1].split(", ")]
    assert len(keys) == runs.BATCH_SIZE
    assert "000007" in keys
    assert all(name.startswith(f"{pairs}/train/") for name in skipped[1].split(", "))

    saved = [path / name for path in runs.checkpoints(tmp_path / "run") for name in ("model.safetensors",)]
    models = [path.read_bytes() for path in saved]
    moments = [path.with_name("optimizer.safetensors").read_bytes() for path in saved]
    for before in range(len(models) - 1):
        is_skipped = before + 2 == step
        assert (models[before] == models[before + 1]) == is_skipped
        assert (moments[before] == moments[before + 1]) == is_skipped
    assert all(tensor.isfinite().all() for tensor in load_file(saved[-1]).values())
    (record,) = [record for record in runs.records(tmp_path / "run") if record["step"] == step]
    assert (record["train/grad_norm"] is None) == (fault != "spike")
    assert (record["train/fragile_loss"] is None) == (fault == "loss")
    is_spike = "robust standard deviations above" in finished[0].stderr
    assert is_spike == (fault == "spike")
    assert math.isfinite(record["train/infonce_loss"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_too_many_bad_steps_in_a_row_end_the_run_in_one_line(
    world_size: int, fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    commands = runs.start_group(
        tmp_path, world_size, f"data.root={pairs}", *overrides, "trainer.duration=12steps", "trainer.max_bad_steps=3",
        "objective.fragile.first=0", "objective.fragile.last=199", environment=environment,
    )  # fmt: skip
    for command in commands:
        finished = command.wait()
        assert finished.code == 1
        (line,) = [line for line in finished.stderr.splitlines() if "error: " in line]
        assert "3 steps in a row were skipped, the last one since its gradient is not finite" in line
        assert "trainer.max_bad_steps = 3" in line
        assert "Traceback" not in finished.stderr
    skipped = re.findall(r"step (\d+) skipped", (tmp_path / "run" / "train.log").read_text())
    assert skipped == ["1", "2", "3"]


def test_a_stopped_run_has_named_every_skipped_step(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    run = tmp_path / "run"
    command = runs.start_train(
        tmp_path, f"data.root={pairs}", *overrides, "trainer.duration=100ksteps", "trainer.max_bad_steps=100000",
        "objective.fragile.first=0", "objective.fragile.last=199", environment=environment,
    )  # fmt: skip
    command.wait_for(lambda: runs.num_records(run) >= 1, "a step")
    command.send(signal.SIGTERM)
    assert command.wait().code == 85
    skipped = re.findall(r"step (\d+) skipped", (run / "train.log").read_text())
    saved = json.loads((runs.checkpoints(run)[-1] / "state.json").read_text())["step"]
    assert [int(step) for step in skipped] == list(range(1, saved + 1))


def test_bad_steps_apart_from_each_other_do_not_end_the_run(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    # Four samples in two epochs, of which no three steps in a row can be made.
    finished = runs.train(
        tmp_path, f"data.root={pairs}", *overrides, "trainer.duration=25steps", "trainer.max_bad_steps=3",
        "objective.fragile.first=40", "objective.fragile.last=41", environment=environment,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert 2 <= finished.stderr.count("skipped, its gradient is not finite") <= 4


# ---------------------------------------------------------------------------------------------- loss spikes


def step_losses(coupled: Mapping[str, float], independent: Mapping[str, tuple[float, float]]) -> StepLosses:
    """Losses of a step on one rank: those of coupled objectives, and (sum, count) of independent ones."""
    return StepLosses(
        {name: torch.tensor(loss) for name, loss in coupled.items()},
        {name: {"loss": torch.tensor(total)} for name, (total, _) in independent.items()},
        {name: torch.tensor(count, dtype=torch.float64) for name, (_, count) in independent.items()},
        {},
    )


def spike_score(window: Sequence[float], loss: float, threshold: float) -> float:
    """The z-score of a loss, or 0 if it is no spike, from the definition by sorting."""
    median = sorted(window)[(len(window) - 1) // 2]
    deviation = sorted(abs(each - median) for each in window)[(len(window) - 1) // 2]
    z = (loss - median) / max(1.4826 * deviation, 0.001 * abs(median))
    return z if z >= threshold else 0.0


@pytest.mark.parametrize("num_steps", [4, 7])
def test_spikes_are_the_losses_above_the_threshold_of_their_window(num_steps: int) -> None:
    rng, threshold = np.random.default_rng(num_steps), 5.0
    spikes = LossSpikes(["a", "b"], {}, {}, num_steps, threshold, torch.device("cpu"))
    windows: dict[str, list[float]] = {"a": [], "b": []}
    found = 0
    for i in range(200):
        losses = {"a": 2 + 0.1 * rng.standard_normal(), "b": rng.random()}
        if i % 23 == 22:
            losses["a"] += 3
        if i % 31 == 30:
            losses["b"] = math.nan
        losses = {name: float(np.float32(loss)) for name, loss in losses.items()}
        expected = {
            name: spike_score(window, losses[name], threshold) if len(window) == num_steps else 0.0
            for name, window in windows.items()
        }
        for name, window in windows.items():
            if not any(expected.values()) and math.isfinite(losses[name]):
                window[:] = [*window, losses[name]][-num_steps:]
        if i == 100:  # goes on from its state
            spikes = LossSpikes(
                ["a", "b"], *json.loads(json.dumps(spikes.state())), num_steps, threshold, torch.device("cpu")
            )
        spikes.measure(step_losses({"a": losses["a"]}, {"b": (losses["b"] * 4, 4)}))
        assert float(spikes.update()) == float(any(expected.values()))
        flags = {name: float(score) for name, score in spikes.flags().items()}
        assert spikes_in(flags) == pytest.approx({name: z for name, z in expected.items() if z}, rel=1e-9)
        assert spikes.state() == (windows, spikes_in(flags))
        found += any(expected.values())
    assert found >= 8


def test_losses_that_do_not_vary_are_compared_by_a_thousandth() -> None:
    spikes = LossSpikes(["a"], {"a": [2.0] * 4}, {}, 4, 6.0, torch.device("cpu"))
    for loss, expected in ((2.011, 0.0), (2.013, 1.0), (1.0, 0.0)):
        spikes.measure(step_losses({"a": loss}, {}))
        assert float(spikes.update()) == expected


def test_an_objective_that_is_not_computed_keeps_its_window() -> None:
    spikes = LossSpikes(["a", "b"], {"a": [2.0, 2.1], "b": [9.0, 9.1]}, {}, 2, 100.0, torch.device("cpu"))
    spikes.measure(step_losses({"b": 9.25}, {}))
    assert float(spikes.update()) == 0.0
    assert spikes.state()[0] == {"a": [2.0, 2.1], "b": [9.1, 9.25]}


# Of 16 steps of 16 samples, the eleventh has a spike. The run goes back from there to step 8, and passes over three steps.
ROLLBACK = (
    *SPIKES, "trainer.spike.action=rollback", "objective.fragile.by=positions", "objective.fragile.first=165",
    "objective.fragile.last=165", "trainer.duration=16steps", "checkpoint.every=4steps", "schedule=constant",
)  # fmt: skip
TAKEN = [*range(12), *range(11, 19)]
"""Batches by which the forward passes go: the twelfth is under way when the spike is known."""


def positions(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "positions-0.txt").read_text().split()]


@pytest.mark.parametrize(("workers", "limit"), [pytest.param(0, 1, marks=pytest.mark.slow), (2, 10)])
def test_a_rollback_goes_on_from_the_last_checkpoint_with_later_samples(
    workers: int, limit: int, fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    finished = runs.train(
        tmp_path, f"data.root={pairs}", *overrides, *ROLLBACK, f"data.workers={workers}",
        f"trainer.max_bad_steps={limit}", environment=environment,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert re.search(r"step 11 skipped, its fragile loss lies \S+ robust standard deviations above", finished.stderr)
    assert "step 11: rolled back to step 8; the samples of the steps since then are passed over" in finished.stderr
    assert positions(tmp_path) == [16 * step for step in TAKEN]
    assert [record["step"] for record in runs.records(tmp_path / "run")] == list(range(1, 17))
    state = json.loads((runs.checkpoints(tmp_path / "run")[-1] / "state.json").read_text())
    assert (state["step"], state["passed_over"], state["num_rollbacks"]) == (16, {"pairs": 48}, 0)
    assert all(record["train/fragile_loss"] < 100 for record in runs.records(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, "ddp"), (2, "ddp"), (2, "fsdp")],
)
def test_a_run_with_a_rollback_that_is_stopped_and_killed_ends_as_if_nothing_had_happened(
    world_size: int, parallel: str, fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    settings = (
        f"data.root={pairs}", *overrides, *ROLLBACK, f"parallel={parallel}", "trainer.ema_decay=0.9",
        "checkpoint.keep_last=1",
    )  # fmt: skip

    def start(folder: Path) -> list[runs.Command]:
        folder.mkdir(exist_ok=True)
        return runs.start_group(folder, world_size, *settings, environment=environment)

    def finish(folder: Path) -> None:
        for command in start(folder):
            finished = command.wait()
            assert finished.code == 0, finished.stderr

    finish(tmp_path / "whole")
    expected = runs.exact_outcome(tmp_path / "whole" / "run")
    # Before the spike and its rollback, between the two, and after them.
    for number in (signal.SIGTERM, signal.SIGKILL):
        for steps in (9, 11, 13):
            folder = tmp_path / f"{number.name}-{steps}"
            commands = start(folder)
            commands[0].wait_for(lambda: len(positions_so_far(folder)) >= steps, f"step {steps}")  # noqa: B023
            for command in commands:
                command.send(number)
            codes = {command.wait().code for command in commands}
            assert codes <= ({85, 0} if number == signal.SIGTERM else {-9, 0}), commands[0].stderr
            finish(folder)
            assert runs.exact_outcome(folder / "run") == expected, (number, steps)


def positions_so_far(folder: Path) -> list[str]:
    path = folder / "positions-0.txt"
    return path.read_text().split() if path.exists() else []


def test_a_spike_of_a_step_with_a_checkpoint_goes_back_to_the_one_before(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    finished = runs.train(
        tmp_path, f"data.root={pairs}", *overrides, *ROLLBACK, "trainer.duration=12steps",
        "objective.fragile.first=180", "objective.fragile.last=180", environment=environment,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert "step 12: rolled back to step 8" in finished.stderr
    assert positions(tmp_path) == [16 * step for step in (*range(12), *range(12, 16))]


def test_a_spike_before_the_first_checkpoint_is_skipped(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    finished = runs.train(
        tmp_path, f"data.root={pairs}", *overrides, *ROLLBACK, "checkpoint.every=11steps", environment=environment
    )
    assert finished.code == 0, finished.stderr
    assert "step 11 skipped" in finished.stderr
    assert positions(tmp_path) == [16 * step for step in range(16)]
    state = json.loads((runs.checkpoints(tmp_path / "run")[0] / "state.json").read_text())
    assert (state["step"], state["due_step"]) == (11, 0)


def test_rollbacks_that_meet_spikes_again_end_the_run_in_one_line(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    finished = runs.train(
        tmp_path, f"data.root={pairs}", *overrides, *ROLLBACK, "objective.fragile.last=100000",
        "trainer.max_bad_steps=2", environment=environment,
    )  # fmt: skip
    assert finished.code == 1
    (line,) = [line for line in finished.stderr.splitlines() if "error: " in line]
    assert "step 9: a loss spike again after 2 rollbacks to step 8, the limit is trainer.max_bad_steps = 2" in line
    # After step 11 the run takes step 9 twice more, each with a batch that no step has taken, and sees the next one.
    assert positions(tmp_path) == [16 * step for step in (*range(12), 11, 12, 12, 13)]


@pytest.mark.slow
def test_rollbacks_that_are_switched_on_later_end_at_the_limit_too(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    settings = (f"data.root={pairs}", *overrides, *ROLLBACK, "trainer.max_bad_steps=2")
    # Spikes from step 16 on: the window is full by then.
    faults = ("objective.fragile.first=240", "objective.fragile.last=100000", "trainer.duration=40steps")
    first = (*settings, *faults, "trainer.spike.action=none", "trainer.duration=8steps")
    assert runs.train(tmp_path, *first, environment=environment).code == 0
    finished = runs.train(tmp_path, *settings, *faults, environment=environment)
    assert finished.code == 1, finished.stderr
    assert finished.stderr.count("rolled back to step 12") == 2
    assert "a loss spike again after 2 rollbacks to step 12" in finished.stderr


@pytest.mark.slow
def test_a_rollback_passes_over_a_damaged_checkpoint(
    fragile: tuple[tuple[str, ...], dict[str, str]], pairs: Path, tmp_path: Path
) -> None:
    overrides, environment = fragile
    run = tmp_path / "run"
    # Checkpoints are due at steps 30 and 60, the signal's comes after step 60, and the spike at step 89.
    settings = (
        f"data.root={pairs}", *overrides, *ROLLBACK, "checkpoint.keep_last=0", "checkpoint.every=30steps",
        "trainer.duration=92steps", "objective.fragile.first=1410", "objective.fragile.last=1410",
    )  # fmt: skip
    command = runs.start_train(tmp_path, *settings, environment=environment)
    command.wait_for(lambda: len(positions_so_far(tmp_path)) >= 61, "step 61")
    command.send(signal.SIGTERM)
    assert command.wait().code == 85
    tensors = run / "checkpoints" / "step_00000060" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    finished = runs.train(tmp_path, *settings, environment=environment)
    assert finished.code == 0, finished.stderr
    assert "going back to the one before" in finished.stderr and "rolled back to step 30" in finished.stderr
    assert (run / "checkpoints" / "corrupt_step_00000060").is_dir()
    assert json.loads((runs.checkpoints(run)[-1] / "state.json").read_text())["passed_over"] == {
        "pairs": (89 - 30) * 16
    }


@pytest.mark.slow
def test_a_rollback_loses_no_line_of_the_quarantine(
    fragile: tuple[tuple[str, ...], dict[str, str]], tmp_path: Path
) -> None:
    overrides, environment = fragile
    data = runs.write_pairs(tmp_path / "data", broken=range(0, 200, 7))
    settings = (f"data.root={data}", *overrides, *ROLLBACK, "data.max_bad_fraction=1")
    quarantined = []
    for every in ("1steps", "100steps"):
        folder = tmp_path / every
        folder.mkdir()
        finished = runs.train(folder, *settings, f"trainer.log_every={every}", environment=environment)
        assert finished.code == 0 and "rolled back" in finished.stderr, finished.stderr
        quarantined.append(sorted((folder / "run" / "quarantine.jsonl").read_text().splitlines()))
    assert quarantined[0] == quarantined[1]


def test_a_rollback_needs_checkpoints_at_steps(pairs: Path, tmp_path: Path) -> None:
    finished = runs.train(
        tmp_path,
        f"data.root={pairs}",
        "trainer.duration=4steps",
        "trainer.spike.action=rollback",
        "checkpoint.every=10min",
    )
    assert finished.code == 2
    (line,) = finished.errors
    assert "trainer.spike.action is rollback, but checkpoint.every is 10min" in line
