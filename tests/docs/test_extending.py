"""The pages of docs/extending/: a reader's files, by configuration alone, with the page's own commands."""

import csv
import math
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml

import mmpretrain
from mmpretrain.config.instantiate import instantiate
from mmpretrain.data.augment import augmented
from tests import runs
from tests.parquets import rows_of

PAGES = Path(__file__).resolve().parents[2] / "docs" / "extending"
TRAIN = "PYTHONPATH=. python -m mmpretrain.train "


def follow(page: str, folder: Path) -> list[list[str]]:
    """Write the files of a page below `folder`, and return the arguments of each of its training commands."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for path, content in re.findall(r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(TRAIN)) for line in lines if line.startswith(TRAIN)]


def run_page(page: str, folder: Path, pairs: Path, *overrides: str, model: tuple[str, ...] = runs.TINY_MODEL) -> Path:
    """Run the training commands of a page on small data, with `overrides`, and return the folder of the last run.

    The runs are `run`, `run1`, `run2`, ... in `folder`.
    """
    commands = follow(page, folder)
    assert commands
    own = ("eval=", "run.dir=")
    settings = [each for each in runs.TINY_RUN if each not in runs.TINY_MODEL and not each.startswith(own)]
    for number, arguments in enumerate(commands):
        name = f"run{number or ''}"
        held_out = ("data.val.val.classes=null", "data.val.val.label=null", "~data.val.composition")
        held_out = held_out if "experiment=quickstart" in arguments else ()
        small = [*arguments, f"data.root={pairs}", "trainer.duration=6steps", "trainer.eval_every=6steps"]
        finished = runs.run(
            "mmpretrain.train",
            [*small, *held_out, *settings, f"run.dir={name}", *model, *overrides],
            folder,
            {"PYTHONPATH": "."},
        )
        assert finished.code == 0, finished.stderr
    return folder / name


def test_an_objective_with_a_teacher_and_a_coupled_one(pairs: Path, tmp_path: Path) -> None:
    run_page("objective", tmp_path, pairs, "trainer.micro_batch_size=8")
    for run, name in (("run", "mean_teacher"), ("run1", "barlow_twins")):
        losses = [record[f"train/{name}_loss"] for record in runs.records(tmp_path / run) if "train/loss" in record]
        assert len(losses) == 6 and all(map(math.isfinite, losses))


def test_an_evaluator(pairs: Path, tmp_path: Path) -> None:
    run = run_page("evaluator", tmp_path, pairs)
    assert -1 <= runs.results(run)["eval-val/alignment"] <= 1
    assert any(b"eval-val/least_similar" in file.read_bytes() for file in (run / "tensorboard").rglob("events.*"))


@pytest.mark.slow
def test_image_encoders(pairs: Path, tmp_path: Path) -> None:
    run = run_page("image_encoder", tmp_path, pairs, model=())
    assert any("image.layers.0.weight" in name for name in runs.weights(run, 6))
    with pytest.raises(ValueError, match=r"trust=\[torchvision.models\]"):
        mmpretrain.load(tmp_path / "run")
    model, _, _ = mmpretrain.load(tmp_path / "run", trust=["torchvision.models"])
    assert model.image.width == 512 and model.image.has_batch_norm


@pytest.mark.slow
def test_text_encoders(pairs: Path, tmp_path: Path) -> None:
    follow("text_encoder", tmp_path)
    assert "python mine/tiny_bert.py models/tiny_bert\n" in (PAGES / "text_encoder.md").read_text(encoding="utf-8")
    subprocess.run([sys.executable, "mine/tiny_bert.py", "models/tiny_bert"], cwd=tmp_path, check=True)
    run = run_page("text_encoder", tmp_path, pairs, model=())
    assert "model.text.embedding.weight" in runs.weights(run, 6)
    shutil.rmtree(tmp_path / "models")
    model, _, tokenizer = mmpretrain.load(tmp_path / "run")
    assert model.embed_texts(*tokenizer(["a red circle", "a blue square"])).shape == (2, 128)


def test_augmentations(pairs: Path, tmp_path: Path) -> None:
    run = run_page("augmentation", tmp_path, pairs)
    assert all(math.isfinite(record["train/loss"]) for record in runs.records(run) if "train/loss" in record)
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["train"]["pairs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        augment, crop = (instantiate(saved[key], 0, key) for key in ("augment", "transform"))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(augmented(image, augment, 7), augmented(image, augment, 7))
    assert not torch.equal(augmented(image, augment, 7), augmented(image, augment, 8))
    assert crop(20, 30, 7) == crop(20, 30, 7) != crop(20, 30, 8)


@pytest.mark.slow
def test_a_sample_source(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        rows = rows_of(sorted((pairs / name).glob("*.tar")))
        with closing(sqlite3.connect(tmp_path / "data" / f"{name}.db")) as database, database:
            database.execute("CREATE TABLE pairs (id INTEGER PRIMARY KEY, image BLOB, caption TEXT)")
            values = [(i, row["image"]["bytes"], row["caption"]) for i, row in enumerate(rows, start=1)]
            database.executemany("INSERT INTO pairs VALUES (?, ?, ?)", values)
    settings = ("schedule=constant", "checkpoint.every=2steps", "data.workers=2", "eval=[retrieval]")
    run = run_page("sample_source", tmp_path, tmp_path / "data", *settings)
    # A run on tars has the same samples under the same stream's name.
    (tmp_path / "tars").mkdir()
    length = ("trainer.duration=6steps", "trainer.eval_every=6steps")
    runs.trained(tmp_path / "tars", pairs, *settings, *length)
    assert runs.exact_outcome(run) == runs.exact_outcome(tmp_path / "tars" / "run")
    evaluated = [f"checkpoint={run}", "eval=[retrieval]", "data.workers=0"]
    refused = runs.run("mmpretrain.evaluate", evaluated, tmp_path, {"PYTHONPATH": "."})
    assert refused.code == 2 and "trust=[mine.sqlite]" in refused.errors[0]
    trusted = runs.run("mmpretrain.evaluate", [*evaluated, "trust=[mine.sqlite]"], tmp_path, {"PYTHONPATH": "."})
    assert trusted.code == 0, trusted.stderr
    # Goes on from a copy of the data in another place, and not after a change.
    (tmp_path / "data").rename(tmp_path / "moved")
    longer = [*follow("sample_source", tmp_path)[0], *runs.TINY_RUN, *settings, "trainer.duration=8steps"]
    resumed = runs.run("mmpretrain.train", [*longer, f"data.root={tmp_path / 'moved'}"], tmp_path, {"PYTHONPATH": "."})
    assert resumed.code == 0 and "resumed from" in resumed.stderr, resumed.stderr
    with closing(sqlite3.connect(tmp_path / "moved" / "train.db")) as database, database:
        database.execute("UPDATE pairs SET caption = 'another' WHERE id = 7")
    longer[-1] = "trainer.duration=9steps"
    changed = runs.run("mmpretrain.train", [*longer, f"data.root={tmp_path / 'moved'}"], tmp_path, {"PYTHONPATH": "."})
    assert changed.code == 2 and "data.train.pairs has other shards or samples" in changed.errors[0]


def test_a_schedule(pairs: Path, tmp_path: Path) -> None:
    run = run_page("schedule", tmp_path, pairs)
    rates = [record["train/lr"] for record in runs.records(run) if "train/lr" in record]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


@pytest.mark.slow
def test_optimizers(pairs: Path, tmp_path: Path) -> None:
    run = run_page("optimizer", tmp_path, pairs)
    assert all(name.endswith("/average") for name in runs.weights(run, 6, "optimizer"))
    assert set(runs.weights(tmp_path / "run", 6, "ema")) == set(runs.weights(tmp_path / "run", 6))
    of_muon = {name.removesuffix("/momentum_buffer") for name in runs.weights(tmp_path / "run1", 6, "optimizer")}
    assert "model.text.transformer.resblocks.0.mlp.c_fc.weight" in of_muon
    assert not {"model.text.token_embedding.weight", "model.image_projection.weight"} & of_muon


def test_a_metric_writer(pairs: Path, tmp_path: Path) -> None:
    run = run_page("metric_writer", tmp_path, pairs)
    with (run / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    written = {(int(row["step"]), row["name"]): float(row["value"]) for row in rows}
    expected = {
        (record["step"], name): value
        for record in runs.records(run)
        for name, value in record.items()
        if name not in ("step", "samples")
    }
    assert len(written) == len(rows) and written == expected
    assert (run / "tensorboard").is_dir()
