"""A run that is killed or stopped goes on exactly where it was: weights, moments and metrics, bit for bit."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from mmpretrain.checkpoints.store import save
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.training.resume import check_fingerprint
from mmpretrain.training.stop_signal import PREEMPTED_EXIT_CODE
from tests import runs

NUM_STEPS = 20
CHECKPOINT_EVERY = 5
LENGTH = (f"trainer.duration={NUM_STEPS}steps", f"checkpoint.every={CHECKPOINT_EVERY}steps")

Whole = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`whole(world_size, *overrides)`: what a run leaves that nobody disturbs; each is run once."""
    outcomes: dict[tuple[int | str, ...], dict[str, Any]] = {}

    def outcome(world_size: int, *overrides: str) -> dict[str, Any]:
        key = (world_size, *overrides)
        if key not in outcomes:
            folder = tmp_path_factory.mktemp("whole")
            for command in runs.start_group(folder, world_size, f"data.root={pairs}", *LENGTH, *overrides):
                finished = command.wait()
                assert finished.code == 0, finished.stderr
            outcomes[key] = runs.exact_outcome(folder / "run")
        return outcomes[key]

    return outcome


def kill(commands: list[runs.Command]) -> None:
    """SIGKILL to all of them at once."""
    for command in commands:
        command.send(signal.SIGKILL)
    assert [command.wait().code for command in commands] == [-signal.SIGKILL] * len(commands)


# Each of the steps 4, 6, 9, 10, 12 and 15 begins a stage; the checkpoint that is gone on from lies at step 5.
STAGES = (
    "objective=[infonce,mae,mlm]", *runs.TINY_MAE, "objective.mae.stream=images", "objective.mlm.stream=texts",
    "data.train.images.shards=train", "data.train.texts.shards=train", "data.train.texts.batch_size=8",
    "data.train.images.batch_size={piecewise: {0%: 16, 50%: 32}}", "trainer.freeze={text: 20%}",
    "objective.mae.weight={piecewise: {0%: 0, 30%: 0.5, 75%: 0}}", "objective.mlm.weight={linear: {0%: 1, 100%: 0.1}}",
    "objective.mae.mask_ratio={cosine: {0%: 0.5, 100%: 0.8}}", "objective.infonce.mask_ratio={piecewise: {0%: 0.5, 60%: 0}}",
    "data.train.pairs.image_size={piecewise: {0%: 16, 45%: 32}}", "trainer.diagnose_every=4steps",
    "data.train.pairs.text_length={piecewise: {0%: 8, 50%: 16}}", "data.train.pairs.shorten=block",
    "trainer.ema_decay={linear: {0%: 0.5, 100%: 0.99}}", "data.workers=auto",
)  # fmt: skip

VARIANTS = {"one process": (1, ())}

SLOW_VARIANTS = {
    "one process, three streams and six stages, an average": (1, STAGES),
    "two processes, workers, micro-batches, bf16, ragged masks": (
        2,
        ("data.workers=2", "trainer.micro_batch_size=4", "trainer.precision=bf16", "objective=[sigmoid,mae]",
         *runs.TINY_MAE),
    ),
    "two processes, FSDP2, three streams and six stages, an average": (
        2, (*STAGES, "parallel=fsdp", "parallel.activation_checkpointing=blocks"),
    ),
    "one process, workers, micro-batches, bf16, ragged masks": (
        1,
        ("data.workers=2", "trainer.micro_batch_size=4", "trainer.precision=bf16", "objective=[infonce,mae]",
         *runs.TINY_MAE),
    ),
    "two processes, three streams and six stages, an average": (2, STAGES),
    "two processes, bf16": (2, ("trainer.precision=bf16", "objective=[sigmoid]")),
    "two processes, workers, micro-batches, ragged masks": (
        2,
        ("data.workers=2", "trainer.micro_batch_size=4", "objective=[infonce,mae]", *runs.TINY_MAE),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [pytest.param(*variant, id=name) for name, variant in VARIANTS.items()]
    + [pytest.param(*variant, id=name, marks=pytest.mark.slow) for name, variant in SLOW_VARIANTS.items()],
)
def test_killed_run_ends_as_if_nothing_had_happened(
    world_size: int, overrides: tuple[str, ...], whole: Whole, pairs: Path, tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", (f"data.root={pairs}", *LENGTH, *overrides)
    commands = runs.start_group(tmp_path, world_size, *settings)
    # Some steps beyond the checkpoint, so that there is something to forget.
    commands[0].wait_for(
        lambda: runs.checkpoints(run) and runs.num_records(run) >= CHECKPOINT_EVERY + 2, "steps beyond a checkpoint"
    )
    kill(commands)
    assert runs.checkpoints(run)[-1].name < f"step_{NUM_STEPS:08d}"

    for command in runs.start_group(tmp_path, world_size, *settings):
        finished = command.wait()
        assert finished.code == 0, finished.stderr
    assert runs.exact_outcome(run) == whole(world_size, *overrides)


@pytest.mark.slow
def test_a_run_that_is_killed_while_shards_are_written_goes_on_from_the_checkpoint_before(
    whole: Whole, pairs: Path, tmp_path: Path
) -> None:
    run, sharded = tmp_path / "run", ("parallel=fsdp", "trainer.ema_decay=0.9")
    settings = (f"data.root={pairs}", *LENGTH, *sharded, "checkpoint.every=1steps")
    commands = runs.start_group(tmp_path, 2, *settings)
    partial = "checkpoints/.partial-*"
    commands[0].wait_for(lambda: runs.num_records(run) > 2 and list(run.glob(partial)), "shards being written")
    kill(commands)
    assert not (run / "results.json").exists(), "the run ended before it was killed"
    for command in runs.start_group(tmp_path, 2, *settings):
        finished = command.wait()
        assert finished.code == 0, finished.stderr
    assert "resumed from" in (run / "train.log").read_text()
    assert not list(run.glob(partial))
    assert runs.exact_outcome(run) == whole(2, *sharded)


def interrupt_at_random_moments(
    folder: Path,
    settings: tuple[str, ...],
    times: int,
    world_size: int = 1,
    number: signal.Signals = signal.SIGKILL,
) -> None:
    """Start a run over and over, and kill or stop it after some more steps, or in the middle of a save."""
    run, moments, during_saves = folder / "run", random.Random(0), 0
    for i in range(times):
        commands = runs.start_group(folder, world_size, *settings)
        first, steps, in_save = runs.num_records(run), moments.randrange(3), i % 2 == 1
        commands[0].wait_for(
            lambda first=first, steps=steps, in_save=in_save: (
                runs.num_records(run) > first + steps and (not in_save or list(run.glob("checkpoints/.partial-*")))
            ),
            "some steps",
        )
        if number == signal.SIGKILL:
            kill(commands)
            during_saves += bool(list(run.glob("checkpoints/.partial-*")))
        else:  # a launcher tells all processes, or one of them comes first
            for command in moments.sample(commands, moments.randint(1, world_size)):
                command.send(number)
            finished = [command.wait() for command in commands]
            assert [each.code for each in finished] == [PREEMPTED_EXIT_CODE] * world_size, finished[0].stderr
            during_saves += in_save
        assert not (run / "results.json").exists(), "the run ended before it was killed"
    assert during_saves > 0


@pytest.mark.slow
def test_kills_at_random_moments_always_leave_a_run_that_resumes(pairs: Path, tmp_path: Path) -> None:
    times = 20
    settings = (f"data.root={pairs}", f"trainer.duration={8 * times}steps", "checkpoint.every=1steps")
    interrupt_at_random_moments(tmp_path, settings, times)
    assert runs.train(tmp_path, *settings).code == 0
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial-*"))

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert runs.train(undisturbed, *settings).code == 0
    assert runs.exact_outcome(tmp_path / "run") == runs.exact_outcome(undisturbed / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fifty_interruptions_of_two_processes_change_nothing(
    number: signal.Signals, pairs: Path, tmp_path: Path
) -> None:
    settings = (f"data.root={pairs}", "trainer.duration=400steps", "checkpoint.every=1steps")
    interrupt_at_random_moments(tmp_path, settings, 50, 2, number)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    for folder in (tmp_path, undisturbed):
        for command in runs.start_group(folder, 2, *settings):
            finished = command.wait()
            assert finished.code == 0, finished.stderr
    assert runs.exact_outcome(tmp_path / "run") == runs.exact_outcome(undisturbed / "run")


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(whole: Whole, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (f"data.root={pairs}", *LENGTH)
    commands = runs.start_group(tmp_path, 2, *settings)
    commands[0].wait_for(lambda: runs.num_records(run) >= 3, "some steps")
    commands[1].send(signal.SIGTERM)
    stopped = [command.wait() for command in commands]
    assert [finished.code for finished in stopped] == [85, 85], stopped
    (line,) = [line for line in stopped[0].stderr.splitlines() if "stopped by a signal at step" in line]
    step = json.loads((runs.checkpoints(run)[-1] / "state.json").read_text())["step"]
    assert f"at step {step};" in line
    assert f"at step {step};" in stopped[1].stderr
    assert step < NUM_STEPS

    for command in runs.start_group(tmp_path, 2, *settings):
        finished = command.wait()
        assert finished.code == 0, finished.stderr
    assert runs.exact_outcome(run) == whole(2)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGUSR1, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_with_a_checkpoint_and_code_85(
    number: signal.Signals, whole: Whole, pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (f"data.root={pairs}", f"trainer.duration={NUM_STEPS}steps", "checkpoint.every=1000steps")
    command = runs.start_train(tmp_path, *settings)
    command.wait_for(lambda: runs.num_records(run) >= 3, "some steps")
    command.send(number)
    assert command.wait().code == 85
    assert len(runs.checkpoints(run)) == 1

    assert runs.train(tmp_path, *settings).code == 0
    assert runs.exact_outcome(run) == whole(1)


def test_signals_while_a_run_ends_leave_its_exit_code(pairs: Path, tmp_path: Path) -> None:
    settings = (f"data.root={pairs}", "trainer.duration=1000steps", "checkpoint.every=1000steps")
    command = runs.start_train(tmp_path, *settings)
    command.wait_for(lambda: runs.num_records(tmp_path / "run") >= 1, "a step")
    command.send_until_it_ends(signal.SIGTERM)
    assert command.wait().code == 85


def test_another_number_of_processes_goes_on_to_the_same_end(whole: Whole, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (f"data.root={pairs}", *LENGTH)
    commands = runs.start_group(tmp_path, 2, *settings, "trainer.micro_batch_size=4")
    commands[0].wait_for(lambda: runs.checkpoints(run), "a checkpoint")
    kill(commands)
    finished = runs.train(tmp_path, *settings, "trainer.micro_batch_size=8", "data.workers=1")
    assert finished.code == 0, finished.stderr

    expected = whole(1)
    metrics = runs.exact_outcome(run)["metrics"]
    assert [record["step"] for record in metrics] == [record["step"] for record in expected["metrics"]]
    for ours, theirs in zip(metrics, expected["metrics"]):
        if "train/loss" in theirs:
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)
    first_steps_on_two = load_file(runs.checkpoints(run)[0] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in first_steps_on_two.values())


@pytest.mark.slow
def test_a_run_sharded_over_two_processes_goes_on_on_one(whole: Whole, pairs: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", (f"data.root={pairs}", *LENGTH, "trainer.ema_decay=0.9")
    commands = runs.start_group(tmp_path, 2, *settings, "parallel=fsdp")
    commands[0].wait_for(lambda: runs.checkpoints(run), "a checkpoint")
    kill(commands)
    finished = runs.train(tmp_path, *settings)
    assert finished.code == 0, finished.stderr
    undisturbed = whole(1, "trainer.ema_decay=0.9")
    found = runs.exact_outcome(run)
    assert set(found) == set(undisturbed)
    for ours, theirs in zip(found["metrics"], undisturbed["metrics"], strict=True):
        assert ours.get("train/loss") == pytest.approx(theirs.get("train/loss"), rel=1e-4)
    for part in ("model", "optimizer", "ema"):
        ours, theirs = load(found[part]), load(undisturbed[part])
        assert set(ours) == set(theirs)
        # As one vector: Adam makes steps of rounding where a gradient is nothing but that, as of the keys' biases.
        one, other = (torch.cat([each[name].double().flatten() for name in sorted(each)]) for each in (ours, theirs))
        assert (one - other).norm() < 1e-3 * other.norm(), part


# ---------------------------------------------------------------------------------------------- what may change

SHORT = ("trainer.duration=4steps", "checkpoint.every=2steps", "schedule=constant")


@pytest.fixture(scope="module")
def short_run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 4 steps at a constant learning rate: to be copied, then gone on with."""
    folder = tmp_path_factory.mktemp("short")
    finished = runs.train(folder, f"data.root={pairs}", *SHORT)
    assert finished.code == 0, finished.stderr
    return folder


def go_on(short_run: Path, folder: Path, *overrides: str, schedule: str = "constant") -> runs.Finished:
    """The short run, copied to `folder`, with other overrides."""
    shutil.copytree(short_run / "run", folder / "run", dirs_exist_ok=True)
    return runs.train(folder, *SHORT, f"schedule={schedule}", *overrides)


@pytest.mark.slow
def test_what_does_not_touch_the_mathematics_may_change(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "data"
    shutil.copytree(pairs, moved)
    run = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(short_run / "run", run)
    finished = runs.train(
        tmp_path, f"data.root={moved}", *SHORT, f"run.dir={run}", "trainer.duration=8steps", "data.workers=1",
        "trainer.log_every=2steps", "trainer.eval_every=3steps", "trainer.micro_batch_size=8",
        "trainer.max_bad_steps=3", "checkpoint.every=3steps", "checkpoint.keep_last=2", "data.max_bad_fraction=0.5",
        "data.val_batch_size=16", "eval=[contrastive_loss]", "checkpoint.best=eval-val/contrastive_loss",
        "trainer.detect_anomaly=true", "trainer.profile_steps=1",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert "at step 4" in finished.stderr
    assert [path.name for path in runs.checkpoints(run)] == ["step_00000006", "step_00000008"]
    logged = [record["step"] for record in runs.records(run) if "train/loss" in record]
    assert logged == [1, 2, 3, 4, 6, 8]
    evaluated = [record["step"] for record in runs.records(run) if "eval-val/contrastive_loss" in record]
    assert evaluated == [6, 8]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "optimizer.lr=2e-3": "optimizer.lr: 0.001 -> 0.002",
            "trainer.precision=bf16": 'trainer.precision: "fp32" -> "bf16"',
            "objective.infonce.weight=2": "objective.infonce.weight: 1.0 -> 2",
            "trainer.batch_size=8": "trainer.batch_size: 16 -> 8",
            "model.text.depth=2": "model.text.depth: 1 -> 2",
            "data.train.pairs.caption=json.caption": 'data.train.pairs.caption: "txt" -> "json.caption"',
            "data.train.pairs.transform.scale=[0.5,1.0]": "data.train.pairs.transform.scale: [0.9, 1.0] -> [0.5, 1.0]",
            "trainer.ema_decay=0.9": "trainer.ema_decay: null -> 0.9",
            "trainer.freeze={image: null}": "trainer.freeze",
            "data.train.pairs.group=caption": 'data.train.pairs.group: null -> "caption"',
            "data.train.pairs.repeat_batches=1": "data.train.pairs.repeat_batches: null -> 1",
            "schedule.warmup=1steps": 'schedule.warmup: "0steps" -> "1steps"',
        },
        {
            "objective=[sigmoid]": "objective.sigmoid.weight: ",
            "optimizer=torch": "optimizer.name: ",
            "optimizer.name=SGD": 'optimizer.name: "absent" -> "SGD"',
        },
        {"schedule.warmup=1steps": 'schedule.warmup: "0steps" -> "1steps"'},
    ],
    ids=["values", "parts", "one"],
)
def test_what_touches_the_mathematics_may_not_change(
    changes: dict[str, str], short_run: Path, pairs: Path, tmp_path: Path
) -> None:
    finished = go_on(short_run, tmp_path, f"data.root={pairs}", "trainer.duration=8steps", *changes)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    for difference in changes.values():
        assert difference in line
    assert "trainer.duration" not in line


@pytest.mark.parametrize(
    ("depends", "what"),
    [
        (("schedule=constant", "schedule.cooldown=2steps"), "schedule would have had another value in step 2 of the 2"),
        pytest.param(
            ("schedule=constant", "trainer.ema_decay={linear: {0%: 0.5, 100%: 0.9}}"),
            "trainer.ema_decay would have had another value in step 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("schedule=constant", "trainer.freeze={image: 50%}"),
            "trainer.freeze.image would have had another value in step 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_duration_is_refused_where_a_step_would_have_been_another(
    depends: tuple[str, ...], what: str, pairs: Path, tmp_path: Path
) -> None:
    settings = (f"data.root={pairs}", *depends, "eval=[]")
    assert runs.train(tmp_path, *settings, "trainer.duration=2steps").code == 0
    finished = runs.train(tmp_path, *settings, "trainer.duration=4steps")
    assert finished.code == 2
    (line,) = finished.errors
    assert 'trainer.duration: "2steps" -> "4steps"' in line and what in line


@pytest.mark.slow
def test_a_run_can_be_extended_from_before_its_cool_down_bit_for_bit(pairs: Path, tmp_path: Path) -> None:
    settings = (
        f"data.root={pairs}", "schedule=wsd", "schedule.warmup=2steps", "schedule.cooldown=50%", "eval=[]",
        "checkpoint.every=1steps", "checkpoint.keep_last=0", "optimizer.weight_decay=0.1",
        "objective.infonce.mask_ratio={piecewise: {0%: 0.5, 90%: 0}}",
    )  # fmt: skip
    for duration in (6, 8):
        finished = runs.train(tmp_path, *settings, f"trainer.duration={duration}steps", f"run.dir={duration}")
        assert finished.code == 0, finished.stderr
    # The step that begins with the cool-down has a factor of 1 still: a branch may start after it, and not later.
    branch = tmp_path / "branch"
    (branch / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "6" / "config.yaml", branch)
    shutil.copytree(tmp_path / "6" / "checkpoints" / "step_00000004", branch / "checkpoints" / "step_00000004")
    finished = runs.train(tmp_path, *settings, "trainer.duration=8steps", "run.dir=branch")
    assert finished.code == 0, finished.stderr
    assert "at step 4" in finished.stderr
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert runs.tensors(tmp_path / "branch", name) == runs.tensors(tmp_path / "8", name), name
    rates = {
        step: [r["train/lr"] for r in runs.records(tmp_path / step) if "train/lr" in r] for step in ("branch", "8")
    }
    assert rates["branch"] == rates["8"][4:] and rates["8"][-1] < rates["8"][4]


def test_duration_that_ends_before_the_checkpoint_is_refused(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run / "run", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()  # so that the run is not taken for a finished one
    finished = runs.train(tmp_path, f"data.root={pairs}", *SHORT, "trainer.duration=3steps")
    assert finished.code == 2
    assert finished.errors == [finished.stderr.strip()]
    assert "trainer.duration ends at step 3, but run is at step 4" in finished.stderr


def test_finished_run_says_so_and_returns_its_scores_at_once(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    finished = go_on(short_run, tmp_path, f"data.root={pairs}")
    assert finished.code == 0
    (line,) = finished.stderr.splitlines()
    assert "run is finished" in line
    recall = runs.results(tmp_path / "run")["eval-val/text_retrieval_recall@5"]
    assert f"{recall:.4f}" in finished.stdout
    assert "eval-val/text_retrieval_recall@5" in finished.stdout
    for name in ("metrics.jsonl", "results.json", "config.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (short_run / "run" / name).read_bytes()


def test_finished_run_does_not_answer_for_other_data(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    runs.write_shard(data / "train" / "000001.tar", 100, 60)
    finished = go_on(short_run, tmp_path, f"data.root={data}")
    assert finished.code == 2
    assert "the data changed since" in finished.stderr and "run is finished" not in finished.stderr


# ---------------------------------------------------------------------------------------------- damage


def corrupt(path: Path) -> None:
    """One byte in the middle of a file becomes another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """The second half of a file is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (corrupt, "model.safetensors"),
        (truncate, "optimizer.safetensors"),
    ],
)
def test_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Callable[[Path], None], name: str, short_run: Path, pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run / "run", run)
    damage(runs.checkpoints(run)[-1] / name)
    finished = runs.train(tmp_path, f"data.root={pairs}", *SHORT)
    assert finished.code == 0, finished.stderr
    passed_over = [line for line in finished.stderr.splitlines() if "checkpoint passed over" in line]
    assert len(passed_over) == 1, finished.stderr
    assert "step_00000004" in passed_over[0]
    assert name in passed_over[0]
    assert "at step 2" in finished.stderr
    assert runs.exact_outcome(run) == runs.exact_outcome(short_run / "run")


@pytest.mark.slow
def test_a_flipped_byte_or_a_missing_file_never_changes_how_a_run_ends(pairs: Path, tmp_path: Path) -> None:
    """Each file of the newest checkpoint in turn, the middle byte; the checkpoint before it is whole."""
    settings = (
        f"data.root={pairs}", *SHORT, "trainer.eval_every=2steps", "eval=[retrieval]", "trainer.ema_decay=0.9",
        "checkpoint.best=eval-val/image_to_text_R1",
    )  # fmt: skip
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    assert runs.train(stopped, *settings).code == 0
    whole = tmp_path / "whole"
    shutil.copytree(stopped, whole)
    longer = (*settings, "schedule=constant", "trainer.duration=6steps")
    finished = runs.train(whole, *longer)
    assert finished.code == 0, finished.stderr
    expected = runs.exact_outcome(whole / "run")
    newest = runs.checkpoints(stopped / "run")[-1]
    names = sorted(path.name for path in newest.iterdir())
    assert names == [
        "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "scores.json", "state.json"
    ]  # fmt: skip
    for name in names:
        for damage in (corrupt, Path.unlink):
            folder = tmp_path / f"{damage.__name__}-{name}"
            shutil.copytree(stopped, folder)
            damage(folder / "run" / "checkpoints" / newest.name / name)
            finished = runs.train(folder, *longer)
            assert finished.code == 0, (name, finished.stderr)
            is_passed_over = "checkpoint passed over" in finished.stderr
            assert is_passed_over == (name != "scores.json"), finished.stderr
            assert runs.exact_outcome(folder / "run") == expected, (name, damage)


def test_leftovers_of_a_save_are_removed(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(short_run / "run", run)
    partial = run / "checkpoints" / ".partial-step_00000006"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    finished = runs.train(tmp_path, f"data.root={pairs}", *SHORT, "trainer.duration=5steps")
    assert finished.code == 0, finished.stderr
    assert not partial.exists()


def test_data_that_changed_under_a_checkpoint_is_refused(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    runs.write_shard(data / "train" / "000001.tar", 100, 60)
    finished = go_on(short_run, tmp_path, f"data.root={data}", "trainer.duration=8steps")
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: the data changed since ")
    assert "data.train.pairs has other shards or samples (changed: " in line
    assert "000001.tar" in line and "000000.tar" not in line
    assert "run.name=" in line


def test_a_checkpoint_of_before_shards_had_hashes_of_their_own_goes_on(pairs: Path, tmp_path: Path) -> None:
    shards = Shards(expand_shards("train", str(pairs)))
    now = {"data.train.pairs": {"pairs": shards.fingerprint}}
    for kept in (shards.fingerprint.hash, str(shards.fingerprint), "another"):
        known = {"data.train.pairs": {"pairs": kept}}
        state = {"step": 1, "samples": 16, "optimizer": {}, "fingerprint": known}
        path = save(tmp_path / kept[:34], 1, {}, state, 0)
        if kept == "another":
            with pytest.raises(ValueError, match=r"data\.train\.pairs has other shards or samples; expected"):
                check_fingerprint(path, now)
        else:
            check_fingerprint(path, now)


def test_moments_and_weights_are_those_of_the_checkpoint(short_run: Path) -> None:
    checkpoint = runs.checkpoints(short_run / "run")[-1]
    model, optimizer = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    steps = {name: tensor for name, tensor in optimizer.items() if name.endswith("/step")}
    assert {name.removesuffix("/step") for name in steps} <= set(model)
    assert all(torch.equal(tensor, torch.tensor(4.0)) for tensor in steps.values())


@pytest.mark.slow
def test_an_evaluation_that_a_kill_cut_short_is_done_again(pairs: Path, tmp_path: Path) -> None:
    settings = (
        f"data.root={pairs}", "trainer.duration=4steps", "trainer.eval_every=2steps", "checkpoint.keep_last=1",
        "checkpoint.best=eval-val/contrastive_loss", "eval=[contrastive_loss]", "optimizer.lr=0.01",
    )  # fmt: skip
    assert runs.train(tmp_path, *settings).code == 0
    run = tmp_path / "run"
    outcome, best = runs.exact_outcome(run), (run / "checkpoints" / "best").read_text()
    assert best == "step_00000004\n"
    # What a kill leaves before the scores are written, whatever of the rest has been.
    for lost in ([], ["checkpoints/best"], ["checkpoints/best", "results.json"]):
        for name in ["checkpoints/step_00000004/scores.json", *lost]:
            (run / name).unlink()
        again = runs.train(tmp_path, *settings)
        assert again.code == 0, again.stderr
        assert runs.exact_outcome(run) == outcome
        assert (run / "checkpoints" / "best").read_text() == best


def test_the_results_of_a_finished_run_are_written_again(short_run: Path, pairs: Path, tmp_path: Path) -> None:
    settings = (f"data.root={pairs}", *SHORT)
    run = tmp_path / "run"
    shutil.copytree(short_run / "run", run)
    expected = runs.exact_outcome(run)
    (run / "results.json").unlink()
    again = runs.train(tmp_path, *settings)
    assert again.code == 0, again.stderr
    assert runs.exact_outcome(run) == expected


@pytest.mark.slow
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
        runs.trained(folder, pairs, *settings)
        outcomes.append({**runs.exact_outcome(folder / "run"), "ema": runs.tensors(folder / "run", "ema.safetensors")})
    assert outcomes[0] == outcomes[1]
