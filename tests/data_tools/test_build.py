"""`build` as it is run: from tables to tars that webdataset reads."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from data_tools.__main__ import main
from data_tools.output import open_output
from mmpretrain.data.pairs import read_pairs
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.tar_index import index_tar

REPOSITORY = Path(__file__).resolve().parents[2]


def build(pairs: Path, output: Path, *options: str) -> int:
    arguments = ["build", str(pairs), "--image", "path", "--caption", "caption", "--output", str(output)]
    return main([*arguments, "--workers", "1", *options])


def samples(folder: Path) -> list[dict[str, bytes]]:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".npz")}


def refusals(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]


def test_samples_hold_image_caption_and_all_columns(make_pairs, tmp_path: Path, capsys) -> None:
    pairs = make_pairs(5, tags=["x", "", "y, z", " ", "é"])
    assert build(pairs, tmp_path / "out", "--caption", "caption,tags") == 0
    assert "5 samples in 1 shards" in capsys.readouterr().out
    found = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    assert sorted(found) == ["00000001", "00000002", "00000003", "00000004", "00000005"]
    assert found["00000003"]["txt"].decode() == "caption 2, y, z" and found["00000002"]["txt"] == b"caption 1"
    assert found["00000005"]["png"] == (pairs.parent / "4.png").read_bytes()
    row = {"path": "4.png", "caption": "caption 4", "kind": "dog", "tags": "é"}
    assert json.loads(found["00000005"]["json"]) == row
    assert "cls" not in found["00000005"]


def test_of_a_column_of_lists_txt_has_the_first_text_and_json_all(make_pairs, tmp_path: Path, capsys) -> None:
    pairs = make_pairs(2)
    rows = [{"path": f"{i}.png", "texts": [f"first {i}", f"second {i}"]} for i in range(2)]
    table = pairs.with_name("pairs.jsonl")
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build(table, tmp_path / "out", "--caption", "texts") == 0
    found = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    assert found["00000002"]["txt"] == b"first 1"
    assert json.loads(found["00000002"]["json"])["texts"] == ["first 1", "second 1"]
    note = capsys.readouterr().err
    assert "note: column 'texts' has lists of texts" in note and "data.train.pairs.caption=json.texts" in note


@pytest.mark.parametrize("is_struct", [True, False])
def test_a_column_of_image_bytes_is_refused_with_the_way_to_train_on_it(
    make_pairs, tmp_path: Path, capsys, is_struct: bool
) -> None:
    data = (make_pairs(1).parent / "0.png").read_bytes()
    rows = [{"path": {"bytes": data, "path": None} if is_struct else data, "caption": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    assert build(tmp_path / "pairs.parquet", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--image 'path': expected a column of paths, but it holds the bytes of images" in line
    assert (
        f"data=parquet data.train.pairs.source.path={tmp_path / 'pairs.parquet'} data.train.pairs.source.image=path"
        in line
    )


def test_the_same_bytes_whatever_the_workers_and_another_order_for_another_seed(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs()
    options = ["--samples-per-shard", "5", "--label", "kind"]
    assert build(pairs, tmp_path / "a", *options) == 0
    assert build(pairs, tmp_path / "b", *options, "--workers", "3") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert build(pairs, tmp_path / "c", *options, "--seed", "1") == 0
    keys = [[sample["__key__"] for sample in samples(tmp_path / name)] for name in "ac"]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1]) != keys[0]


def test_shards_are_of_equal_size_and_indexed(make_pairs, tmp_path: Path) -> None:
    assert build(make_pairs(23), tmp_path / "out", "--samples-per-shard", "5") == 0
    assert all((tmp_path / "out" / f"00000{i}.tar.index.npz").is_file() for i in range(5))
    shards = Shards(expand_shards(str(tmp_path / "out")))
    assert shards.counts.tolist() == [4, 5, 4, 5, 5] and shards.problems == []
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_samples"] == 23
    assert [shard["num_samples"] for shard in manifest["shards"]] == shards.counts.tolist()
    assert [shard["digest"] for shard in manifest["shards"]] == [
        shards.index(i).digest for i in range(len(shards.paths))
    ]
    assert manifest["options"]["samples_per_shard"] == 5


def test_refused_rows_are_reported_and_the_shards_stay_equal(make_pairs, tmp_path: Path, capsys) -> None:
    pairs = make_pairs(12)
    (pairs.parent / "1.png").unlink()
    (pairs.parent / "2.png").write_bytes(b"no picture")
    pairs.write_text(pairs.read_text().replace("caption 3\t", " \t").replace("4.png", ""))
    assert build(pairs, tmp_path / "out", "--samples-per-shard", "3") == 0
    assert "4 rows refused" in capsys.readouterr().out
    assert Shards(expand_shards(str(tmp_path / "out"))).counts.tolist() == [2, 3, 3]
    refused = refusals(tmp_path / "out")
    assert [refusal["row_number"] for refusal in refused] == [2, 3, 4, 5]
    reasons = ["no such file", "no readable image", "no caption: caption empty", "no path in column 'path'"]
    for refusal, reason in zip(refused, reasons):
        assert reason in refusal["reason"]


def test_a_hostile_file_is_refused_and_the_rest_is_built(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(10)
    hostile = {2: "x" * 300, 3: "loop.png", 4: "pipe.png", 5: "zero.png", 6: ".", 7: "giant.jpg", 8: "broken.png"}
    (pairs.parent / "loop.png").symlink_to("loop.png")
    os.mkfifo(pairs.parent / "pipe.png")
    (pairs.parent / "zero.png").symlink_to("/dev/zero")
    (pairs.parent / "broken.png").symlink_to("/proc/self/mem")
    with open(pairs.parent / "giant.jpg", "wb") as file:
        file.truncate(10**12)  # sparse
    Image.new("RGB", (16384, 1)).save(pairs.parent / "8.png")
    text = pairs.read_text()
    for row_number, name in hostile.items():
        text = text.replace(f"{row_number - 1}.png", name)
    pairs.write_text(text)
    assert build(pairs, tmp_path / "out", "--format", "webp") == 0
    assert sorted(sample["__key__"] for sample in samples(tmp_path / "out")) == ["00000001", "00000010"]
    assert [refusal["row_number"] for refusal in refusals(tmp_path / "out")] == list(range(2, 10))
    reasons = {refusal["row_number"]: str(refusal["reason"]) for refusal in refusals(tmp_path / "out")}
    assert reasons[7] == "1000000000000 bytes, more than the limit of 536870912"
    assert reasons[9].startswith("16384 x 1 pixels, webp allows sides of 16383")


def test_images_outside_of_the_root_are_refused(make_pairs, tmp_path: Path, capsys) -> None:
    pairs = make_pairs(8)
    folder = pairs.parent
    (tmp_path / "rawer").mkdir()  # whose name begins as the root's
    for number, path in {1: "../1.png", 2: f"{tmp_path}/2.png", 5: "sub/../../5.png", 6: "../rawer/6.png"}.items():
        (folder / f"{number}.png").rename(os.path.normpath(folder / path))
        pairs.write_text(pairs.read_text().replace(f"\n{number}.png", f"\n{path}"))
    (folder / "4.png").rename(tmp_path / "4.png")
    (folder / "4.png").symlink_to(tmp_path / "4.png")  # the user's own arrangement
    (folder / "deep").symlink_to(tmp_path / "rawer")
    text = pairs.read_text().replace("\n0.png", f"\n{folder}/0.png").replace("\n3.png", "\nsub/../3.png")
    pairs.write_text(text.replace("\n7.png", "\ndeep/../7.png"))  # the root's own, whatever `deep` is
    assert build(pairs, tmp_path / "out") == 0
    assert sorted(int(sample["__key__"]) for sample in samples(tmp_path / "out")) == [1, 4, 5, 8]
    assert [refusal["row_number"] for refusal in refusals(tmp_path / "out")] == [2, 3, 6, 7]
    reason = f"its path leaves {str(folder)!r}: name the images' folder with --image-root, or trust the table"
    assert all(str(refusal["reason"]).startswith(reason) for refusal in refusals(tmp_path / "out"))
    assert build(pairs, tmp_path / "trusted", "--allow-outside") == 0
    assert len(samples(tmp_path / "trusted")) == 8
    pairs.write_text("path\tcaption\n../1.png\tc\n")
    assert build(pairs, tmp_path / "none") == 2
    assert f"every row is refused, the first because: {reason}" in capsys.readouterr().err


def test_images_lie_in_the_root_that_is_named(make_pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(3).rename(tmp_path / "pairs.tsv")
    monkeypatch.chdir(tmp_path)
    for root in ("raw", str(tmp_path / "raw"), "./raw/"):
        assert build(pairs, tmp_path / "out", "--image-root", root) == 0
        assert len(samples(tmp_path / "out")) == 3
    assert build(Path("pairs.tsv"), tmp_path / "out") == 2
    pairs.write_text(pairs.read_text().replace("\n", f"\n{tmp_path}/raw/"))
    for root in ("/", "."):
        assert build(Path("pairs.tsv"), tmp_path / "out", "--image-root", root) == 0
        assert len(samples(tmp_path / "out")) == 3


def test_half_surrogate_pairs_are_refused_or_replaced(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"path": "a.png", "caption": "fine", "kind": "cat", "note": "fine"}
    changes = [{}, {"path": "\ud800.png"}, {"caption": "\ud800"}, {"kind": "\ud800"}, {"note\udc00": "\ud800"}]
    changes += [{"path": "\udcff.png"}, {"key": "\ud800"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | change) + "\n" for change in changes))
    assert build(tmp_path / "pairs.jsonl", tmp_path / "out", "--label", "kind") == 0
    found = {int(sample["__key__"]): json.loads(sample["json"]) for sample in samples(tmp_path / "out")}
    assert found == {1: row, 5: row | {"note\ufffd": "\ufffd"}, 7: row | {"key": "\ufffd"}}
    refused = {refusal["row_number"]: refusal for refusal in refusals(tmp_path / "out")}
    assert list(refused) == [2, 3, 4, 6]
    assert refused[6]["image"] == str(tmp_path / "\udcff.png") and refused[6]["reason"] == "no such file"
    for number in (3, 4):
        assert "half a surrogate pair" in str(refused[number]["reason"])


def test_files_whose_names_are_not_utf8_are_built(make_pairs, tmp_path: Path, capsys) -> None:
    folder = make_pairs(2).parent
    (folder / "0.png").rename(folder / "\udcff.png")
    (folder / "\udcff.txt").write_text("caption")
    output = tmp_path / "\udcfe"
    assert main(["build", str(folder), "--output", str(output), "--workers", "1"]) == 0
    assert "1 samples in 1 shards" in capsys.readouterr().out and len(samples(output)) == 1
    (folder / "\udcff.txt").rename(folder / "1.txt")
    assert main(["build", str(folder), "--output", str(tmp_path / "other"), "--workers", "1"]) == 0
    assert refusals(tmp_path / "other")[0]["reason"] == "\udcff.png: no \udcff.txt beside it"


def test_a_label_that_is_too_large_an_index_is_refused(make_pairs, tmp_path: Path, capsys) -> None:
    pairs = make_pairs(4, number=["0", "1000000", "1" * 5000, "2"])
    assert build(pairs, tmp_path / "out", "--label", "number") == 0
    assert sorted(sample["cls"] for sample in samples(tmp_path / "out")) == [b"0", b"2"]
    limit = "expected below 1000000; list the labels in --classes"
    assert [refusal["reason"] for refusal in refusals(tmp_path / "out")] == [
        f"class index 1000000: {limit}",
        f"class index {'1' * 20}: {limit}",
    ]
    pairs.write_text("path\tcaption\tnumber\n0.png\tc\t1234567\n")
    assert build(pairs, tmp_path / "other", "--label", "number") == 2
    assert f"every row is refused, the first because: class index 1234567: {limit}" in capsys.readouterr().err


def test_the_memory_that_decoding_an_image_takes_is_limited(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(2)
    Image.new("L", (8, 8)).save(pairs.parent / "0.png")
    # By the header, a pixel: one byte of grey or four of RGB for Pillow, and three for the result.
    assert build(pairs, tmp_path / "out", "--max-image-bytes", str(8 * 8 * 7 - 1)) == 0
    (refusal,) = refusals(tmp_path / "out")
    assert refusal["row_number"] == 2 and str(refusal["reason"]).endswith("(--max-image-bytes)")


def test_files_that_change_between_check_and_writing_are_refused(
    make_pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(7)

    def change_then_open(*arguments: Any) -> Any:
        (pairs.parent / "1.png").unlink()
        (pairs.parent / "2.png").write_bytes(b"no picture")
        return open_output(*arguments)

    monkeypatch.setattr("data_tools.build.open_output", change_then_open)
    assert build(pairs, tmp_path / "out", "--samples-per-shard", "1", "--label", "kind") == 0
    assert sorted(int(sample["__key__"]) for sample in samples(tmp_path / "out")) == [1, 4, 5, 6, 7]
    reasons = {refusal["row_number"]: refusal["reason"] for refusal in refusals(tmp_path / "out")}
    assert reasons[2] == "the file changed during the build: no such file"
    assert str(reasons[3]).startswith("the file changed during the build: no readable image")
    assert len(reasons) == 2 and Shards(expand_shards(str(tmp_path / "out"))).counts.tolist() == [1] * 5
    counts = {row["label"]: row["count"] for row in read_pairs(tmp_path / "out" / "classes.tsv").rows}
    assert counts == {"ant": "1", "cat": "3", "dog": "1"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["num_samples"], manifest["num_refused"], len(manifest["shards"])) == (5, 2, 5)


def test_labels_become_class_indexes(make_pairs, tmp_path: Path) -> None:
    assert build(make_pairs(7), tmp_path / "out", "--label", "kind") == 0
    found = {int(sample["__key__"]): int(sample["cls"]) for sample in samples(tmp_path / "out")}
    assert found == {number + 1: [1, 2, 0][number % 3] for number in range(7)}
    table = (tmp_path / "out" / "classes.tsv").read_text().splitlines()
    assert table == ["index\tlabel\tcount\ttext", "0\tant\t2\t", "1\tcat\t3\t", "2\tdog\t2\t"]


def test_the_one_caption_of_a_class_is_its_text(make_pairs, tmp_path: Path) -> None:
    captions = ["the cat", "a dog", "an ant", "the cat", "the dog", "an ant"]
    pairs = make_pairs(6, shared=captions)
    assert build(pairs, tmp_path / "train", "--label", "kind", "--caption", "shared") == 0
    rows = read_pairs(tmp_path / "train" / "classes.tsv").rows
    assert [row["text"] for row in rows] == ["an ant", "the cat", ""]
    # A split without cats takes the order, and the text of what it lacks, from the other's list.
    pairs.write_text("".join(line for line in pairs.read_text().splitlines(True) if "the cat" not in line))
    classes = ["--classes", str(tmp_path / "train" / "classes.tsv")]
    assert build(pairs, tmp_path / "val", "--label", "kind", "--caption", "shared", *classes) == 0
    rows = read_pairs(tmp_path / "val" / "classes.tsv").rows
    assert [(row["label"], row["count"], row["text"]) for row in rows] == [
        ("ant", "2", "an ant"),
        ("cat", "0", "the cat"),
        ("dog", "2", ""),
    ]


def test_integer_labels_stay_as_they_are(make_pairs, tmp_path: Path) -> None:
    assert build(make_pairs(3, number=["10", "2", "2"]), tmp_path / "out", "--label", "number") == 0
    assert sorted((sample["__key__"][-1], sample["cls"]) for sample in samples(tmp_path / "out")) == [
        ("1", b"10"),
        ("2", b"2"),
        ("3", b"2"),
    ]
    rows = read_pairs(tmp_path / "out" / "classes.tsv").rows
    assert len(rows) == 11 and [row["count"] for row in rows[:4]] == ["0", "0", "2", "0"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "dog\ncat\n"),
        ("classes.tsv", "kind\tdescription\ndog\td\ncat\tc\n"),
        ("classes.tsv", "id\tkind\n5\tdog\n4\tcat\n"),
        ("classes.tsv", "index\tlabel\n1\tcat\n0\tdog\n"),
        ("classes.csv", "dog\ncat\n"),
    ],
)
def test_a_class_list_gives_the_order_and_refuses_others(make_pairs, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert build(make_pairs(3), tmp_path / "out", "--label", "kind", "--classes", str(tmp_path / name)) == 0
    assert {sample["txt"]: sample["cls"] for sample in samples(tmp_path / "out")} == {
        b"caption 0": b"1",
        b"caption 1": b"0",
    }
    assert "label 'ant' is not in the class list" in str(refusals(tmp_path / "out")[0]["reason"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.csv", "index,label\n0,dog\n1,cat\n", "a table with commas; expected one label a line, or a TSV"),
        ("classes.tsv", "index\tlabel\n1\tdog\n2\tcat\n", "no row with index 0; expected 0 to 1, each once"),
        ("classes.tsv", "index\tlabel\n0\tdog\n0\tcat\n", "no row with index 1; expected 0 to 1, each once"),
    ],
)
def test_class_lists_whose_order_is_not_known_are_refused(
    make_pairs, tmp_path: Path, capsys, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    assert build(make_pairs(3), tmp_path / "out", "--label", "kind", "--classes", str(tmp_path / name)) == 2
    error = capsys.readouterr().err
    assert f"--classes '{tmp_path / name}': {message}" in error and error.count("\n") == 1


def test_keys_come_from_a_key_column_that_can_name_samples(make_pairs, tmp_path: Path, capsys) -> None:
    assert build(make_pairs(3, key=["x", "y-1", "ü"]), tmp_path / "a") == 0
    assert sorted(sample["__key__"] for sample in samples(tmp_path / "a")) == ["x", "y-1", "ü"]
    for name, keys in {"twice": ["x", "x", "y"], "dot": ["x.1", "y", "z"], "long": ["x" * 91, "y", "z"]}.items():
        assert build(make_pairs(3, key=keys), tmp_path / name) == 0
        assert "keys are row numbers, since the key 'x" in capsys.readouterr().err
        assert sorted(sample["__key__"] for sample in samples(tmp_path / name))[0] == "00000001"


def test_images_are_reduced_and_converted(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(2, side=32)
    Image.new("RGBA", (32, 64), (0, 0, 0, 0)).save(pairs.parent / "1.png")
    options = ["--image-size", "16", "--format", "webp", "--background", "#00ff00"]
    assert build(pairs, tmp_path / "out", *options) == 0
    found = {sample["__key__"]: sample for sample in samples(tmp_path / "out")}
    (tmp_path / "1.webp").write_bytes(found["00000002"]["webp"])
    with Image.open(tmp_path / "1.webp") as image:
        assert image.size == (16, 32)
        red, green, blue = image.convert("RGB").getpixel((8, 8))
        assert red < 20 and green > 235 and blue < 20


def test_a_folder_needs_no_columns(make_pairs, tmp_path: Path) -> None:
    folder = make_pairs(3).parent
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"beside {number}\n")
    assert main(["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert sorted(sample["txt"] for sample in samples(tmp_path / "out")) == [b"beside 0", b"beside 1", b"beside 2"]


def test_texts_beside_images_that_training_would_refuse_are_refused(make_pairs, tmp_path: Path) -> None:
    folder = make_pairs(6).parent
    contents = [
        b"\xef\xbb\xbfa cat",
        "\u200b".encode(),
        b"\xef\xbb\xbf",
        "a".encode("utf-16-le"),
        b"\xff",
        b"a" * (2 << 20),
    ]
    for number, content in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(content)
    assert main(["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert [sample["txt"] for sample in samples(tmp_path / "out")] == [b"a cat"]
    assert [refusal["reason"] for refusal in refusals(tmp_path / "out")] == [
        "no caption: caption empty",
        "no caption: caption empty",
        "3.png: 3.txt has NULs, as UTF-16 has; convert it to UTF-8",
        "4.png: 4.txt is not UTF-8 (invalid start byte at byte 0); convert it",
        "the caption has 2097152 characters, more than the limit of 1048576",
    ]


def test_of_a_list_of_captions_the_good_ones_are_kept(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(5)
    lists = [["\u200b", "good"], ["\ud800", "good"], ["g\0", "good"], ["\ud800"], ["\u200b"]]
    table = pairs.with_name("pairs.jsonl")
    rows = [{"path": f"{number}.png", "caption": captions} for number, captions in enumerate(lists)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert build(table, tmp_path / "out") == 0
    assert [sample["txt"] for sample in samples(tmp_path / "out")] == [b"good"] * 3
    reasons = [refusal["reason"] for refusal in refusals(tmp_path / "out")]
    assert reasons == [
        "the caption is no valid Unicode: it has half a surrogate pair",
        "no caption: caption empty",
    ]


def test_a_later_build_replaces_an_earlier_one(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(12)
    assert build(pairs, tmp_path / "out", "--samples-per-shard", "3", "--label", "kind") == 0
    assert (tmp_path / "out" / "classes.tsv").exists()
    assert build(pairs, tmp_path / "out", "--samples-per-shard", "6") == 0
    assert build(pairs, tmp_path / "fresh", "--samples-per-shard", "6") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert len(list((tmp_path / "out").glob("*.npz"))) == 2


def test_tars_of_others_are_left_alone(make_pairs, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.tar").write_bytes(b"precious")
    assert build(make_pairs(2), tmp_path / "out") == 2
    assert "which no build wrote; name another folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "000000.tar").read_bytes() == b"precious"


def test_a_killed_build_leaves_whole_shards_and_is_finished_by_the_next(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(60, side=300)
    options = ["--samples-per-shard", "2", "--format", "webp", "--quality", "100"]
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data_tools", "build", str(pairs), "--image", "path", "--output", str(output)]
    process = subprocess.Popen(
        [*command, *options, "--workers", "2"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while len(list(output.glob("*.tar"))) < 3:
        with pytest.raises(subprocess.TimeoutExpired):  # it must not end by itself before it is killed
            process.wait(timeout=0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)  # its workers hold the pipes: this returns when they have ended too
    assert process.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    done = {tar.name: tar.stat().st_mtime_ns for tar in output.glob("*.tar")}
    assert 3 <= len(done) < 30
    for name in done:
        assert index_tar(output / name).problems == []
    assert build(pairs, output, *options) == 0
    assert build(pairs, tmp_path / "whole", *options) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert len(list(output.glob("*.tar"))) == 30
    assert {name: (output / name).stat().st_mtime_ns for name in done} == done  # they were not made again


def test_shards_of_a_killed_build_with_other_images_are_not_kept(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(4)
    output = tmp_path / "out"
    assert build(pairs, output, "--samples-per-shard", "2") == 0
    (output / "manifest.json").unlink()
    journal = {"made_by": "mmpretrain data_tools", "plan": "other", "files": ["000000.tar", "000001.tar"]}
    (output / "building.json").write_text(json.dumps(journal))
    (output / "refused.jsonl").unlink()
    Image.new("RGB", (8, 8), "red").save(pairs.parent / "0.png")
    assert build(pairs, output, "--samples-per-shard", "2") == 0
    assert build(pairs, tmp_path / "fresh", "--samples-per-shard", "2") == 0
    assert contents(output) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "pth"], "--image 'pth': no such column; did you mean 'path'? the columns are path, caption, kind"),
        (["--caption", "caption,tag"], "--caption 'tag': no such column"),
        (["--label", "knid"], "--label 'knid': no such column; did you mean 'kind'?"),
        (["--classes", "none.txt"], "--classes 'none.txt': expected --label COLUMN beside it"),
        (["--label", "kind", "--classes", "none.txt"], "--classes 'none.txt': no such file"),
        (["--image-root", "none"], "--image-root 'none': no such folder"),
        (["--format", "gif"], "--format 'gif': expected one of jpg, png, webp"),
        (["--background", "green"], "--background 'green': expected R,G,B"),
        (["--samples-per-shard", "0"], "--samples-per-shard '0': Invalid value"),
        (["--caption", "empty"], "every row is refused, the first because: no caption: empty empty"),
        (["--caption", ","], "--caption ',': expected"),
        (["--imagesize", "3"], "No such option"),
        (["--output", __file__], "test_build.py': is a file; expected a folder"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    make_pairs, tmp_path: Path, capsys, options: list[str], message: str
) -> None:
    pairs = make_pairs(3, empty=[""] * 3) if "empty" in options else make_pairs(3)
    assert build(pairs, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("name", ["emoji", "grocery"])
def test_real_tables_are_read_whole(shared_data: Path, name: str) -> None:
    lines = {split: (shared_data / name / f"{split}.tsv").read_bytes().count(b"\n") - 1 for split in ("train", "val")}
    for split, count in lines.items():
        table = read_pairs(shared_data / name / f"{split}.tsv")
        assert len(table.rows) == count and table.refused == []
        assert all(row["caption"] for row in table.rows)


def test_real_emoji(shared_data: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "few.tsv"
    lines = (shared_data / "emoji" / "val.tsv").read_text().splitlines()[:21]
    pairs.write_text("\n".join(lines).replace("\timages/", f"\t{shared_data}/emoji/images/"))
    columns = ["--image", "filepath", "--caption", "caption,tags", "--image-root", str(shared_data / "emoji")]
    assert build(pairs, tmp_path / "out", *columns) == 0
    found = samples(tmp_path / "out")
    rows = {row["key"]: row for row in read_pairs(pairs).rows}
    assert len(found) == 20 and refusals(tmp_path / "out") == []
    for sample in found:
        row = rows[sample["__key__"]]
        assert sample["txt"].decode() == ", ".join(part for part in (row["caption"], row["tags"]) if part)
        (tmp_path / "image.png").write_bytes(sample["png"])
        with Image.open(tmp_path / "image.png") as image:
            assert image.mode == "RGB" and image.size == (128, 128) and image.getpixel((0, 0)) == (255, 255, 255)


def class_folders(root: Path) -> Path:
    """Two class folders with two pictures each, one of them in a folder below."""
    for i, name in enumerate(("red_fox/0", "red_fox/deep/1", "elk/2", "elk/3")):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(path)
    return root


def test_class_folders_give_labels_classes_and_captions_by_a_template(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "animals")
    arguments = ["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--template", "a photo of a {}"]) == 0
    found = sorted((sample["cls"], sample["txt"]) for sample in samples(tmp_path / "out"))
    assert found == [(b"0", b"a photo of a elk")] * 2 + [(b"1", b"a photo of a red fox")] * 2
    lines = (tmp_path / "out" / "classes.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == ["elk", "red_fox"]


def test_class_folders_may_be_links_and_hidden_ones_are_no_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "animals")
    (folder / "elk").rename(tmp_path / "elsewhere")
    (folder / "elk").symlink_to(tmp_path / "elsewhere")
    (folder / "red_fox" / "back").symlink_to(folder)  # a loop
    for hidden in (".thumbs", "red_fox/.ipynb_checkpoints"):
        shutil.copytree(folder / "red_fox" / "deep", folder / hidden)
    arguments = ["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--template", "a {}"]) == 0
    assert sorted(sample["txt"] for sample in samples(tmp_path / "out")) == [b"a elk"] * 2 + [b"a red fox"] * 2


def test_class_folders_with_numbers_as_names_are_as_many_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "years")
    (folder / "elk").rename(folder / "2021")
    (folder / "red_fox").rename(folder / "700")
    arguments = ["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--template", "in {}"]) == 0
    rows = read_pairs(tmp_path / "out" / "classes.tsv").rows
    assert [(row["index"], row["label"], row["count"]) for row in rows] == [("0", "700", "2"), ("1", "2021", "2")]


def test_files_beside_class_folders_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = class_folders(tmp_path / "animals")
    (folder / "README.txt").write_text("about")
    (folder / "elk" / "notes.txt").write_text("about elks")
    shutil.copy(folder / "elk" / "2.png", folder / "cover.png")
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    arguments = ["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    assert "images in class folders, without captions; expected --template" in capsys.readouterr().err
    assert main([*arguments, "--template", "a {}"]) == 0
    assert len(samples(tmp_path / "out")) == 4
    told = "beside the class folders; expected images inside them"
    assert [refusal["reason"] for refusal in refusals(tmp_path / "out")] == [
        f"{name}: {told}" for name in ("README.txt", "cover.png", "lost")
    ]


def test_a_template_for_images_with_captions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = class_folders(tmp_path / "animals")
    (folder / "elk" / "2.txt").write_text("an elk")
    arguments = ["build", str(folder), "--output", str(tmp_path / "out"), "--template", "a {}"]
    assert main(arguments) == 2
    told = "--template 'a {}': expected class folders of images without captions, but elk/2.png has a .txt beside it"
    assert told in capsys.readouterr().err


def test_a_template_makes_captions_of_a_tables_labels(make_pairs, tmp_path: Path, capsys) -> None:
    pairs = make_pairs(4)
    arguments = ["build", str(pairs), "--image", "path", "--label", "kind", "--template", "a {}", "--workers", "1"]
    made = {b"a ant", b"a cat", b"a dog"}
    assert main([*arguments, "--output", str(tmp_path / "out"), "--caption", "made"]) == 0
    assert {sample["txt"] for sample in samples(tmp_path / "out")} == made
    assert main([*arguments, "--output", str(tmp_path / "replaced")]) == 0
    assert {sample["txt"] for sample in samples(tmp_path / "replaced")} == made
    assert main([*arguments, "--output", str(tmp_path / "both"), "--caption", "caption"]) == 2
    assert "expected no captions beside it, but --caption names 'caption'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "images in class folders, without captions; expected --template 'a photo of a {}'"),
        (("--template", "a photo"), "--template 'a photo': expected a sentence with {} for the label"),
        (("--template", "a {}", "--caption", "label"), "expected no captions beside it, but --caption names 'label'"),
    ],
)
def test_templates_that_cannot_be_used_are_told(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folders(tmp_path / "animals")
    assert main(["build", str(folder), "--output", str(tmp_path / "out"), "--workers", "1", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_template_needs_labels(make_pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(make_pairs(2), tmp_path / "out", "--template", "a {}", "--caption", "made") == 2
    assert "--template 'a {}': expected --label COLUMN beside it" in capsys.readouterr().err
