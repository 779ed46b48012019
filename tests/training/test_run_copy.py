"""A run's copy in a bucket or a folder holds finished files alone, and the run goes on from it on another machine."""

import errno
import fcntl
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmpretrain.checkpoints import store
from mmpretrain.data.remote import Remote, canonical
from mmpretrain.training.run_copy import RunCopy
from tests import runs
from tests.servers import s3_server

SETTINGS = ("trainer.duration=24steps", "checkpoint.every=4steps", "checkpoint.keep_last=2", "data.workers=1")


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that has no copy."""
    folder = tmp_path_factory.mktemp("whole")
    runs.trained(folder, pairs, *SETTINGS)
    return folder / "run"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_copied(folder: Path, copy: Path) -> None:
    expected = {name for name in names(folder) if not name.startswith(".")}
    assert names(copy) == expected
    assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in expected)


def test_a_stopped_run_goes_on_from_its_copy_in_another_folder(whole: Path, pairs: Path, tmp_path: Path) -> None:
    copy, first, second = (tmp_path / name for name in ("copy", "first", "second"))
    first.mkdir()
    given = (*SETTINGS, f"data.root={pairs}", f"run.sync_to={copy}")
    command = runs.start_train(first, *given)
    command.wait_for(lambda: runs.num_records(first / "run") >= 6, "six steps")
    command.send(runs.signal.SIGTERM)
    assert command.wait().code == 85
    assert_copied(first / "run", copy)
    shutil.rmtree(first)
    second.mkdir()
    finished = runs.train(second, *given)
    assert finished.code == 0, finished.stderr
    assert f"run was fetched from {copy}: step_" in finished.stderr
    assert runs.exact_outcome(second / "run") == runs.exact_outcome(whole)
    assert_copied(second / "run", copy)
    assert len(list((copy / "checkpoints").glob("step_*"))) == 2, "deleted ones are deleted there, too"


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_command_completes_the_copy_of_a_finished_run(
    world_size: int, whole: Path, pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    given = (*SETTINGS, f"data.root={pairs}", f"run.sync_to={tmp_path / 'copy'}")
    for finished in runs.train_group(tmp_path, world_size, *given):
        assert finished.code == 0, finished.stderr
    assert_copied(tmp_path / "run", tmp_path / "copy")


@pytest.mark.slow
def test_a_run_is_copied_to_a_bucket_and_back(whole: Path, pairs: Path, tmp_path: Path) -> None:
    for folder in ("empty", "first", "second", "other"):
        (tmp_path / folder).mkdir()
    given = (*SETTINGS, f"data.root={pairs}")
    with s3_server(tmp_path / "empty") as environment:
        for folder, scheme in (("first", "S3"), ("second", "s3a")):
            place = f"run.sync_to={scheme}://bucket/runs/a/"
            finished = runs.train(tmp_path / folder, *given, place, environment=environment)
            assert finished.code == 0, finished.stderr
            assert runs.exact_outcome(tmp_path / folder / "run") == runs.exact_outcome(whole)
        assert "is finished" in finished.stderr  # restored whole
        place = "run.sync_to=s3://bucket/runs/a"
        other = runs.train(tmp_path / "other", *given, place, "run.seed=7", environment=environment)
        assert other.code == 2
        assert "run.sync_to: s3://bucket/runs/a is the copy of another run (run.seed: 0 -> 7)" in other.stderr
        place = "run.sync_to=s3://missing/runs/a"
        missing = runs.train(tmp_path / "first", *given, place, environment=environment)
        assert missing.code == 0
        assert "s3://missing/runs/a/checkpoints/step_00000024/" in missing.stderr
        assert "does not exist; the copy is not complete, and the same command completes it" in missing.stderr


@pytest.fixture(scope="module")
def copy_of_another(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run of ten steps with optimizer.lr=1e-4."""
    folder = tmp_path_factory.mktemp("another")
    runs.trained(folder, pairs, "trainer.duration=10steps", "optimizer.lr=1e-4", f"run.sync_to={folder / 'copy'}")
    return folder / "copy"


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.mark.slow
def test_a_folder_of_another_run_is_not_overwritten_by_a_copy(
    copy_of_another: Path, pairs: Path, tmp_path: Path
) -> None:
    runs.trained(tmp_path, pairs, "trainer.duration=5steps")
    before = content(tmp_path / "run")
    given = ("trainer.duration=10steps", "optimizer.lr=1e-4", f"run.sync_to={copy_of_another}")
    finished = runs.trained(tmp_path, pairs, *given, code=2)
    assert "was made with another configuration (optimizer.lr: 0.001 -> 0.0001)" in finished.stderr
    assert content(tmp_path / "run") == before


def test_a_folder_in_use_is_not_overwritten_by_a_copy(copy_of_another: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        given = ("trainer.duration=10steps", "optimizer.lr=1e-4", f"run.sync_to={copy_of_another}")
        finished = runs.trained(tmp_path, pairs, *given, code=2)
    assert "is in use by another process" in finished.stderr
    assert names(tmp_path / "run") == {".lock"}


def test_the_length_of_the_copy_is_checked_like_that_of_the_folder(
    copy_of_another: Path, pairs: Path, tmp_path: Path
) -> None:
    given = ("trainer.duration=20steps", "optimizer.lr=1e-4", f"run.sync_to={copy_of_another}")
    finished = runs.trained(tmp_path, pairs, *given, code=2)
    assert '(trainer.duration: "10steps" -> "20steps": schedule would have had another value' in finished.stderr


OWN_STORAGE = """
import os
import signal
import sys
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mmpretrain.models.vit import TimmEncoder


class Slow(LocalFileSystem):
    protocol = "slow"

    def put_file(self, path1, path2, **kwargs):
        if Path("hold").exists():
            Path("hold").read_bytes()  # a pipe: until the test closes it
        super().put_file(path1, path2, **kwargs)

    def unstrip_protocol(self, name):
        return f"slow://{self._strip_protocol(name)}"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("slow://"))


class Encoder(TimmEncoder):
    pass


def requeue(number, frame):
    Path("at_requeue").write_text(" ".join(str(path) for path in Path("copy").rglob("manifest.json")))
    sys.exit(0)


fsspec.register_implementation("slow", Slow)
if "SUBMITIT_EXECUTOR" in os.environ:
    signal.signal(signal.SIGUSR2, requeue)
"""


def start_with_slow_storage(folder: Path, pairs: Path, **environment: str) -> runs.Command:
    """A long run that has taken some steps. Its storage stops while the pipe `hold` exists."""
    (folder / "own.py").write_text(OWN_STORAGE)
    command = runs.start_train(
        folder,
        "trainer.duration=100000steps",
        "schedule=constant",
        "checkpoint.every=100000steps",
        f"data.root={pairs}",
        "model.image._target_=own.Encoder",
        f"run.sync_to=slow://{folder / 'copy'}",
        environment={"PYTHONPATH": str(folder), **environment},
    )
    command.wait_for(lambda: runs.num_records(folder / "run") >= 3, "some steps")
    return command


def writer_of(pipe: Path) -> int | None:
    """A pipe's end to write to, once a process waits at the other end."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        assert error.errno == errno.ENXIO
        return None


def test_further_signals_do_not_end_the_last_copying(pairs: Path, tmp_path: Path) -> None:
    command, pipe = start_with_slow_storage(tmp_path, pairs), tmp_path / "hold"
    os.mkfifo(pipe)
    command.send(signal.SIGTERM)
    command.wait_for(lambda: "stopped by a signal at step" in command.stderr, "the end")
    ends: list[int | None] = []
    command.wait_for(lambda: ends.append(writer_of(pipe)) or ends[-1], "a file that is being copied")
    command.send(signal.SIGTERM)
    command.wait_for(lambda: not int(pending(command.pid), 16), "the handler of the signal")
    pipe.unlink()
    os.close(ends[-1] or 0)
    assert command.wait().code == 85
    assert_copied(tmp_path / "run", tmp_path / "copy")


def pending(pid: int) -> str:
    """The mask of signals that a process has not handled yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("ShdPnd"))


def test_a_job_is_requeued_after_the_last_copying(pairs: Path, tmp_path: Path) -> None:
    command = start_with_slow_storage(tmp_path, pairs, SUBMITIT_EXECUTOR="local")
    command.send(signal.SIGUSR2)
    finished = command.wait()
    assert finished.code == 0, finished.stderr
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert (tmp_path / "at_requeue").read_text() == f"copy/checkpoints/{saved.name}/manifest.json"


def save(folder: Path, step: int, **state: int) -> Path:
    tensors: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    return store.save(folder / "checkpoints", step, tensors, {"step": step, "samples": step, **state}, keep_last=0)


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in runs.checkpoints(folder)]


def whole_steps(copy: Path) -> list[int]:
    """The steps of the checkpoints that are whole."""
    found = []
    for path in runs.checkpoints(copy):
        try:
            store.verify(path)
        except store.CorruptCheckpoint:
            continue
        found.append(int(path.name.removeprefix("step_")))
    return found


def update(there: RunCopy) -> None:
    while there.update():
        pass


class Watched(Remote):
    """A storage that tells of each file before it takes it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(1.0)
        self._tell = tell

    def put(self, path: Path, url: str) -> None:
        self._tell(url)
        super().put(path, url)


@pytest.mark.parametrize(("keep_last", "left"), [(0, [1, 2, 3, 4, 5, 6]), (2, [5, 6])])
def test_another_machine_keeps_the_checkpoints_that_it_has_not_fetched(
    keep_last: int, left: list[int], tmp_path: Path
) -> None:
    first, second, copy = (tmp_path / name for name in ("first", "second", "copy"))
    for step in (1, 2, 3, 4):
        save(first, step, due_step=2)
    update(RunCopy(first, str(copy), 1.0, 0))
    there = RunCopy(second, str(copy), 1.0, keep_last)
    there.restore()
    assert saved_steps(second) == [2, 4], "the newest, and the one that rollbacks go to"
    save(second, 5)
    save(second, 6)
    if keep_last:
        store.prune(second / "checkpoints", keep_last)
    update(there)
    assert saved_steps(copy) == left


def test_the_newest_checkpoint_is_copied_first_and_named_at_once(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for step in (1, 2, 3):
        save(run, step)
    (run / "note").touch()
    there = RunCopy(run, str(copy), 1.0, 0)
    for steps in ([3], [2, 3], [1, 2, 3]):
        there.update()
        assert whole_steps(copy) == steps
        assert (copy / "checkpoints" / "latest").read_text() == "step_00000003\n"
        assert (copy / "note").exists()


def test_a_slow_copy_always_has_a_whole_checkpoint(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"

    def go_on(url: str) -> None:
        """While a file is copied, the run saves a checkpoint and deletes the one before."""
        (last,) = saved_steps(run)
        if last < 40:
            save(run, last + 1)
            store.prune(run / "checkpoints", 1)
        assert whole_steps(copy) or not seen
        if url.endswith("manifest.json"):
            seen.append(url)

    seen: list[str] = []
    save(run, 1)
    there = RunCopy(run, str(copy), 1.0, 1)
    there._remote = Watched(go_on)
    update(there)
    assert len(seen) > 3
    assert whole_steps(copy) == saved_steps(copy) == [40]
    assert store.read_name(copy / "checkpoints" / "latest") == "step_00000040"
    assert not list((run / "checkpoints").glob(".*")), "held no longer"


def test_a_slow_copy_has_as_many_whole_checkpoints_as_the_run(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    there = RunCopy(run, str(copy), 1.0, 2)
    for step in (1, 2):
        save(run, step)
    update(there)
    for step in (3, 4, 5):
        save(run, step)
    store.prune(run / "checkpoints", 2)
    for steps in ([2, 5], [4, 5]):
        there.update()
        assert whole_steps(copy) == steps


def test_the_best_checkpoint_of_the_copy_stays_until_another_is_copied(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for step in (1, 2):
        save(run, step)
    store.mark_best(store.path_of(run / "checkpoints", 1), 1)
    there = RunCopy(run, str(copy), 1.0, 1)
    update(there)
    for step in (3, 4):
        save(run, step)
    store.mark_best(store.path_of(run / "checkpoints", 3), 1)
    there.update()
    assert whole_steps(copy) == [1, 4]
    assert store.read_name(copy / "checkpoints" / "best") == "step_00000001"
    update(there)
    assert whole_steps(copy) == [3, 4]
    assert store.read_name(copy / "checkpoints" / "best") == "step_00000003"


def test_a_checkpoint_that_is_being_deleted_is_not_copied(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run, 1)
    (save(run, 2) / "model.safetensors").unlink()
    update(RunCopy(run, str(copy), 1.0, 0))
    assert saved_steps(copy) == [1]


def test_a_file_system_without_links_is_copied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "run", 1)
    there = RunCopy(tmp_path / "run", str(tmp_path / "copy"), 1.0, 0)
    assert there.update() and not there.update(), "copied once"
    assert whole_steps(tmp_path / "copy") == [1]


def test_checkpoints_after_a_rollback_leave_the_copy(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for step in (1, 2, 3):
        save(run, step)
    there = RunCopy(run, str(copy), 1.0, 0)
    update(there)
    store.go_back(run / "checkpoints", 1)
    update(there)
    assert saved_steps(copy) == [1]
    assert store.read_name(copy / "checkpoints" / "latest") == "step_00000001"


def test_a_checkpoint_that_is_written_anew_replaces_its_copy(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run, 1)
    there = RunCopy(run, str(copy), 1.0, 0)
    update(there)
    for content in (5, 6):  # by a process that knows the copy, and by one that starts
        shutil.rmtree(runs.checkpoints(run)[0])
        save(run, 1, content=content)
        (runs.checkpoints(copy)[0] / "of_before").touch()
        update(there)
        assert names(runs.checkpoints(copy)[0]) == names(runs.checkpoints(run)[0])
        assert store.find_latest(copy / "checkpoints") is not None
        there = RunCopy(run, str(copy), 1.0, 0)
        there.restore()


def lengthen(newest: Path) -> None:
    with (newest / "model.safetensors").open("ab") as file:
        file.write(b"x")


DAMAGES = {
    "no manifest, as if the machine had been lost": (lambda newest: (newest / "manifest.json").unlink(), None),
    "one byte more": (lengthen, r"model.safetensors has \d+ bytes, expected \d+"),
    "no state": (lambda newest: (newest / "state.json").unlink(), "state.json is missing"),
    "an empty manifest": (lambda newest: (newest / "manifest.json").write_text(""), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_of_the_copy_is_passed_over(damage: str, tmp_path: Path) -> None:
    run, copy, fresh = (tmp_path / name for name in ("run", "copy", "fresh"))
    for step in (1, 2):
        save(run, step)
    update(RunCopy(run, str(copy), 1.0, 0))
    apply, reason = DAMAGES[damage]
    apply(runs.checkpoints(copy)[-1])
    there = RunCopy(fresh, str(copy), 1.0, 0)
    restored, warnings = there.restore()
    assert restored == store.read_name(fresh / "checkpoints" / "latest") == "step_00000001"
    assert whole_steps(fresh) == saved_steps(fresh) == [1]
    assert len(warnings) == (reason is not None)
    if reason is not None:
        assert re.match(rf"file://{copy}/checkpoints/step_00000002: {reason}", warnings[0])
    update(there)
    assert store.read_name(copy / "checkpoints" / "latest") == "step_00000001"
    save(fresh, 3)
    update(there)
    assert saved_steps(copy) == whole_steps(copy) == [1, 3], "what is damaged is removed"


def test_a_damaged_best_checkpoint_does_not_hinder_the_run(tmp_path: Path) -> None:
    run, copy, fresh = (tmp_path / name for name in ("run", "copy", "fresh"))
    for step in (1, 2):
        save(run, step)
    store.mark_best(store.path_of(run / "checkpoints", 1), 0)
    update(RunCopy(run, str(copy), 1.0, 0))
    lengthen(runs.checkpoints(copy)[0])
    restored, warnings = RunCopy(fresh, str(copy), 1.0, 0).restore()
    assert restored == "step_00000002" and len(warnings) == 1
    assert names(fresh / "checkpoints") == names(copy / "checkpoints") - {
        name for name in names(copy / "checkpoints") if "00000001" in name or name == "best"
    }


def test_a_copy_without_any_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    run, copy, fresh = (tmp_path / name for name in ("run", "copy", "fresh"))
    save(run, 1)
    (run / "note").touch()
    update(RunCopy(run, str(copy), 1.0, 0))
    lengthen(runs.checkpoints(copy)[0])
    with pytest.raises(
        ValueError,
        match=r"none of the 1 checkpoints in .* is whole [(].* has \d+ bytes, expected \d+[)]; restore one, or",
    ):
        RunCopy(fresh, str(copy), 1.0, 0).restore()
    assert names(fresh) == set()


def test_a_copy_without_latest_is_gone_on_from(tmp_path: Path) -> None:
    run, copy, fresh = (tmp_path / name for name in ("run", "copy", "fresh"))
    for step in (1, 2):
        save(run, step)
    update(RunCopy(run, str(copy), 1.0, 0))
    (copy / "checkpoints" / "latest").unlink()
    assert RunCopy(fresh, str(copy), 1.0, 0).restore() == ("step_00000002", [])


def test_hidden_files_of_a_copy_are_not_fetched(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    update(RunCopy(tmp_path / "run", str(tmp_path / "copy"), 1.0, 0))
    (tmp_path / "copy" / ".lock").write_text("theirs")
    RunCopy(tmp_path / "fresh", str(tmp_path / "copy"), 1.0, 0).restore()
    assert ".lock" not in names(tmp_path / "fresh")


@pytest.mark.parametrize("scheme", ["local://", "LOCAL://", "file://"])
def test_a_copy_is_found_by_any_spelling_of_its_address(scheme: str, tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    place = f"{scheme}{tmp_path / 'copy'}/"
    update(RunCopy(tmp_path / "run", place, 1.0, 0))
    assert RunCopy(tmp_path / "fresh", place, 1.0, 0).restore() == ("step_00000001", [])


@pytest.mark.slow
def test_addresses_of_google_storage_have_one_spelling() -> None:
    assert canonical("gcs://bucket/runs/a/") == canonical("GS://bucket/runs/a") == "gs://bucket/runs/a"


def test_a_file_outside_of_the_copy_is_refused(tmp_path: Path) -> None:
    class Alien(MemoryFileSystem):
        protocol = "alien"

        def find(self, path: str, *args: Any, **kwargs: Any) -> list[str]:
            return ["/elsewhere/config.yaml"]

    fsspec.register_implementation("alien", Alien, clobber=True)
    with pytest.raises(ValueError, match=r"has a file 'alien:///elsewhere/config\.yaml'; expected the copy of a run"):
        RunCopy(tmp_path, "alien://runs/a", 1.0, 0).restore()


def test_a_folder_that_is_ahead_of_its_copy_stays(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run, 1)
    update(RunCopy(run, str(copy), 1.0, 0))
    save(run, 2)
    (run / "note").write_text("newer")
    RunCopy(run, str(copy), 1.0, 0).restore()
    assert store.find_latest(run / "checkpoints") == store.path_of(run / "checkpoints", 2)


def test_a_storage_that_is_away_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    save(run, 1)
    (tmp_path / "file").write_text("")
    there = RunCopy(run, str(tmp_path / "file" / "copy"), 0.2, 0)
    with caplog.at_level(logging.WARNING):
        there.update()
        there.update()
    assert len(caplog.records) == 1 and "the run goes on, and copying is tried again" in caplog.text


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("https://host/runs", "cannot be written to; expected s3://, gs:// or a folder"),
        ("HTTPS://host/runs", "cannot be written to; expected s3://, gs:// or a folder"),
        ("nothing://host/runs", "expected an address such as"),
        ("s3://key:secret@bucket/a", "expected credentials in the environment"),
    ],
)
def test_places_that_cannot_be_used_are_refused(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RunCopy(tmp_path, place, 1.0, 0)


@pytest.mark.parametrize("place", ["run", "run/copy", "."])
def test_a_place_that_overlaps_the_runs_folder_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="which overlaps the run's folder 'run'; expected another place"):
        RunCopy(Path("run"), place, 1.0, 0)
    with pytest.raises(ValueError, match="which overlaps the run's folder 'run'; expected another place"):
        RunCopy(Path("run"), f"local://{tmp_path / place}", 1.0, 0)
