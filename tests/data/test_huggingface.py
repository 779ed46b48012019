"""Data sets of Hugging Face's `datasets` on disk as samples."""

import os
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmpretrain.data.decode import BadSample
from mmpretrain.data.huggingface import DatasetSource
from mmpretrain.data.shards import Shards
from mmpretrain.data.source import SampleSource
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from tests.parquets import rows_of, table_of
from tests.tars import make_samples, write_tars

os.environ.setdefault("HF_HUB_OFFLINE", "1")
datasets = pytest.importorskip("datasets")


def save(rows: list[dict[str, Any]], folder: Path, splits: dict[str, slice] | None = None) -> Path:
    """Write rows as a data set, or as splits of one."""
    datasets.disable_progress_bars()
    whole = datasets.Dataset(table_of(rows)).cast_column("image", datasets.Image())
    if splits is None:
        whole.save_to_disk(folder, num_shards=2)
    else:
        parts = {name: whole.select(range(len(rows))[part]) for name, part in splits.items()}
        datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tars(tmp_path_factory.mktemp("tars"), make_samples(30), [30])


def test_rows_are_the_samples_of_the_tars(tars: list[str], tmp_path: Path) -> None:
    rows = rows_of(tars)
    save(rows, tmp_path / "data")
    source, shards = DatasetSource("data", str(tmp_path), key="key"), Shards(tars)
    assert isinstance(source, SampleSource) and source.num_samples == 30
    for i in range(30):
        assert source.read(i, IMAGE_EXTENSIONS) == shards.read(i, IMAGE_EXTENSIONS)
        assert source.read(i, ("txt",)) == shards.read(i, ("txt",)) and source.key(i) == shards.key(i)
    assert source.location(0) == str(tmp_path / "data")
    with pytest.raises(IndexError, match="expected 0 to 29"):
        source.read(30, ("txt",))


def test_splits_and_selections(tars: list[str], tmp_path: Path) -> None:
    rows = rows_of(tars)
    save(rows, tmp_path / "data", {"train": slice(0, 20), "validation": slice(20, 30)})
    held_out = DatasetSource(str(tmp_path / "data"), split="validation")
    assert held_out.num_samples == 10 and held_out.read(0, ("txt",)) == rows[20]["caption"].encode()
    assert held_out.key(3) == "3"
    for split in (None, "test"):
        with pytest.raises(ValueError, match=r"split is .* expected one of its splits: train, validation"):
            DatasetSource(str(tmp_path / "data"), split=split)


def test_bad_values_and_wrong_arguments_are_told(tars: list[str], tmp_path: Path) -> None:
    rows = rows_of(tars)
    rows[1]["image"], rows[2]["caption"] = None, None
    path = str(save(rows, tmp_path / "data"))
    source = DatasetSource(path)
    with pytest.raises(BadSample, match="its column 'image' is null"):
        source.read(1, IMAGE_EXTENSIONS)
    with pytest.raises(BadSample, match="its column 'caption' is null"):
        source.read(2, ("txt",))
    for options, told in (
        ({"caption": "text"}, "caption is 'text'; expected a column of .*, which has .*captions, image"),
        ({"split": "train"}, "split is 'train' for .*; expected null"),
        ({"path": str(tmp_path / "none")}, "expected an existing folder that save_to_disk wrote"),
        ({"path": str(tmp_path)}, "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=told):
            DatasetSource(**{"path": path, **options})


@pytest.mark.parametrize("offset", [0x7FFFFF00, -5])
def test_a_damaged_value_is_a_bad_sample_and_does_not_end_the_process(
    offset: int, tars: list[str], tmp_path: Path
) -> None:
    path = save(rows_of(tars), tmp_path / "data")
    file = path / "data-00000-of-00002.arrow"
    content = bytearray(file.read_bytes())
    captions = pa.ipc.open_stream(content).read_all()["caption"].chunk(0)
    struct.pack_into("<i", content, content.find(captions.buffers()[1].to_pybytes()[:40]) + 16, offset)
    file.write_bytes(content)
    source = DatasetSource(str(path))
    for row in (3, 4):  # the offset ends one value and begins the next
        with pytest.raises(BadSample, match="its column 'caption' is damaged"):
            source.read(row, ("txt",))
    assert source.read(6, ("txt",))


def test_the_fingerprint_follows_the_rows_and_not_the_place(tars: list[str], tmp_path: Path) -> None:
    rows = rows_of(tars)
    save(rows, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    saved = DatasetSource(str(tmp_path / "moved")).fingerprint
    assert DatasetSource(str(save(rows, tmp_path / "b"))).fingerprint == saved
    changed = DatasetSource(str(save([*rows[:-1], {**rows[-1], "caption": "other"}], tmp_path / "c"))).fingerprint
    assert not changed.is_of(saved) and "data-00001-of-00002.arrow" in changed.changes_since(saved)
