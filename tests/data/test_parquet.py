"""Rows of Parquet files as samples: the same as those of tars, in bounded memory, with a reason for each bad one."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmpretrain.batch import Batch
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_captions, read_label
from mmpretrain.data.loader import build_loader
from mmpretrain.data.parquet import ParquetSource
from mmpretrain.data.shards import Shards
from mmpretrain.data.source import SampleSource, concatenated, selected
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.stream import SampleStream, Source
from mmpretrain.data.subset import select
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import RandomResizedCrop
from mmpretrain.schedules import Clock
from tests.parquets import IMAGE, rows_of, write_parquet
from tests.tars import make_samples, write_tars

NUM_SAMPLES = 70


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_tars(tmp_path_factory.mktemp("tars"), make_samples(NUM_SAMPLES), [30, 40])


@pytest.fixture(scope="module")
def files(tars: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The samples of `tars`, file for file; one file has images as bytes, the other as structs."""
    folder = tmp_path_factory.mktemp("parquet")
    first, second = rows_of(tars[:1]), rows_of(tars[1:])
    first = [{**row, "image": row["image"]["bytes"]} for row in first]
    return [write_parquet(folder / "000.parquet", first, 7), write_parquet(folder / "001.parquet", second, 100)]


def batches_of(source: SampleSource, workers: int, **options: Any) -> list[Batch]:
    settings = {"caption": "txt", "group": "json.caption", **options}
    stream = SampleStream(
        "pairs", [Source("pairs", source)], 14, 3, transform=RandomResizedCrop(), image_size=16, **settings
    )
    clock = Clock(14, 14 * 8, source.num_samples)
    return list(build_loader({"pairs": stream}, ClipTokenizer(16), clock, 0, 8, workers=workers))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for batch, expected in zip(ours, theirs, strict=True):
        for name in ("positions", "ids", "seeds", "images", "text", "lengths", "groups"):
            found, wanted = (getattr(each.streams["pairs"], name) for each in (batch, expected))
            assert torch.equal(found, wanted), name
        assert batch.seed == expected.seed


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("caption", ["txt", "json.captions"])
def test_batches_are_those_of_the_same_samples_in_tars(
    tars: list[str], files: list[str], workers: int, caption: str
) -> None:
    assert_equal(
        batches_of(ParquetSource(files), workers, caption=caption), batches_of(Shards(tars), 0, caption=caption)
    )


def test_every_row_is_the_sample_of_the_tar_whatever_the_cache_holds(tars: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(30_000) for _ in range(1000)]
    rows = [{"image": image, "caption": f"text {i}", "number": i} for i, image in enumerate(images)]
    for row_group_size in (100, 600, 1000):
        path = write_parquet(tmp_path / f"{row_group_size}.parquet", rows, row_group_size)
        # From nothing to all of it: the last is kept whole.
        for cache_bytes in (1, 8 << 20, 1 << 27):
            source = ParquetSource(path, cache_bytes=cache_bytes)
            for i in [*rng.permutation(1000)[:40].tolist(), 0, 255, 256, 599, 600, 999]:
                assert source.read(i, IMAGE_EXTENSIONS) == images[i]
                assert source.read(i, ("txt",)) == f"text {i}".encode()
                assert json.loads(source.read(i, ("json",))) == {"caption": f"text {i}", "number": i}
            held = sum(values.nbytes for values in source._cache._blocks.values())
            assert held == source._cache._num_bytes and (held <= max(cache_bytes, 9 << 20) or cache_bytes == 1 << 27)


def test_a_window_of_the_order_decodes_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": bytes([i % 256]) * 20_000, "caption": str(i)} for i in range(1500)]
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", rows, 1500), cache_bytes=32 << 20)
    loads: list[Any] = []
    load = source._load
    monkeypatch.setattr(source, "_load", lambda *block: loads.append(block) or load(*block))
    for i in np.random.default_rng(0).permutation(1500).tolist():
        source.read(i, IMAGE_EXTENSIONS)
        source.read(i, ("txt",))
    images = [block for block in loads if block[1] == "image"]
    assert len(images) == 6 and len(loads) == 7  # blocks of 256 rows; the captions in one piece


def test_threads_read_the_same_rows(files: list[str]) -> None:
    source = ParquetSource(files, cache_bytes=1)
    expected = [source.read(i, IMAGE_EXTENSIONS) for i in range(NUM_SAMPLES)]
    found: dict[int, list[bytes]] = {}

    def read(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(NUM_SAMPLES).tolist()
        images = {i: source.read(i, IMAGE_EXTENSIONS) for i in order}
        found[seed] = [images[i] for i in range(NUM_SAMPLES)]

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == [expected] * 4


def test_files_of_one_name_are_told_apart_by_their_folders(files: list[str], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(files[0], tmp_path / folder / "part-0.parquet")
    source = ParquetSource([str(tmp_path / "a"), str(tmp_path / "b" / "part-0.parquet")])
    assert [source.key(i) for i in (0, 29, 30)] == ["a/part-0:0", "a/part-0:29", "b/part-0:0"]


def test_samples_have_names_and_places(files: list[str]) -> None:
    source = ParquetSource(files)
    assert isinstance(source, SampleSource) and source.num_samples == NUM_SAMPLES
    assert [source.key(i) for i in (0, 29, 30, 69)] == ["000:0", "000:29", "001:0", "001:39"]
    assert [source.location(i) for i in (0, 29, 30)] == [files[0], files[0], files[1]]
    assert [ParquetSource(files, key="key").key(i) for i in (0, 69)] == ["000000", "000069"]
    for outside in (-1, NUM_SAMPLES):
        with pytest.raises(IndexError, match="expected 0 to 69"):
            source.read(outside, ("txt",))


def test_fields_are_columns_under_their_usual_names_or_their_own(tmp_path: Path) -> None:
    row = {"image": b"x", "caption": "a", "texts": ["a", "b"], "label": 3, "name": "cat", "alt": "c", "is_new": True}
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", [row]), label="label")
    assert source.read(0, ("webp", "jpg")) == b"x" and source.read(0, ("cls",)) == b"3"
    assert read_captions(source, 0, "alt") == ["c"] and read_captions(source, 0, "json.texts") == ["a", "b"]
    assert source.read(0, ("is_new",)) == b"1"
    assert read_label(source.read(0, ("json",)), "json.name") == "cat"
    assert json.loads(source.read(0, ("json",))) == {key: value for key, value in row.items() if key != "image"}
    with pytest.raises(BadSample, match=r"its column 'texts' holds a list; name it as json.texts"):
        source.read(0, ("texts",))
    with pytest.raises(BadSample, match=r"it has no field nothing .its columns are image, caption, texts, label"):
        source.read(0, ("nothing",))
    without = ParquetSource(str(tmp_path / "a.parquet"), image=None, caption=None)
    with pytest.raises(BadSample, match="it has no image column"):
        without.read(0, IMAGE_EXTENSIONS)
    with pytest.raises(BadSample, match="it has no field txt"):
        without.read(0, ("txt",))


@pytest.mark.parametrize(
    ("column", "value", "field", "reason"),
    [
        ("image", None, "jpg", "its column 'image' is null"),
        ("image", {"bytes": None, "path": "a.jpg"}, "jpg", "its column 'image' holds a path ('a.jpg') and no bytes"),
        ("image", {"bytes": None, "path": None}, "jpg", "its column 'image' is null"),
        ("caption", None, "txt", "its column 'caption' is null"),
        ("label", None, "cls", "its column 'label' is null"),
        ("caption", "x" * ((1 << 24) + 1), "txt", "more than the limit of 16777216"),
    ],
)
def test_a_bad_value_is_a_bad_sample(tmp_path: Path, column: str, value: Any, field: str, reason: str) -> None:
    good = {"image": {"bytes": b"x", "path": "b"}, "caption": "a", "label": 1}
    source = ParquetSource(write_parquet(tmp_path / "a.parquet", [good, {**good, column: value}]), label="label")
    assert source.read(0, (field,))
    with pytest.raises(BadSample) as error:
        source.read(1, (field,))
    assert reason in str(error.value)


def test_types_of_other_writers_are_read(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([b"x", b"y"], pa.large_binary()),
        "caption": pa.array(["a", "b"]).dictionary_encode(),
        "time": pa.array([1, 2], pa.timestamp("ns")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = ParquetSource(str(tmp_path / "a.parquet"))
    assert [(source.read(i, ("png",)), source.read(i, ("txt",))) for i in range(2)] == [(b"x", b"a"), (b"y", b"b")]
    assert json.loads(source.read(1, ("json",)))["time"].startswith("1970-01-01 00:00:00.000000002")


def test_a_null_of_a_dictionary_column_is_no_category(tmp_path: Path) -> None:
    captions = pa.array(["a", None, "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"image": [b"x"] * 4, "caption": captions}), tmp_path / "a.parquet")
    source = ParquetSource(str(tmp_path / "a.parquet"))
    assert [source.read(row, ("txt",)) for row in (0, 2, 3)] == [b"a", b"b", b"a"]
    with pytest.raises(BadSample, match="its column 'caption' is null"):
        source.read(1, ("txt",))


def test_views_of_strings_and_bytes_are_read(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([b"x", b"yy"], pa.binary_view()),
        "caption": pa.array(["a", "b" * 40], pa.string_view()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = ParquetSource(str(tmp_path / "a.parquet"))
    assert [source.read(i, ("png",)) for i in range(2)] == [b"x", b"yy"]
    assert [source.read(i, ("txt",)) for i in range(2)] == [b"a", b"b" * 40]


def test_a_damaged_row_group_is_its_samples_fault_and_the_others_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(500), "caption": "a" * 50} for _ in range(20)]
    path = Path(write_parquet(tmp_path / "a.parquet", rows, 10))
    chunk = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = ParquetSource(str(path))
    with pytest.raises(BadSample, match=r"column 'image' of row group 0 does not decode \("):
        source.read(3, IMAGE_EXTENSIONS)
    assert source.read(13, IMAGE_EXTENSIONS) == rows[13]["image"] and source.read(3, ("txt",)) == b"a" * 50


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image": "img"}, "image is 'img'; expected a column of PATH, which has image, caption, label, key"),
        ({"caption": "text"}, "caption is 'text'; expected a column of PATH"),
        ({"label": "cls"}, "label is 'cls'; expected a column of PATH"),
        ({"image": "caption"}, "image is 'caption', a column of string in PATH; expected the bytes of images"),
        ({"path": "nothing"}, "path 'nothing': no file"),
        ({"path": "s3://bucket/a.parquet"}, "expected local parquets"),
    ],
)
def test_wrong_arguments_are_named_with_what_there_is(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    rows = [{"image": b"x", "caption": "a", "label": 1, "key": "k"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError) as error:
        ParquetSource(**{"path": "a.parquet", "root": str(tmp_path), **options})
    assert told.replace("PATH", path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "told"), [(b"no parquet", "not a readable Parquet file"), (None, "no row in it")])
def test_files_without_rows_are_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "a.parquet"
    if content is None:
        pq.write_table(pa.table({"image": pa.array([], IMAGE), "caption": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.parquet: {told}"):
        ParquetSource(str(path))


def test_the_fingerprint_follows_the_rows_and_not_the_place(tmp_path: Path) -> None:
    rows = [{"image": b"x" * 100, "caption": f"caption {i}"} for i in range(20)]
    paths = [write_parquet(tmp_path / folder / "a.parquet", rows) for folder in "ab"]
    saved = ParquetSource(paths).fingerprint
    os.utime(paths[0], ns=(0, 0))
    assert ParquetSource(paths[0]).fingerprint == ParquetSource(paths[1]).fingerprint
    write_parquet(tmp_path / "b" / "a.parquet", [*rows[:-1], {**rows[-1], "caption": "zother 19"}])
    changed = ParquetSource(paths).fingerprint
    assert not changed.is_of(saved) and changed.changes_since(saved) == f"changed: {paths[1]}"


def test_a_file_that_changes_while_it_is_read_ends_the_reading(tmp_path: Path) -> None:
    rows = [{"image": b"x" * 100, "caption": f"caption {i}"} for i in range(20)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    source = ParquetSource(path)
    assert source.read(0, ("txt",)) == b"caption 0"
    write_parquet(tmp_path / "a.parquet", [{**row, "caption": "other"} for row in rows])
    with pytest.raises(FileChanged, match=r"a\.parquet was changed or replaced while it was read .*restore it"):
        source.read(19, ("txt",))


def test_some_keys_and_several_sources_of_both_kinds(tars: list[str], files: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", np.array(["000003", "000031", "000069", "absent"]))
    source, shards = ParquetSource(files, key="key"), Shards(tars)
    kept = [selected(each, select(each, str(tmp_path / "keys.npy"))) for each in (source, shards)]
    assert [kept[0].key(i) for i in range(3)] == ["000003", "000031", "000069"]
    assert_equal(batches_of(kept[0], 0), batches_of(kept[1], 0))
    mixed = concatenated([Shards(tars[:1]), ParquetSource(files[1])])
    assert_equal(batches_of(mixed, 0), batches_of(shards, 0))
    assert mixed.location(0) == tars[0] and mixed.location(69) == files[1]


def test_slow_layouts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"image": b"x" * 100, "caption": "a"} for _ in range(5000)]
    path = write_parquet(tmp_path / "a.parquet", rows, 5000)
    caplog.set_level(logging.WARNING)
    ParquetSource(path, cache_bytes=1 << 24)
    assert not caplog.records
    ParquetSource(path, cache_bytes=1 << 8)
    assert "source.cache_bytes=..." in caplog.records[0].getMessage()
    assert "write the files again with row_group_size=256" in caplog.records[1].getMessage()
