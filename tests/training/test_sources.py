"""Runs on samples that are no tars, by configuration alone: the same run as on tars, killed, evaluated, refused."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmpretrain import build
from mmpretrain.config.schema import SourceConfig, StreamConfig
from mmpretrain.data.open_shards import StorageOptions
from tests import runs
from tests.parquets import rows_of, table_of, write_like, write_parquet

LENGTH = ("trainer.duration=6steps", "checkpoint.every=2steps", "schedule=constant")
SETTINGS = ("data=parquet", "data.train.pairs.source.key=key", *LENGTH)


@pytest.fixture(scope="module")
def parquet(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of `pairs` in Parquet."""
    return write_like(pairs, tmp_path_factory.mktemp("parquet"))


@pytest.fixture(scope="module")
def on_tars(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tars."""
    folder = tmp_path_factory.mktemp("tars")
    runs.trained(folder, pairs, *LENGTH)
    return folder / "run"


@pytest.fixture(scope="module")
def on_parquet(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on Parquet that was killed and went on, with workers."""
    folder = tmp_path_factory.mktemp("parquet-run")
    command = runs.start_train(folder, f"data.root={parquet}", *SETTINGS, "data.workers=2")
    command.wait_for(lambda: runs.checkpoints(folder / "run"), "a checkpoint")
    command.send(signal.SIGKILL)
    command.wait()
    assert runs.checkpoints(folder / "run")[-1].name < "step_00000006"
    runs.trained(folder, parquet, *SETTINGS)
    return folder


def test_a_killed_run_on_parquet_is_the_run_on_tars(on_tars: Path, on_parquet: Path) -> None:
    assert runs.exact_outcome(on_parquet / "run") == runs.exact_outcome(on_tars)


def test_a_finished_run_is_evaluated_on_its_own_sources(on_parquet: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = [f"checkpoint={on_parquet / 'run'}", "eval=[retrieval]", f"output={output}", "data.workers=0"]
    finished = runs.run("mmpretrain.evaluate", arguments, tmp_path)
    assert finished.code == 0, finished.stderr
    scores = json.loads(output.read_text())
    expected, intervals = runs.results(on_parquet / "run"), scores.pop("intervals")
    assert scores == {name: expected[name] for name in scores}
    assert intervals == json.loads((on_parquet / "run" / "intervals.json").read_text())
    assert any("recall" in name for name in scores)


def test_a_changed_file_and_a_changed_column_are_refused(on_parquet: Path, parquet: Path, tmp_path: Path) -> None:
    run, data = f"run.dir={on_parquet / 'run'}", tmp_path / "data"
    for file in sorted(parquet.glob("*/*.parquet")):
        copy = data / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    longer = (*SETTINGS, "trainer.duration=8steps", run)
    finished = runs.train(tmp_path, f"data.root={data}", *longer, "data.train.pairs.source.key=null")
    assert finished.code == 2 and 'data.train.pairs.source.key: "key" -> null' in finished.errors[0]
    table = pq.read_table(data / "train" / "000001.parquet")
    pq.write_table(table.slice(1), data / "train" / "000001.parquet")
    finished = runs.train(tmp_path, f"data.root={data}", *longer)
    assert finished.code == 2
    assert "data.train.pairs has other shards or samples (changed: " in finished.errors[0]
    assert "000001.parquet" in finished.errors[0] and "000000.parquet" not in finished.errors[0]


def test_two_ranks_see_the_samples_of_one(on_tars: Path, parquet: Path, tmp_path: Path) -> None:
    for finished in runs.train_group(tmp_path, 2, f"data.root={parquet}", *SETTINGS, "data.workers=2"):
        assert finished.code == 0, finished.stderr
    ours, theirs = (
        [record["train/loss"] for record in runs.records(folder) if "train/loss" in record]
        for folder in (tmp_path / "run", on_tars)
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_a_row_without_image_is_quarantined_and_labels_are_read(parquet: Path, pairs: Path, tmp_path: Path) -> None:
    rows = rows_of(sorted((pairs / "train").glob("*.tar")))
    rows[5]["image"] = None
    write_parquet(tmp_path / "data" / "train" / "a.parquet", rows)
    held_out = [{**row, "class": i % 2} for i, row in enumerate(rows_of(sorted((pairs / "val").glob("*.tar"))))]
    write_parquet(tmp_path / "data" / "val" / "a.parquet", held_out)
    (tmp_path / "data" / "classes.txt").write_text("even\nodd\n")
    settings = ("data.train.pairs.source.key=key", "data.val.val.source.label=class", "data.val.val.label=cls",
                "data.val.val.classes=classes.txt", "eval=[zero_shot]", "trainer.duration=13steps")  # fmt: skip
    runs.trained(tmp_path, tmp_path / "data", "data=parquet", *settings)
    (refusal,) = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert refusal["key"] == rows[5]["key"] and refusal["shard"] == str(tmp_path / "data" / "train" / "a.parquet")
    assert refusal["reason"] == "its column 'image' is null"
    assert 0 <= runs.results(tmp_path / "run")["eval-val/acc1"] <= 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.train.pairs.source.caption=text", "data.train.pairs.source: caption is 'text'; expected a column of "),
        ("+data.train.pairs.source.colour=red", "unknown configuration key 'data.train.pairs.source.colour'"),
        ("~data.val.val.source._target_", "data.val.val.source has no _target_; expected the full name of a class"),
    ],
)
def test_wrong_sources_are_refused_in_one_line(parquet: Path, tmp_path: Path, override: str, told: str) -> None:
    finished = runs.train(tmp_path, f"data.root={parquet}", "data=parquet", "trainer.duration=1steps", override)
    assert finished.code == 2 and told in finished.errors[0]
    if "caption" in override:
        assert "which has caption, label, image, key" in finished.errors[0]


SOURCE = {"_target_": "mmpretrain.data.parquet.ParquetSource", "path": "train"}


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        ({}, "data.train.pairs has none of them; expected one of shards, source and sources"),
        (
            {"shards": "train", "source": SOURCE},
            "has shards and source; expected one of .*: data.train.pairs.shards=null",
        ),
        ({"sources": {"a": SourceConfig()}}, "data.train.pairs.sources.a has neither of shards and source"),
        ({"sources": {"a": SourceConfig("train", SOURCE)}}, "data.train.pairs.sources.a has both of shards and source"),
        (
            {"source": {"_target_": "mmpretrain.data.transforms.CenterCrop"}},
            "source is a CenterCrop; expected num_samples",
        ),
    ],
)
def test_a_stream_has_samples_of_one_kind(parquet: Path, stream: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build._sources("pairs", StreamConfig(**stream), str(parquet), StorageOptions())


def test_sources_are_weighted_and_cut_as_shards_are(pairs: Path, parquet: Path) -> None:
    mixed = {
        "a": SourceConfig(str(pairs / "train" / "000000.tar"), weight=3),
        "b": SourceConfig(source=SOURCE, weight=1),
    }
    first, second = build._sources("pairs", StreamConfig(sources=mixed), str(parquet), StorageOptions())
    assert (first.samples.num_samples, first.weight, second.samples.num_samples, second.weight) == (100, 3, 200, 1)
    assert first.samples.read(7, ("png",)) == second.samples.read(7, ("png",))
    (cut,) = build._sources("pairs", StreamConfig(source=SOURCE, max_samples=30), str(parquet), StorageOptions())
    assert cut.samples.num_samples == 30 and cut.samples.key(29) == "000000:29"


def test_a_data_set_of_hugging_face(pairs: Path, on_tars: Path, tmp_path: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {
        split: datasets.Dataset(table_of(rows_of(sorted((pairs / folder).glob("*.tar"))))).cast_column(
            "image", datasets.Image()
        )
        for split, folder in (("train", "train"), ("validation", "val"))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    runs.trained(
        tmp_path, tmp_path / "data", "data=datasets", "data.train.pairs.source.key=key", *LENGTH, "data.workers=2"
    )
    assert runs.exact_outcome(tmp_path / "run") == runs.exact_outcome(on_tars)
