"""Processes that are killed, stopped or told to end: named in one line, and the last whole step is saved."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs

LONG = ("trainer.duration=100000steps", "checkpoint.every=100000steps", "schedule=constant")


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_steps(folder: Path, number: int) -> bool:
    return (folder / "metrics.jsonl").exists() and len(runs.records(folder)) >= number


def goes_on(folder: Path, pairs: Path, *stderr: str) -> None:
    """The last whole step is saved and named, and the run goes on from it with nothing logged twice or left out."""
    run = folder / "run"
    (saved,) = runs.checkpoints(run)
    step = int(saved.name.removeprefix("step_"))
    assert step >= 3
    told = re.compile(rf"goes on from step {step}\b|at step {step}; the same command goes on from there")
    assert any(told.search(text) for text in stderr), stderr
    again = runs.train(folder, *LONG, f"data.root={pairs}", f"trainer.duration={step + 2}steps")
    assert again.code == 0, again.stderr
    assert [record["step"] for record in runs.records(run)] == list(range(1, step + 3))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, r"worker \d of the data loader \(process \d+\) was killed by SIGKILL"),
        (signal.SIGSTOP, r"no batch came in 2 seconds \(data.timeout_seconds\): worker \d .* is stopped"),
    ],
)
def test_a_worker_that_is_killed_or_stopped_is_named(
    number: signal.Signals, expected: str, pairs: Path, tmp_path: Path
) -> None:
    command = runs.start_train(tmp_path, *LONG, f"data.root={pairs}", "data.workers=2", "data.timeout_seconds=2")
    command.wait_for(lambda: has_steps(tmp_path / "run", 3), "some steps")
    os.kill(children(command.pid)[0], number)
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert re.search(rf"error: step \d+: {expected}", finished.stderr), finished.stderr
    goes_on(tmp_path, pairs, finished.stderr)


@pytest.mark.parametrize(
    ("lost", "number"),
    [
        (0, signal.SIGKILL),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        (1, signal.SIGKILL),
        (1, signal.SIGSTOP),
    ],
)
def test_a_rank_that_is_killed_or_stopped_is_named(
    lost: int, number: signal.Signals, pairs: Path, tmp_path: Path
) -> None:
    commands = [
        runs.start_train(tmp_path, *LONG, f"data.root={pairs}", "parallel.timeout_seconds=4", environment=environment)
        for environment in runs.group(2)
    ]
    commands[0].wait_for(lambda: has_steps(tmp_path / "run", 3), "some steps")
    commands[lost].send(number)
    left = commands[1 - lost].wait()
    commands[lost].send(signal.SIGKILL)
    commands[lost].wait()
    assert left.code == 1, left.stderr
    assert "Traceback" not in left.stderr
    assert re.search(rf"error: step \d+: rank {lost} is lost", left.stderr), left.stderr
    if lost == 1:
        goes_on(tmp_path, pairs, left.stderr)


def test_a_rank_that_is_lost_before_training_is_named(pairs: Path, tmp_path: Path) -> None:
    environments = runs.group(2)
    alone = runs.start_train(
        tmp_path, *LONG, f"data.root={pairs}", "parallel.timeout_seconds=5", environment=environments[0]
    )
    finished = alone.wait()
    assert finished.code == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "error: before training began" in finished.stderr


# ---------------------------------------------------------------- SIGTERM


def catches_sigterm(pid: int) -> bool:
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    "entry", [["-m", "mmpretrain.train"], ["-c", "from mmpretrain.training.stop_signal import train; train()"]]
)
def test_a_signal_while_torch_is_imported_ends_with_85(entry: list[str], pairs: Path, tmp_path: Path) -> None:
    command = [sys.executable, *entry, *runs.TINY_RUN, *LONG, f"data.root={pairs}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        runs.poll(lambda: catches_sigterm(process.pid), "handler", lambda: process.poll() is None)
        assert "libtorch_python" not in Path(f"/proc/{process.pid}/maps").read_text(), "too late to tell"
        process.terminate()
        _, stderr = process.communicate(timeout=runs.DEADLINE_SECONDS)
    assert process.returncode == 85
    assert stderr == "stopped by a signal; the same command goes on\n"


def test_signals_at_any_moment_of_the_start_end_with_85(pairs: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["run", "run/train.log", "run/config.yaml", "run/metrics.jsonl"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = runs.start_train(folder, *LONG, f"data.root={pairs}")
        command.wait_for((folder / name).exists, name)
        command.send(signal.SIGTERM)
        assert command.wait().code == 85, name


def is_listening(port: str) -> bool:
    addresses = [line.split()[1::2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses += [line.split()[1::2] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return any(local.endswith(f":{int(port):04X}") and state == "0A" for local, state, *_ in addresses)


def test_a_signal_while_other_ranks_are_waited_for_ends_with_85(pairs: Path, tmp_path: Path) -> None:
    environment = runs.group(2)[0]
    alone = runs.start_train(tmp_path, *LONG, f"data.root={pairs}", environment=environment)
    alone.wait_for(lambda: is_listening(environment["MASTER_PORT"]), "the group's store")
    sent = time.monotonic()
    alone.send(signal.SIGTERM)
    finished = alone.wait()
    assert time.monotonic() - sent < 20, "waited for the group"
    assert (finished.code, finished.stderr) == (85, "stopped by a signal; the same command goes on\n")


def test_a_signal_while_another_rank_is_stopped_saves_the_last_whole_step(pairs: Path, tmp_path: Path) -> None:
    commands = [
        runs.start_train(tmp_path, *LONG, f"data.root={pairs}", environment=environment)
        for environment in runs.group(2)
    ]
    commands[0].wait_for(lambda: has_steps(tmp_path / "run", 3), "some steps")
    commands[1].send(signal.SIGSTOP)
    sent = time.monotonic()
    commands[0].send(signal.SIGTERM)
    finished = commands[0].wait()
    assert time.monotonic() - sent < 60, "waited for the stopped rank"
    commands[1].send(signal.SIGKILL)
    commands[1].wait()
    assert finished.code == 85, finished.stderr
    goes_on(tmp_path, pairs, finished.stderr)


def test_a_signal_while_a_worker_is_stopped_saves_the_last_whole_step(pairs: Path, tmp_path: Path) -> None:
    command = runs.start_train(tmp_path, *LONG, f"data.root={pairs}", "data.workers=2")
    command.wait_for(lambda: has_steps(tmp_path / "run", 3), "some steps")
    workers = children(command.pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    command.send(signal.SIGTERM)
    finished = command.wait()
    assert finished.code == 85, finished.stderr
    runs.poll(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "end of workers", lambda: True)
    goes_on(tmp_path, pairs, finished.stderr)


HANGING = """
import threading
from pathlib import Path

from mmpretrain.models.vit import TimmEncoder


class HangingEncoder(TimmEncoder):
    def forward(self, *args, **kwargs):
        encoding = super().forward(*args, **kwargs)
        if Path("hang").exists():
            threading.Event().wait()
        return encoding
"""


@pytest.mark.slow
def test_a_step_whose_forward_pass_moved_batch_norm_is_not_saved(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    model = (
        "model.image._target_=hanging.HangingEncoder",
        "model.image.name=test_resnet",
        "~model.image.args",
        "model.image.init=timm",
    )
    command = runs.start_train(tmp_path, *LONG, f"data.root={pairs}", *model, environment={"PYTHONPATH": str(tmp_path)})
    command.wait_for(lambda: has_steps(tmp_path / "run", 3), "some steps")
    (tmp_path / "hang").touch()
    command.send(signal.SIGTERM)
    finished = command.wait()
    assert finished.code == 85, finished.stderr
    assert "nothing is saved yet" in finished.stderr
    assert not runs.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_stops_an_evaluation_which_comes_again(world_size: int, pairs: Path, tmp_path: Path) -> None:
    many = f"data.val.val.shards=[{','.join(['val'] * 100)}]"
    settings = (f"data.root={pairs}", "trainer.duration=4steps", "checkpoint.every=1000steps", "trainer.ema_decay=0.9")
    run = tmp_path / "run"
    commands = [
        runs.start_train(tmp_path, *settings, many, "data.val_batch_size=1", environment=environment)
        for environment in ([{}] if world_size == 1 else runs.group(2))
    ]
    commands[0].wait_for(lambda: runs.checkpoints(run), "the last checkpoint")
    sent = time.monotonic()
    commands[-1].send(signal.SIGTERM)
    stopped = [command.wait() for command in commands]
    assert time.monotonic() - sent < 20, "waited for the evaluation"
    assert [each.code for each in stopped] == [85] * world_size, stopped
    assert not (run / "results.json").exists() and len(runs.records(run)) == 3

    again = runs.train(tmp_path, *settings)
    assert again.code == 0, again.stderr
    other = tmp_path / "other"
    other.mkdir()
    assert runs.train(other, *settings).code == 0
    found, expected = runs.exact_outcome(run), runs.exact_outcome(other / "run")
    if world_size == 1:
        assert found == expected
    assert [sorted(record) for record in found["metrics"]] == [sorted(record) for record in expected["metrics"]]
    assert runs.train(tmp_path, *settings).stderr.count("is finished") == 1


# ---------------------------------------------------------------- descriptors


def test_a_run_evaluates_with_few_descriptors(pairs: Path, tmp_path: Path) -> None:
    settings = (
        *runs.TINY_RUN, f"data.root={pairs}", "trainer.duration=4steps", "trainer.eval_every=2steps", "data.workers=4",
        f"data.val.val.shards=[{','.join(['val'] * 20)}]", "data.val_batch_size=256",
    )  # fmt: skip
    limit = (128, 128)
    finished = subprocess.run(
        [sys.executable, "-m", "mmpretrain.train", *settings], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit), timeout=runs.DEADLINE_SECONDS,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "eval-val/image_retrieval_recall@1" in runs.results(tmp_path / "run")
