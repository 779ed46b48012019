"""A run's copy in a bucket or a folder holds finished files alone, and the run goes on from it on another machine."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmpretrain.checkpoints import store
from mmpretrain.training.run_copy import RunCopy
from tests import runs
from tests.servers import s3_server

SETTINGS = ("trainer.duration=24steps", "checkpoint.every=4steps", "checkpoint.keep_last=2", "data.workers=1")


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    runs.trained(folder, pairs, *SETTINGS)
    return runs.exact_outcome(folder / "run")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_copied(folder: Path, copy: Path) -> None:
    expected = {name for name in names(folder) if not name.startswith(".")}
    assert names(copy) == expected
    assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in expected)


def test_a_stopped_run_goes_on_from_its_copy_in_another_folder(
    whole: dict[str, Any], pairs: Path, tmp_path: Path
) -> None:
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
    assert f"run was fetched from file://{copy}: step_" in finished.stderr
    assert runs.exact_outcome(second / "run") == whole
    assert_copied(second / "run", copy)
    assert len(list((copy / "checkpoints").glob("step_*"))) == 2, "deleted ones are deleted there, too"


def test_a_run_is_copied_to_a_bucket_and_back(whole: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    (tmp_path / "other").mkdir()
    given = (*SETTINGS, f"data.root={pairs}", "run.sync_to=s3://bucket/runs/a")
    with s3_server(tmp_path / "empty") as environment:
        for folder in ("first", "second"):
            finished = runs.train(tmp_path / folder, *given, environment=environment)
            assert finished.code == 0, finished.stderr
            assert runs.exact_outcome(tmp_path / folder / "run") == whole
        assert "is finished" in finished.stderr  # restored whole
        other = runs.train(tmp_path / "other", *given, "run.seed=7", environment=environment)
        assert other.code == 2
        assert "run.sync_to: s3://bucket/runs/a is the copy of another run (run.seed: 0 -> 7)" in other.stderr


def save(folder: Path, step: int, **state: int) -> Path:
    tensors: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    return store.save(folder / "checkpoints", step, tensors, {"step": step, "samples": step, **state}, keep_last=0)


def saved_steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in runs.checkpoints(folder)]


@pytest.mark.parametrize(("keep_last", "left"), [(0, [1, 2, 3, 4, 5, 6]), (2, [5, 6])])
def test_another_machine_keeps_the_checkpoints_that_it_has_not_fetched(
    keep_last: int, left: list[int], tmp_path: Path
) -> None:
    first, second, copy = (tmp_path / name for name in ("first", "second", "copy"))
    for step in (1, 2, 3, 4):
        save(first, step, due_step=2)
    RunCopy(first, str(copy), 1.0, 0).update()
    there = RunCopy(second, str(copy), 1.0, keep_last)
    there.restore()
    assert saved_steps(second) == [2, 4], "the newest, and the one that rollbacks go to"
    save(second, 5)
    save(second, 6)
    if keep_last:
        store.prune(second / "checkpoints", keep_last)
    there.update()
    assert saved_steps(copy) == left


def test_a_checkpoint_that_is_written_anew_replaces_its_copy(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run, 1)
    there = RunCopy(run, str(copy), 1.0, 0)
    there.update()
    for content in (5, 6):  # by a process that knows the copy, and by one that starts
        shutil.rmtree(runs.checkpoints(run)[0])
        save(run, 1, content=content)
        (runs.checkpoints(copy)[0] / "of_before").touch()
        there.update()
        assert names(runs.checkpoints(copy)[0]) == names(runs.checkpoints(run)[0])
        assert store.find_latest(copy / "checkpoints") is not None
        there = RunCopy(run, str(copy), 1.0, 0)
        there.restore()


def test_a_checkpoint_without_its_manifest_is_no_copy_yet(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run, 1)
    there = RunCopy(run, str(copy), 1.0, 0)
    there.update()
    newer = save(run, 2)
    there.update()
    (
        copy / "checkpoints" / newer.name / "manifest.json"
    ).unlink()  # as if the machine had been lost while it was copied
    fresh = tmp_path / "fresh"
    RunCopy(fresh, str(copy), 1.0, 0).restore()
    assert not (fresh / "checkpoints").exists(), "latest names a checkpoint that is not whole"
    there._copied.clear()
    there.update()
    RunCopy(fresh, str(copy), 1.0, 0).restore()
    assert store.find_latest(fresh / "checkpoints") == store.path_of(fresh / "checkpoints", 2)


def test_a_folder_that_is_ahead_of_its_copy_stays(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    save(run, 1)
    RunCopy(run, str(copy), 1.0, 0).update()
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
