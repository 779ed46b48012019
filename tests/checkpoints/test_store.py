import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmpretrain import files
from mmpretrain.checkpoints import store
from tests import runs

STATE = {"step": 3, "samples": 48, "fingerprint": {"data.train.pairs": {"pairs": "abc"}}}


def tensors(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model, and its moments, that tell their step; one tensor is not contiguous, one is a scalar."""
    model = {"model.weight": torch.full((4, 3), float(step)).T, "objectives.a.logit_scale": torch.tensor([2.0])}
    return model, {"model.weight/exp_avg": torch.full((3, 4), step / 2), "model.weight/step": torch.tensor(float(step))}


def save(folder: Path, step: int, keep_last: int = 0, is_best: bool = False) -> Path:
    model, optimizer = tensors(step)
    parts = {"model": model, "optimizer": optimizer}
    path = store.save(folder, step, parts, {**STATE, "step": step}, keep_last)
    if is_best:
        store.mark_best(path, keep_last)
    return path


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 3)
    model, optimizer = tensors(3)
    for part, expected in (("model", model), ("optimizer", optimizer)):
        loaded = store.load_tensors(path, part)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert store.load_state(path) == {**STATE, "step": 3}


def test_latest_names_the_newest_and_only_the_last_stay(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        save(tmp_path, step, keep_last=2)
    assert (tmp_path / "latest").read_text() == "step_00000100\n"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000011", "step_00000100"]


def test_the_best_one_stays_however_old_it_is(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep_last=2, is_best=step in (1, 3))
    assert (tmp_path / "best").read_text() == "step_00000003\n"
    names = [path.name for path in tmp_path.glob("step_*")]
    assert sorted(names) == ["step_00000003", "step_00000005", "step_00000006"]


def test_what_a_kill_before_the_deletion_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, is_best=step == 1)
    store.prune(tmp_path, 2)
    names = [path.name for path in tmp_path.glob("step_*")]
    assert sorted(names) == ["step_00000001", "step_00000004", "step_00000005"]
    save(tmp_path, 6, keep_last=1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000006"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whoever_may_read_new_files_may_read_checkpoints(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in [*path.iterdir(), tmp_path / "latest"]} == {0o666 & ~umask}


def test_a_further_part_is_saved_and_verified(tmp_path: Path) -> None:
    model, optimizer = tensors(1)
    path = store.save(tmp_path, 1, {"model": model, "optimizer": optimizer, "ema": model}, STATE, 0)
    assert store.load_tensors(path, "ema").keys() == model.keys()
    (path / "ema.safetensors").unlink()
    with pytest.raises(store.CorruptCheckpoint, match=r"ema\.safetensors is missing"):
        store.verify(path)


def test_zero_keeps_every_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep_last=0)
    assert len(list(tmp_path.glob("step_*"))) == 5


def test_manifest_has_the_hash_and_size_of_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.pop("format") == 1
    assert set(manifest) == {file.name for file in path.iterdir()} - {"manifest.json"}
    for name, entry in manifest.items():
        assert entry["bytes"] == (path / name).stat().st_size
        assert len(entry["sha256"]) == 64


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (overwrite, "model.safetensors", "model.safetensors has another SHA-256"),
        (overwrite, "optimizer.safetensors", "optimizer.safetensors has another SHA-256"),
        (overwrite, "state.json", "state.json has another SHA-256"),
        (cut, "model.safetensors", "bytes, expected"),
        (Path.unlink, "optimizer.safetensors", "optimizer.safetensors is missing"),
        (Path.unlink, "manifest.json", "manifest.json cannot be read"),
        (lambda path: path.write_text("[]"), "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_damage_is_found(damage: Callable[[Path], None], file: str, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    store.verify(path)
    damage(path / file)
    with pytest.raises(store.CorruptCheckpoint, match=message):
        store.verify(path)


def test_a_checkpoint_in_another_format_is_refused_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="step_00000002 has format 2; expected 1: another version of mmpretrain"):
        store.find_latest(tmp_path)


def test_newest_that_verifies_is_found_with_a_warning_for_each_that_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(tmp_path, 1)
    for step in (2, 3):
        overwrite(save(tmp_path, step) / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert store.find_latest(tmp_path) == good
    assert [step in message for step, message in zip(("step_00000003", "step_00000002"), caplog.messages)] == [True] * 2
    assert len(list(tmp_path.glob("step_*"))) == 3, "looking must not change anything"


def test_damaged_checkpoint_is_set_aside_so_that_its_step_can_be_saved_again(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    overwrite(save(tmp_path, 2) / "model.safetensors")
    assert store.find_latest(tmp_path, set_aside=True) == good
    assert (tmp_path / "corrupt_step_00000002").is_dir()
    assert store.find_latest(tmp_path) == good
    again = save(tmp_path, 2)
    assert store.find_latest(tmp_path) == again


def test_going_back_sets_damaged_ones_aside_and_forgets_a_best_one_that_is_gone(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        save(tmp_path, step, is_best=step == 6)
    (tmp_path / "step_00000006" / "model.safetensors").write_bytes(b"")
    assert store.go_back(tmp_path, 9).name == "step_00000009"
    assert (tmp_path / "best").read_text() == "step_00000006\n"
    assert store.go_back(tmp_path, 8).name == "step_00000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corrupt_step_00000006", "latest", "step_00000003"]


def test_where_no_checkpoint_verifies_nothing_is_touched(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2)]
    for path in paths:
        overwrite(path / "model.safetensors")
    with pytest.raises(store.CorruptCheckpoint, match=r"none of the 2 checkpoints in .* verifies; restore one"):
        store.find_latest(tmp_path, set_aside=True)
    assert all(path.is_dir() for path in paths)


def test_there_is_no_latest_in_a_new_run(tmp_path: Path) -> None:
    assert store.find_latest(tmp_path / "checkpoints") is None
    store.clean(tmp_path / "checkpoints")


def test_leftovers_are_removed_and_checkpoints_stay(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / ".partial-step_00000002").mkdir()
    (tmp_path / ".partial-step_00000002" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".partial-latest").write_text("step")
    store.clean(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["latest", path.name]
    assert store.find_latest(tmp_path) == path


def _save_forever(folder: Path) -> None:
    step = 0
    while True:
        step += 1
        save(folder, step, keep_last=2)


@pytest.mark.slow
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    for _ in range(10):
        process = runs.start(_save_forever, tmp_path)
        deadline = time.monotonic() + 60
        while not (list(tmp_path.glob("step_*")) and list(tmp_path.glob(".partial-*"))):
            assert time.monotonic() < deadline and process.is_alive()
        process.kill()
        process.join()
        path = store.find_latest(tmp_path)
        assert path is not None
        step = store.load_state(path)["step"]
        assert torch.equal(store.load_tensors(path, "model")["model.weight"], tensors(step)[0]["model.weight"])
        store.clean(tmp_path)
        for left in tmp_path.glob("step_*"):
            store.verify(left)
            for file in left.iterdir():
                file.unlink()
            left.rmdir()


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    path.write_text("a much longer text than the new one")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
