"""The commands of docs/your_own_data.md on small files of each kind: each builds, trains and is evaluated."""

import csv
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from mmpretrain.data.pairs import read_pairs
from mmpretrain.data.shards import Shards, expand_shards
from tests import runs
from tests.parquets import table_of
from tests.servers import http_server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_own_data.md"
COLOURS = ("red", "green", "blue")
NUM_TRAIN, NUM_VAL = 48, 18
SPLITS = {"train": range(NUM_TRAIN), "val": range(NUM_TRAIN, NUM_TRAIN + NUM_VAL)}
PROGRAM = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")


def commands(section: str) -> list[list[str]]:
    """Arguments of the `python -m` commands of a section of the page, module first."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python -m ")]
    assert found, f"no commands below {section!r}"
    return found


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def caption(number: int) -> str:
    return f"a {colour(number)} circle, number {number}"


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(runs.png(number, colour(number)))


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------------------- files of each kind


def make_table(folder: Path) -> None:
    for name, numbers in zip(("pairs", "held_out"), SPLITS.values()):
        for i in numbers:
            save(folder / "images" / f"{i}.png", i)
        write_table(folder / f"{name}.tsv", [{"filepath": f"images/{i}.png", "caption": caption(i)} for i in numbers])


def make_photos(folder: Path) -> None:
    for name, numbers in zip(("photos", "held_out_photos"), SPLITS.values()):
        for i in numbers:
            save(folder / name / f"{i}.png", i)
            (folder / name / f"{i}.txt").write_text(caption(i))


def make_class_folders(folder: Path) -> None:
    for name, numbers in zip(("train", "test"), SPLITS.values()):
        for i in numbers:
            save(folder / "fruit" / name / f"{colour(i)}_fruit" / f"{i}.png", i)


def make_torchvision(folder: Path) -> None:
    root = folder / "data" / "torchvision"
    (root / "dtd" / "dtd" / "labels").mkdir(parents=True)
    for split, numbers in SPLITS.items():
        names = [f"{colour(i)}/{i}.png" for i in numbers]
        for i, name in zip(numbers, names):
            save(root / "dtd" / "dtd" / "images" / name, i)
        (root / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))
    for i in range(27):  # as many as EuroSAT has thousands
        save(root / "eurosat" / "2750" / colour(i) / f"{i}.png", i)


def make_coco(folder: Path) -> None:
    (folder / "annotations").mkdir()
    for split, numbers in SPLITS.items():
        images = [{"id": i, "file_name": f"{i}.png"} for i in numbers]
        texts = [{"image_id": i, "caption": f"text {j}: {caption(i)}\n"} for i in numbers for j in range(5)]
        coco = json.dumps({"images": images, "annotations": texts})
        (folder / "annotations" / f"captions_{split}2017.json").write_text(coco)
        for i in numbers:
            save(folder / f"{split}2017" / f"{i}.png", i)


def make_img2dataset(folder: Path) -> None:
    for shard in range(3):
        runs.write_shard(folder / "laion" / f"{shard:05d}.tar", 24 * shard, 24)
        pq.write_table(pa.table({"url": ["a"], "status": ["success"]}), folder / "laion" / f"{shard:05d}.parquet")
        (folder / "laion" / f"{shard:05d}_stats.json").write_text('{"count": 25, "successes": 24}')


def rows_of(numbers: Sequence[int]) -> list[dict[str, object]]:
    images = [{"bytes": runs.png(i, colour(i)), "path": None} for i in numbers]
    return [{"image": image, "caption": caption(i)} for image, i in zip(images, numbers)]


def make_parquet(folder: Path) -> None:
    for split, hub in zip(SPLITS, ("train", "validation")):
        table = table_of(rows_of(SPLITS[split]))
        for path, names in ((f"parquet/{split}/0", ["image", "caption"]), (f"hub/{hub}-0", ["jpg", "text"])):
            (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.rename_columns(names), folder / "data" / f"{path}.parquet")


def make_datasets(folder: Path) -> None:
    parts = {
        name: datasets.Dataset.from_list(rows_of(SPLITS[split])).cast_column("image", datasets.Image())
        for split, name in (("train", "train"), ("val", "validation"))
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder / "data" / "hf"))


def make_texts(folder: Path) -> None:
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text("".join(f"Paragraph {i} of a book.\n\n" for i in range(400)))
    runs.write_pairs(folder / "data" / "mine")


SOURCES: dict[str, Callable[[Path], None]] = {
    "A table of paths and captions": make_table,
    "A folder of images and texts": make_photos,
    "Labelled images": make_class_folders,
    "Data sets of torchvision": make_torchvision,
    "COCO captions": make_coco,
    "Tars of img2dataset or WebDataset": make_img2dataset,
    "Parquet with image bytes": make_parquet,
    "Hugging Face `datasets`": make_datasets,
    "Text alone": make_texts,
}


# ------------------------------------------------------------------------------- commands


def run_data_tools(section: str, folder: Path, *options: str) -> None:
    """Run the data_tools commands of a section in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, *arguments in commands(section):
            if module == "data_tools":
                small = ("--samples-per-shard", "1") if "EuroSAT" in arguments else ()
                assert main([*arguments, *small, *options, "--workers", "1"]) == 0


def train_and_evaluate(section: str, folder: Path) -> dict[str, float]:
    """Run the training commands of a section, evaluate each run's checkpoint, and return the last run's scores."""
    arguments = [each for module, *each in commands(section) if module == "mmpretrain.train"]
    assert arguments
    settings = [each for each in runs.TINY_RUN if not each.startswith(("eval=", "run.dir="))]
    for number, given in enumerate(arguments):
        run = f"run{number}"
        small = [*settings, f"run.dir={run}", "trainer.duration=3steps"]
        finished = runs.run("mmpretrain.train", [*given, *small], folder)
        assert finished.code == 0, finished.stderr
        evaluate = [f"checkpoint={run}", "data.workers=0", f"output={run}.json"]
        finished = runs.run("mmpretrain.evaluate", evaluate, folder)
        assert finished.code == 0, finished.stderr
        scores: dict[str, float] = json.loads((folder / f"{run}.json").read_text())
        during = {name: score for name, score in runs.results(folder / run).items() if name.startswith("eval-")}
        assert during and during.items() <= scores.items()
    return scores


def test_each_source_has_a_section_and_each_section_a_test() -> None:
    page = PAGE.read_text(encoding="utf-8")
    others = {"Images by URL", "Remote shards", "Compressed files", "Check and describe shards"}
    assert set(re.findall(r"^## (.+)$", page, flags=re.MULTILINE)) == {*SOURCES, *others}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("A table of paths and captions", {"data/mine/train": NUM_TRAIN, "data/mine/val": NUM_VAL}),
        ("A folder of images and texts", {"data/photos/train": NUM_TRAIN, "data/photos/val": NUM_VAL}),
        ("Labelled images", {"data/fruit/train": NUM_TRAIN, "data/fruit/val": NUM_VAL}),
        ("Data sets of torchvision", {"data/dtd/train": NUM_TRAIN, "data/dtd/val": NUM_VAL, "data/eurosat/train": 27}),
        ("COCO captions", {"data/coco/train": NUM_TRAIN, "data/coco/val": NUM_VAL}),
        ("Tars of img2dataset or WebDataset", {"laion": 72}),
    ],
)
def test_each_build_gives_the_samples_of_its_files(section: str, expected: dict[str, int], tmp_path: Path) -> None:
    SOURCES[section](tmp_path)
    run_data_tools(section, tmp_path)
    for folder, num_samples in expected.items():
        shards = Shards(expand_shards(str(tmp_path / folder)))
        assert shards.num_samples == num_samples and shards.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("section", SOURCES)
def test_each_source_trains_and_is_evaluated(section: str, tmp_path: Path) -> None:
    SOURCES[section](tmp_path)
    run_data_tools(section, tmp_path)
    scores = train_and_evaluate(section, tmp_path)
    if section in ("Labelled images", "Data sets of torchvision"):
        assert 0 <= scores["eval-val/acc1"] <= 1 and "eval-val/text_retrieval_recall@1" not in scores
    else:
        assert 0 <= scores["eval-val/text_retrieval_recall@1"] <= 1


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no img2dataset on PATH, nor named by IMG2DATASET")
def test_images_by_url_are_downloaded_and_trained_on(tmp_path: Path) -> None:
    make_table(tmp_path)
    with http_server(tmp_path) as server:
        for table, urls in (("pairs", "urls"), ("held_out", "held_out_urls")):
            rows = read_pairs(tmp_path / f"{table}.tsv").rows
            given = [{"url": f"{server.url}/{row['filepath']}", "caption": row["caption"]} for row in rows]
            write_table(tmp_path / f"{urls}.tsv", given)
        run_data_tools("Images by URL", tmp_path, "--img2dataset", str(PROGRAM))
    assert Shards(expand_shards(str(tmp_path / "data" / "web" / "train"))).num_samples == NUM_TRAIN
    assert "eval-val/text_retrieval_recall@1" in train_and_evaluate("Images by URL", tmp_path)
