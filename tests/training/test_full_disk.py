"""A disk that is full, as the largest size that a process may write: the run ends in one line and goes on later."""

import json
import logging
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mmpretrain import files
from mmpretrain.batch import Refused
from mmpretrain.checkpoints import store
from mmpretrain.errors import TrainingError, enough_space
from mmpretrain.objectives.base import Example
from mmpretrain.reporting import report
from mmpretrain.reporting.writers import RunWriter
from mmpretrain.training.quarantine import Quarantine
from mmpretrain.training.run_dir import LogFile
from tests import runs
from tests.saved_runs import save_whole_run

LIMIT = 20_000


def _metrics(folder: Path) -> None:
    writer = RunWriter(folder, 0, 0, {})
    for step in range(1000):
        writer.scalars(step, 16 * step, {"train/loss": 1.0})


def _events(folder: Path) -> None:
    writer = RunWriter(folder, 0, 0, runs.TENSORBOARD)
    for step in range(1000):
        writer.examples("objectives/text", step, [Example([], "words " * 20)])


def _picture(folder: Path) -> None:
    writer = RunWriter(folder, 0, 0, {})
    writer.image("train/pairs", 0, np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))


def _quarantine(folder: Path) -> None:
    quarantine = Quarantine(folder / "quarantine.jsonl", 1.0, 0)
    for number in range(1000):
        quarantine.add([Refused("pairs", "a.tar", str(number), "no readable image")])
        quarantine.flush(number)


def _log(folder: Path) -> None:
    logging.basicConfig(level=logging.INFO, handlers=[LogFile(folder / "train.log")], force=True)
    for number in range(1000):
        logging.getLogger("run").info("step %d of many", number)


def _text(folder: Path) -> None:
    files.write_text(folder / "results.json", "x" * LIMIT * 2)


def _report(folder: Path) -> None:
    save_whole_run(folder / "run")
    (folder / "run" / "report.html").touch()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    report.write(folder / "run")


WRITERS: dict[str, Callable[[Path], None]] = {
    "metrics.jsonl": _metrics,
    "events.out.tfevents": _events,
    "quarantine.jsonl": _quarantine,
    "train.log": _log,
    "results.json": _text,
    "pictures/train.pairs.png": _picture,
    "report.html": _report,
}


def _write(name: str, folder: str) -> None:
    """In a process of its own: write until the limit is met, and write down what is said."""
    if name != "report.html":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    try:
        with enough_space(Path(folder)):
            WRITERS[name](Path(folder))
    except TrainingError as error:
        logging.getLogger("run").error("error: %s", error)
        Path(folder, "said").write_text(str(error))


@pytest.mark.parametrize("name", WRITERS)
def test_each_file_that_cannot_be_written_is_named_in_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = runs.start(_write, name, str(tmp_path))
    process.join(runs.DEADLINE_SECONDS)
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert f"{name}" in said and "cannot be written (File too large; " in said and "the same command goes on" in said
    assert "\n" not in said
    shown = capfd.readouterr().err
    assert "Traceback" not in shown and "Exception" not in shown


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(pairs: Path, tmp_path: Path) -> None:
    # The log is the largest file, so that it is the one that grows beyond what may be written.
    size = 40 << 20
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_bytes(b"earlier\n" * (size // 8))
    overrides = (f"data.root={pairs}", "trainer.duration=120steps", "checkpoint.every=5steps", "eval=[]")
    command = runs.start_train(tmp_path, *overrides)
    command.wait_for(lambda: runs.checkpoints(tmp_path / "run"), "a checkpoint")
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, ((tmp_path / "run" / "train.log").stat().st_size, -1))
    finished = command.wait()
    assert finished.code == 1
    (line,) = [line for line in finished.stderr.splitlines() if "error:" in line]
    assert "run/train.log cannot be written (File too large" in line
    assert "Traceback" not in finished.stderr and "Logging error" not in finished.stderr
    assert store.find_latest(tmp_path / "run" / "checkpoints") is not None
    assert not (tmp_path / "run" / "results.json").exists()
    finished = runs.train(tmp_path, *overrides)
    assert finished.code == 0, finished.stderr
    assert "resumed from" in finished.stderr
    assert [record["step"] for record in runs.records(tmp_path / "run")] == list(range(1, 121))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 120


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs of 64 MiB, room for three checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up_keeps_the_checkpoint_before(
    world_size: int, small_disk: Path, pairs: Path, tmp_path: Path
) -> None:
    parallel = "fsdp" if world_size > 1 else "ddp"
    overrides = (
        f"data.root={pairs}", "trainer.duration=30steps", "checkpoint.every=3steps", "checkpoint.keep_last=0", "eval=[]",
        "writer=[]", f"parallel={parallel}",
    )  # fmt: skip
    run = small_disk / "run"
    stopped = [command.wait() for command in runs.start_group(small_disk, world_size, *overrides)]
    assert [finished.code for finished in stopped] == [1] * world_size, stopped[0].stderr
    (line,) = [line for line in stopped[0].stderr.splitlines() if "error:" in line]
    standing = runs.checkpoints(run)[-1]
    assert "No space left on device" in line
    assert f"the one of step {int(standing.name.removeprefix('step_'))} still stands" in line
    assert store.find_latest(run / "checkpoints") == standing
    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    for finished in [command.wait() for command in runs.start_group(small_disk, world_size, *overrides)]:
        assert finished.code == 0, finished.stderr

    whole = runs.trained_group(tmp_path / "whole", world_size, *overrides)
    assert runs.exact_outcome(run) == runs.exact_outcome(whole)
