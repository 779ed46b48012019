"""`build --torchvision` on small files in torchvision's own formats, without a network."""

import io
import json
import pickle
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import CIFAR10

from data_tools.__main__ import main
from mmpretrain.data.pairs import read_pairs

REPOSITORY = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save_images(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Write an image for each name and return their bytes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(8, 8, 3)).save(folder / name)
    return {name: (folder / name).read_bytes() for name in names}


def write_mnist(root: Path, images: np.ndarray, labels: list[int], prefix: str = "train") -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + bytes(labels))


def build(root: Path, output: Path, name: str, *options: str) -> int:
    arguments = ["build", "--torchvision", name, "--root", str(root), "--output", str(output), "--workers", "1"]
    return main([*arguments, *options])


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False)}


def test_image_files_keep_their_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{name}/{name}_{i}.jpg" for name in ("Forest", "SeaLake") for i in (1, 2)]
    data = save_images(tmp_path / "root" / "eurosat" / "2750", names)
    assert build(tmp_path / "root", tmp_path / "out", "EuroSAT", "--template", "a satellite photo of {}") == 0
    captured = capsys.readouterr()
    assert "4 samples in 1 shards, 2 classes" in captured.out and captured.err == ""
    found = samples(tmp_path / "out")
    assert [found[f"{i:08d}"]["jpg"] for i in (1, 2, 3, 4)] == list(data.values())
    assert [found[f"{i:08d}"]["cls"] for i in (1, 2, 3, 4)] == [b"0", b"0", b"1", b"1"]
    assert found["00000003"]["txt"] == b"a satellite photo of SeaLake"
    row = {"image": "eurosat/2750/SeaLake/SeaLake_1.jpg", "label": "SeaLake", "caption": "a satellite photo of SeaLake"}
    assert json.loads(found["00000003"]["json"]) == row


def test_arrays_become_png_without_loss(tmp_path: Path) -> None:
    images = pixels(3, 28, 28)
    write_mnist(tmp_path, images, [7, 0, 7])
    write_mnist(tmp_path, images[:1], [1], prefix="t10k")
    assert build(tmp_path, tmp_path / "out", "MNIST") == 0
    found = samples(tmp_path / "out")
    for i in range(3):
        with Image.open(io.BytesIO(found[f"{i + 1:08d}"]["png"])) as image:
            assert np.array_equal(np.asarray(image), images[i])
    assert [found[f"{i:08d}"]["txt"] for i in (1, 2)] == [b"a photo of a 7 - seven", b"a photo of a 0 - zero"]
    rows = read_pairs(tmp_path / "out" / "classes.tsv").rows
    assert [row["count"] for row in rows] == ["1", *"000000", "2", "0", "0"]
    assert rows[3]["text"] == "a photo of a 3 - three"  # a class without a sample
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["pairs"] == "MNIST"
    assert build(tmp_path, tmp_path / "val", "MNIST", "--split", "test") == 0
    assert [sample["cls"] for sample in samples(tmp_path / "val").values()] == [b"1"]


@pytest.mark.parametrize("content", [b"abc", bytes(5000)])
def test_damaged_arrays_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    for prefix in ("train", "t10k"):
        write_mnist(tmp_path, pixels(10, 28, 28), [0] * 10, prefix)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    assert build(tmp_path, tmp_path / "out", "MNIST") == 2
    error = capsys.readouterr().err
    assert f"--torchvision 'MNIST': a file of it in --root '{tmp_path}' is damaged (" in error
    assert error.count("\n") == 1 and "remove its folder there, and run the command again" in error


def test_pickled_arrays_that_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    images = pixels(2, 3, 32, 32)
    contents = {
        "data_batch_1": {"data": images.reshape(2, -1), "labels": [1, 0]},
        "test_batch": {"data": images.reshape(2, -1), "labels": [1, 0]},
        "batches.meta": {"label_names": ["airplane", "fire_truck"]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(
        CIFAR10, "train_list", [["data_batch_1", None]]
    )  # torchvision knows the hash of its own files alone
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    assert build(tmp_path, tmp_path / "out", "CIFAR10") == 0
    sample = samples(tmp_path / "out")["00000001"]
    assert sample["txt"] == b"a photo of a fire truck" and sample["cls"] == b"1"
    with Image.open(io.BytesIO(sample["png"])) as image:
        assert np.array_equal(np.asarray(image), images[0].transpose(1, 2, 0))


def test_the_same_bytes_again(tmp_path: Path) -> None:
    for prefix in ("train", "t10k"):  # torchvision reads neither without the other
        write_mnist(tmp_path, pixels(5, 28, 28), [0, 1, 2, 3, 4], prefix)
    for name in ("a", "b"):
        assert build(tmp_path, tmp_path / name, "MNIST", "--samples-per-shard", "2") == 0
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.slow
def test_a_killed_build_of_arrays_is_finished_by_the_next(tmp_path: Path) -> None:
    for prefix in ("train", "t10k"):
        write_mnist(tmp_path, pixels(60, 300, 300), [0] * 60, prefix)
    output = tmp_path / "out"
    options = ["--samples-per-shard", "2", "--format", "webp", "--quality", "100"]
    arguments = ["build", "--torchvision", "MNIST", "--root", str(tmp_path), "--output", str(output), "--workers", "2"]
    with subprocess.Popen([sys.executable, "-m", "data_tools", *arguments, *options], cwd=REPOSITORY) as process:
        while len(list(output.glob("*.tar"))) < 3:
            with pytest.raises(subprocess.TimeoutExpired):  # it must not end by itself before it is killed
                process.wait(timeout=0.01)
        process.kill()
    done = {tar.name: tar.stat().st_mtime_ns for tar in output.glob("*.tar")}
    assert build(tmp_path, output / ".." / "out", "MNIST", *options) == 0  # the same folder by another path
    assert {name: (output / name).stat().st_mtime_ns for name in done} == done, "they are not made again"
    assert len(list(output.glob("*.tar"))) == 30 > len(done) and not list(output.glob(".*"))


def test_splits_listed_in_files(tmp_path: Path) -> None:
    folder = tmp_path / "dtd" / "dtd"
    data = save_images(folder / "images", ["dotted/a.jpg", "woven/b.jpg", "woven/c.jpg"])
    (folder / "labels").mkdir()
    (folder / "labels" / "train1.txt").write_text("dotted/a.jpg\nwoven/b.jpg\nwoven/missing.jpg\n")
    (folder / "labels" / "val1.txt").write_text("dotted/a.jpg\nwoven/c.jpg\n")
    assert build(tmp_path, tmp_path / "train", "DTD", "--split", "train") == 0
    assert build(tmp_path, tmp_path / "val", "DTD", "--split", "val") == 0
    assert [sample["jpg"] for _, sample in sorted(samples(tmp_path / "train").items())] == list(data.values())[:2]
    assert {sample["jpg"] for sample in samples(tmp_path / "val").values()} == {
        data["dotted/a.jpg"],
        data["woven/c.jpg"],
    }
    (refusal,) = (tmp_path / "train" / "refused.jsonl").read_text().splitlines()
    assert "No such file" in json.loads(refusal)["reason"]


def test_sets_that_open_their_files_by_path(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    data = save_images(folder / "images", ["Abyssinian_1.jpg", "great_pyrenees_2.jpg"])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_2 2 2 1\n")
    assert build(tmp_path, tmp_path / "out", "OxfordIIITPet", "--template", "a {}, a pet") == 0
    found = [sample for _, sample in sorted(samples(tmp_path / "out").items())]
    assert [sample["jpg"] for sample in found] == list(data.values())
    assert [sample["txt"] for sample in found] == [b"a Abyssinian, a pet", b"a Great Pyrenees, a pet"]


def test_files_of_other_formats_become_png_and_classes_can_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gtsrb" / "GTSRB" / "Training"
    save_images(folder, ["00000/00000_1.ppm", "00001/00000_1.ppm"])
    assert build(tmp_path, tmp_path / "out", "GTSRB") == 0
    assert "note: GTSRB does not name its classes" in capsys.readouterr().err
    assert samples(tmp_path / "out")["00000002"]["txt"] == b"a photo of a 1"
    (tmp_path / "names.txt").write_text("a limit of 20 km/h\na limit of 30 km/h\nstop\n")
    options = ("--classes", str(tmp_path / "names.txt"), "--template", "a sign: {}")
    assert build(tmp_path, tmp_path / "named", "GTSRB", *options) == 0
    assert capsys.readouterr().err == ""
    sample = samples(tmp_path / "named")["00000002"]
    assert sample["txt"] == b"a sign: a limit of 30 km/h" and sample["cls"] == b"1"
    with Image.open(io.BytesIO(sample["png"])) as image, Image.open(folder / "00001/00000_1.ppm") as source:
        assert np.array_equal(np.asarray(image), np.asarray(source))
    assert len(read_pairs(tmp_path / "named" / "classes.tsv").rows) == 3
    (tmp_path / "names.txt").write_text("a limit of 20 km/h\n")
    assert build(tmp_path, tmp_path / "few", "GTSRB", *options) == 2
    assert "--torchvision 'GTSRB': 1 names for 2 classes; name the classes" in capsys.readouterr().err


def test_a_class_list_orders_or_renames_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path / "eurosat" / "2750", ["Forest/1.jpg", "SeaLake/2.jpg"])
    names = tmp_path / "names.txt"
    for lines, expected in (
        ("SeaLake\nPasture\nForest\n", {(b"2", b"a photo of a Forest"), (b"0", b"a photo of a SeaLake")}),
        ("forest\nlake\n", {(b"0", b"a photo of a forest"), (b"1", b"a photo of a lake")}),
    ):
        names.write_text(lines)
        assert build(tmp_path, tmp_path / "out", "EuroSAT", "--classes", str(names)) == 0
        assert {(sample["cls"], sample["txt"]) for sample in samples(tmp_path / "out").values()} == expected
    names.write_text("forest\nlake\nriver\n")
    assert build(tmp_path, tmp_path / "out", "EuroSAT", "--classes", str(names)) == 2
    assert "--torchvision 'EuroSAT': 3 names for 2 classes; name the classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CIFAR11", (), "--torchvision 'CIFAR11': no such data set; did you mean 'CIFAR10'?"),
        (
            "FakeData",
            (),
            "--torchvision 'FakeData': torchvision reads it with no folder; name a set for classification",
        ),
        ("CocoCaptions", (), "--torchvision 'CocoCaptions': torchvision reads it with `annFile`; name a set"),
        ("EMNIST", (), "--torchvision 'EMNIST': torchvision reads it with `split`; name a --split"),
        ("ImageFolder", (), "--torchvision 'ImageFolder': cannot be read from --root"),
        ("DTD", ("--split", "tset"), "--torchvision 'DTD' --split 'tset': Unknown value 'tset' for argument split"),
        ("MNIST", ("--split", "val"), "--split 'val': MNIST has the splits train and test"),
        ("EuroSAT", ("--split", "val"), "--split 'val': EuroSAT has no splits"),
        ("EuroSAT", ("--label", "kind"), "--label 'kind': expected a table"),
        ("EuroSAT", ("pairs.tsv",), "expected one source: PAIRS, --coco captions.json or --torchvision NAME"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, options: tuple[str, ...], message: str
) -> None:
    assert build(tmp_path, tmp_path / "out", name, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_without_a_network_one_line_says_where_the_files_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # it is made once, with the proxies of that moment
    monkeypatch.setenv("no_proxy", "")
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # nothing listens there
    assert build(tmp_path / "root", tmp_path / "out", "CIFAR10") == 2
    error = capsys.readouterr().err
    assert f"--torchvision 'CIFAR10': cannot be read from --root '{tmp_path}/root', nor downloaded to there" in error
    assert error.count("\n") == 1
