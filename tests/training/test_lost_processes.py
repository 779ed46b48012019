"""Processes that are killed, stopped or told to end: named in one line, and the last whole step is saved."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from mmpretrain import distributed
from mmpretrain.checkpoints import store
from mmpretrain.training.stop_signal import StopSignal
from tests import runs
from tests.runs import Command

LONG = ("trainer.duration=100000steps", "checkpoint.every=100000steps", "schedule=constant")


OWN_CODE = """
import os
import threading
from pathlib import Path

from mmpretrain.data.transforms import RandomResizedCrop
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.reporting.writers import RunWriter


class HangingEncoder(TimmEncoder):
    def forward(self, *args, **kwargs):
        encoding = super().forward(*args, **kwargs)
        if Path("hang").exists():
            threading.Event().wait()
        return encoding


class ForkingEncoder(TimmEncoder):
    def forward(self, *args, **kwargs):
        if not Path("forked").exists():
            if (pid := os.fork()) == 0:
                threading.Event().wait()
            Path("forked").write_text(str(pid))
        return super().forward(*args, **kwargs)


class FailingWriter(HangingEncoder):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        def close(self):
            raise RuntimeError("no room")

        RunWriter.close = close


def wait_forever():
    threading.Event().wait()


class HangingInfoNCE(InfoNCE):
    def after_step(self, *args):
        super().after_step(*args)
        if Path("hang").exists() and os.environ["RANK"] == "1":
            wait_forever()


class HangingCrop(RandomResizedCrop):
    def __call__(self, *args, **kwargs):
        if Path("hang").exists():
            wait_forever()
        return super().__call__(*args, **kwargs)


class HangingCropOfRank1(HangingCrop):
    def __call__(self, *args, **kwargs):
        crop = HangingCrop if os.environ["RANK"] == "1" else RandomResizedCrop
        return crop.__call__(self, *args, **kwargs)


class StuckInfoNCE(InfoNCE):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if os.environ["RANK"] == "1":
            wait_forever()


class SlowEncoder(TimmEncoder):
    def forward(self, *args, **kwargs):
        threading.Event().wait(0.5)
        return super().forward(*args, **kwargs)


class SlowWriter(TimmEncoder):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        RunWriter.close = lambda self: threading.Event().wait(5.0)


class DyingInfoNCE(InfoNCE):
    def after_step(self, *args):
        super().after_step(*args)
        if Path("die").exists() and os.environ["RANK"] == "1":
            os._exit(9)
"""


def start(
    folder: Path, pairs: Path, *overrides: str, world_size: int = 1, environment: Mapping[str, str] | None = None
) -> list[Command]:
    """A long run, one command for each process, that may use `OWN_CODE`."""
    (folder / "own.py").write_text(OWN_CODE)
    environment = {"PYTHONPATH": str(folder), **(environment or {})}
    return runs.start_group(folder, world_size, *LONG, f"data.root={pairs}", *overrides, environment=environment)


def train_some_steps(folder: Path, pairs: Path, *overrides: str, world_size: int = 1) -> list[Command]:
    """The commands of a long run that has logged three steps."""
    commands = start(folder, pairs, *overrides, world_size=world_size)
    commands[0].wait_for(lambda: runs.num_records(folder / "run") >= 3, "some steps")
    return commands


def kill(command: Command) -> None:
    """End a stopped process."""
    command.send(signal.SIGKILL)
    command.wait()


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
        (signal.SIGKILL, r"worker \d of the data loader \(process \d+\) was killed by SIGKILL; .* with more memory"),
        pytest.param(
            signal.SIGBUS,
            r"worker \d of the data loader \(process \d+\) was killed by SIGBUS; .* when /dev/shm has space",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            signal.SIGSTOP,
            r"no batch came in 2 seconds \(data.timeout_seconds\): worker \d .* is stopped",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_that_is_killed_or_stopped_is_named(
    number: signal.Signals, expected: str, pairs: Path, tmp_path: Path
) -> None:
    (command,) = train_some_steps(tmp_path, pairs, "data.workers=2", "data.timeout_seconds=2")
    os.kill(runs.children(command.pid)[0], number)
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
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_or_stopped_is_named(
    lost: int, number: signal.Signals, pairs: Path, tmp_path: Path
) -> None:
    commands = train_some_steps(tmp_path, pairs, "parallel.timeout_seconds=4", world_size=2)
    commands[lost].send(number)
    left = commands[1 - lost].wait()
    kill(commands[lost])
    assert left.code == 1, left.stderr
    assert "Traceback" not in left.stderr
    assert re.search(rf"error: step \d+: rank {lost} is lost", left.stderr), left.stderr
    if lost == 1:
        goes_on(tmp_path, pairs, left.stderr)


# The line of `OWN_CODE` in which a rank or a worker hangs.
WHERE = re.compile(r"own.py\", line \d+ in wait_forever")


@pytest.mark.slow
@pytest.mark.parametrize("slow", [(), ("model.image._target_=own.SlowEncoder", "trainer.micro_batch_size=1")])
def test_a_rank_that_hangs_is_named_and_shows_where(slow: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    """Also where the others compute for longer than they are given to answer, before they wait for it."""
    objective = ("objective=[infonce]", "objective.infonce._target_=own.HangingInfoNCE", "eval=[]", *slow)
    commands = train_some_steps(tmp_path, pairs, *objective, "parallel.timeout_seconds=6", world_size=2)
    (tmp_path / "hang").touch()
    left = commands[0].wait()
    assert left.code == 1, left.stderr
    assert re.search(r"error: step \d+: rank 1 is lost: .* hanging \(see its stderr\)", left.stderr), left.stderr
    assert "most recent call first" not in left.stderr
    assert WHERE.search(commands[1].stderr), commands[1].stderr
    kill(commands[1])


def test_a_worker_that_hangs_is_named_and_shows_where(pairs: Path, tmp_path: Path) -> None:
    transform = ("data.train.pairs.transform._target_=own.HangingCrop",)
    (command,) = train_some_steps(tmp_path, pairs, *transform, "data.workers=2", "data.timeout_seconds=2")
    (tmp_path / "hang").touch()
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    assert re.search(
        r"error: step \d+: no batch came in 2 seconds .*: worker \d of the data loader \(process \d+\) hangs",
        finished.stderr,
    ), finished.stderr
    assert len(WHERE.findall(finished.stderr)) == 1
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert f"goes on from step {int(saved.name.removeprefix('step_'))}" in finished.stderr


@pytest.mark.slow
def test_a_worker_that_hangs_in_a_group_is_named_before_the_others_fail(pairs: Path, tmp_path: Path) -> None:
    transform = ("data.train.pairs.transform._target_=own.HangingCropOfRank1", "data.workers=1")
    commands = train_some_steps(tmp_path, pairs, *transform, "parallel.timeout_seconds=6", world_size=2)
    (tmp_path / "hang").touch()
    others, hanging = (command.wait() for command in commands)
    assert others.code == hanging.code == 1, hanging.stderr
    assert re.search(
        r"error: step \d+: no batch came in 5.4 seconds \(.9 of parallel.timeout_seconds\): worker 0 .* hangs",
        hanging.stderr,
    ), hanging.stderr
    assert WHERE.search(hanging.stderr), hanging.stderr
    assert re.search(r"error: step \d+: rank 1 is lost", others.stderr), others.stderr


@pytest.mark.slow
def test_a_rank_that_hangs_before_the_first_step_shows_where(pairs: Path, tmp_path: Path) -> None:
    objective = ("objective=[infonce]", "objective.infonce._target_=own.StuckInfoNCE")
    commands = start(tmp_path, pairs, *objective, "parallel.timeout_seconds=4", world_size=2)
    assert "error: before training began, rank 1 was lost" in commands[0].wait().stderr
    commands[1].wait_for(lambda: bool(WHERE.search(commands[1].stderr)), "its stack")
    kill(commands[1])


@pytest.mark.slow
def test_what_comes_after_the_last_step_may_take_long(pairs: Path, tmp_path: Path) -> None:
    settings = ("model.image._target_=own.SlowWriter", "trainer.duration=2steps", "parallel.timeout_seconds=1")
    for command in start(tmp_path, pairs, *settings, "eval=[]", world_size=2):
        finished = command.wait()
        assert finished.code == 0, finished.stderr
        assert "most recent call first" not in finished.stderr


def test_a_rank_that_is_lost_before_training_is_named(pairs: Path, tmp_path: Path) -> None:
    (alone,) = start(tmp_path, pairs, "parallel.timeout_seconds=5", environment=runs.group(2)[0])
    finished = alone.wait()
    assert finished.code == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert "error: before training began" in finished.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "[/pytorch/third_party/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer. "
            "This means the remote peer has exited, likely due to a fault. Check other ranks' logs.",
            "Read error [127.0.0.1]:1: Connection reset by peer",
        ),
        (
            "[/pytorch/unbound_buffer.cc:86] Timed out waiting 4000ms for recv operation to complete",
            "Timed out waiting 4000ms for recv operation to complete",
        ),
    ],
)
def test_an_error_of_gloo_is_told_in_a_sentence(error: str, told: str) -> None:
    assert distributed.reason_of(RuntimeError(error)) == told


# ---------------------------------------------------------------- SIGTERM


def catches_sigterm(pid: int) -> bool:
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize(
    "entry", [["-m", "mmpretrain.train"], ["-c", "from mmpretrain.training.stop_signal import train; train()"]]
)
def test_a_signal_while_torch_is_imported_ends_with_85(entry: list[str], pairs: Path, tmp_path: Path) -> None:
    command = [sys.executable, *entry, *runs.TINY_RUN, *LONG, f"data.root={pairs}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
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
        (command,) = start(folder, pairs)
        command.wait_for((folder / name).exists, name)
        command.send(signal.SIGTERM)
        assert command.wait().code == 85, name


def test_a_signal_while_other_ranks_are_waited_for_ends_with_85(pairs: Path, tmp_path: Path) -> None:
    environment = runs.group(2)[0]
    (alone,) = start(tmp_path, pairs, environment=environment)
    alone.wait_for(lambda: runs.is_listening(environment["MASTER_PORT"]), "the group's store")
    sent = time.monotonic()
    alone.send(signal.SIGTERM)
    finished = alone.wait()
    assert time.monotonic() - sent < 20, "waited for the group"
    assert (finished.code, finished.stderr) == (85, "stopped by a signal; the same command goes on\n")


@pytest.mark.slow
def test_a_signal_while_another_rank_is_stopped_saves_the_last_whole_step(pairs: Path, tmp_path: Path) -> None:
    commands = train_some_steps(tmp_path, pairs, world_size=2)
    commands[1].send(signal.SIGSTOP)
    sent = time.monotonic()
    commands[0].send(signal.SIGTERM)
    finished = commands[0].wait()
    assert time.monotonic() - sent < 60, "waited for the stopped rank"
    kill(commands[1])
    assert finished.code == 85, finished.stderr
    goes_on(tmp_path, pairs, finished.stderr)


@pytest.mark.slow
def test_a_signal_while_a_worker_is_stopped_saves_and_copies_the_last_whole_step(pairs: Path, tmp_path: Path) -> None:
    (command,) = train_some_steps(tmp_path, pairs, "data.workers=2", f"run.sync_to={tmp_path / 'copy'}")
    workers = runs.children(command.pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    # The batches that were ready are used up first.
    metrics = tmp_path / "run" / "metrics.jsonl"
    command.wait_for(lambda: time.time() - metrics.stat().st_mtime > 1.0, "hang")
    command.send(signal.SIGTERM)
    finished = command.wait()
    assert finished.code == 85, finished.stderr
    runs.poll(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "end of workers", lambda: True)
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert store.find_latest(tmp_path / "copy" / "checkpoints") == tmp_path / "copy" / "checkpoints" / saved.name
    assert runs.records(tmp_path / "copy") == runs.records(tmp_path / "run")
    goes_on(tmp_path, pairs, finished.stderr)


@pytest.mark.slow
def test_a_step_whose_forward_pass_moved_batch_norm_is_not_saved(pairs: Path, tmp_path: Path) -> None:
    encoder = ("model.image._target_=own.HangingEncoder", "model.image.name=test_resnet", "model.image.init=timm")
    (command,) = train_some_steps(tmp_path, pairs, *encoder, "~model.image.args")
    (tmp_path / "hang").touch()
    command.send(signal.SIGTERM)
    finished = command.wait()
    assert finished.code == 85, finished.stderr
    assert "nothing is saved yet" in finished.stderr
    assert not runs.checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_an_error_while_a_signal_is_answered_does_not_keep_the_process(pairs: Path, tmp_path: Path) -> None:
    (command,) = train_some_steps(tmp_path, pairs, "model.image._target_=own.FailingWriter")
    (tmp_path / "hang").touch()
    command.send(signal.SIGTERM)
    finished = command.wait()
    assert finished.code == 85, finished.stderr
    assert "RuntimeError: no room" in finished.stderr
    assert len(runs.checkpoints(tmp_path / "run")) == 1


def test_a_process_that_the_users_code_started_does_not_hold_up_the_end(pairs: Path, tmp_path: Path) -> None:
    (command,) = start(tmp_path, pairs, "model.image._target_=own.ForkingEncoder", "trainer.duration=4steps", "eval=[]")
    finished = command.wait()
    os.kill(int((tmp_path / "forked").read_text()), signal.SIGKILL)
    assert finished.code == 0, finished.stderr


def test_a_rank_that_is_lost_behind_the_optimizers_step_takes_nothing_with_it(pairs: Path, tmp_path: Path) -> None:
    objective = ("objective=[infonce]", "objective.infonce._target_=own.DyingInfoNCE")
    commands = train_some_steps(tmp_path, pairs, *objective, world_size=2)
    (tmp_path / "die").touch()
    left, lost = (command.wait() for command in commands)
    assert (left.code, lost.code) == (1, 9), left.stderr
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert f"goes on from step {runs.records(tmp_path / 'run')[-1]['step']}" in left.stderr
    assert saved.name == f"step_{runs.records(tmp_path / 'run')[-1]['step']:08d}"


def test_a_second_interrupt_ends_a_process_that_hangs_at_once(pairs: Path, tmp_path: Path) -> None:
    commands = train_some_steps(tmp_path, pairs, world_size=2)
    commands[1].send(signal.SIGSTOP)
    began = time.monotonic()
    commands[0].send_until_it_ends(signal.SIGINT)
    took, finished = time.monotonic() - began, commands[0].wait()
    kill(commands[1])
    assert (finished.code, finished.stderr.splitlines()[-1]) == (85, "stopped by a signal; the same command goes on")
    assert took < 8, "waited for the answer to the first"


@pytest.mark.slow
def test_a_signal_while_shards_of_a_checkpoint_are_waited_for_ends_with_85(pairs: Path, tmp_path: Path) -> None:
    sharded = ("parallel=fsdp", "checkpoint.every=1steps")
    commands = train_some_steps(tmp_path, pairs, *sharded, world_size=2)
    commands[1].send(signal.SIGSTOP)
    commands[0].send(signal.SIGTERM)
    finished = commands[0].wait()
    kill(commands[1])
    assert finished.code == 85, finished.stderr
    assert "goes on from" in finished.stderr


def test_handlers_are_as_before_once_the_block_is_left() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], signal.set_wakeup_fd(-1)
    for number in (None, signal.SIGTERM, signal.SIGINT):
        with pytest.raises(SystemExit), StopSignal(lambda seconds: None) as stop:
            if number is not None:
                os.kill(os.getpid(), number)
            assert stop.received == (number is not None)
            raise SystemExit(85)
        after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)], signal.set_wakeup_fd(-1)
        assert after == before


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_stops_an_evaluation_which_comes_again(world_size: int, pairs: Path, tmp_path: Path) -> None:
    many = f"data.val.val.shards=[{','.join(['val'] * 100)}]"
    settings = (f"data.root={pairs}", "trainer.duration=4steps", "checkpoint.every=1000steps", "trainer.ema_decay=0.9")
    run = tmp_path / "run"
    commands = runs.start_group(tmp_path, world_size, *settings, many, "data.val_batch_size=1")
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


@pytest.mark.slow
def test_a_run_evaluates_with_few_descriptors(pairs: Path, tmp_path: Path) -> None:
    settings = (
        *runs.TINY_RUN, f"data.root={pairs}", "trainer.duration=4steps", "trainer.eval_every=2steps", "data.workers=4",
        f"data.val.val.shards=[{','.join(['val'] * 20)}]", "data.val_batch_size=256",
    )  # fmt: skip
    limit = (128, 128)
    finished = subprocess.run(
        [sys.executable, "-m", "mmpretrain.train", *settings], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit), timeout=runs.DEADLINE_SECONDS,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "eval-val/image_retrieval_recall@1" in runs.results(tmp_path / "run")
