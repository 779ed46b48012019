"""Sharded checkpoints: each rank writes and reads its own rows, and all agree on what became of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmpretrain.checkpoints import store
from tests.distributed.checkpoints import load, save, save_beside_training, save_on_a_full_disk, values
from tests.distributed.pool import Pool


@pytest.fixture(scope="module")
def saved(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    pool(4).run(save, folder)
    return store.path_of(folder, 1)


def test_every_rank_writes_its_rows_and_any_number_of_ranks_reads_them(
    saved: Path, pool: Callable[[int], Pool]
) -> None:
    store.verify(saved)
    expected = values()
    for found in [store.load_tensors(saved, "model"), *pool(2).run(load, saved), *pool(4).run(load, saved)]:
        assert found.keys() == expected.keys()
        assert all(
            torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found
        )
    assert [len(load_file(file)["many"]) for file in sorted((saved / "model").iterdir())] == [3, 3, 3, 2]


def test_a_part_without_shards_is_a_file_of_rank_0(saved: Path) -> None:
    assert (saved / "optimizer.safetensors").is_file()
    assert store.load_tensors(saved, "optimizer") == {}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_each_damaged_shard_is_named(damage: str, pool: Callable[[int], Pool], tmp_path: Path) -> None:
    pool(2).run(save, tmp_path)
    path = store.path_of(tmp_path, 1)
    shards = sorted((path / "model").iterdir())
    for shard in shards:
        content = shard.read_bytes()
        if damage == "remove":
            shard.unlink()
        else:
            shard.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
        with pytest.raises(store.CorruptCheckpoint, match=f"model/{shard.name}"):
            store.verify(path)
        shard.write_bytes(content)
    store.verify(path)
    assert len(shards) == 2


def test_shards_that_the_manifest_does_not_list_and_files_in_their_place_are_refused(
    saved: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(saved, tmp_path / saved.name))
    shard = sorted((path / "model").iterdir())[-1]
    for other in (path / "model.safetensors", shard.with_name("shard-00009-model-00001-of-00001.safetensors")):
        shutil.copy(shard, other)
        with pytest.raises(store.CorruptCheckpoint, match=f"{other.name} is not in its manifest"):
            store.verify(path)
        other.unlink()
    store.verify(path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest[f"model/{shard.name}"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    shard.unlink()  # without it, tensors would look smaller
    with pytest.raises(
        store.CorruptCheckpoint, match=r"lists \{'model': \d\} shards, but \{'model': \d\} were written"
    ):
        store.verify(path)


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_of_one_rank_is_told_to_all_and_keeps_the_checkpoint_before(
    full_rank: int, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    pool(2).run(save, tmp_path)
    said = pool(2).run(save_on_a_full_disk, tmp_path, full_rank)
    assert said[0] == said[1] and "File too large" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert store.find_latest(tmp_path) == store.path_of(tmp_path, 1)
    pool(2).run(save, tmp_path, 2)
    assert store.find_latest(tmp_path) == store.path_of(tmp_path, 2)


def test_training_goes_on_while_a_checkpoint_of_the_weights_before_is_written(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    assert pool(2).run(save_beside_training, tmp_path) == [(False, True, True)] * 2
