"""`build-text` as it is run: from text files to tars that a stream of texts reads."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.tokenizers import train_tokenizer
from mmpretrain.data.fields import read_captions
from mmpretrain.data.loader import build_loader
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.stream import SampleStream, Source
from mmpretrain.data.tokenizer import ClipTokenizer, Tokenizer, tokenizer_of
from mmpretrain.schedules import Clock

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["the", "a", "of", "red", "blue", "extraordinary", "circle", "squares", "and", "photosynthesis", "with"]


def build(inputs: Path | Sequence[Path], output: Path, *options: str) -> int:
    paths = [inputs] if isinstance(inputs, Path) else inputs
    return main(["build-text", *map(str, paths), "--output", str(output), "--workers", "1", *options])


def write_documents(path: Path, num: int, longest: int = 200) -> list[str]:
    """Writes documents of 1 to `longest` words to a `.txt`, blank lines between, lines inside; returns them."""
    documents = [" ".join(random.choices(WORDS, k=random.randint(1, longest))) for _ in range(num)]
    path.write_text("\n \n\n".join(document.replace(" red ", "\n  red\t") for document in documents) + "\n")
    return documents


def write_lines(path: Path, *rows: object) -> Path:
    """Rows as JSON lines; text as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def shards_of(folder: Path) -> Shards:
    return Shards(expand_shards(str(folder)))


def samples(folder: Path) -> dict[str, str]:
    """Texts by their keys, sorted as the input was."""
    shards = shards_of(folder)
    found = {shards.key(i): read_captions(shards, i, "txt")[0] for i in range(shards.num_samples)}
    assert len(found) == shards.num_samples
    return dict(sorted(found.items()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".npz")}


def refusals(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("context_length", [16, 77])
def test_a_stream_of_texts_gives_every_word_back_and_cuts_none(context_length: int, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "a.txt", 40)
    length = ["--context-length", str(context_length), "--samples-per-shard", "50"]
    assert build(tmp_path / "a.txt", tmp_path / "out", *length) == 0
    indexes = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}
    shards = shards_of(tmp_path / "out")
    assert shards.problems == [] and len(shards.paths) == len(indexes) > 1
    stream = SampleStream("texts", [Source("texts", shards)], shards.num_samples, 0, "txt", None, 16)
    tokenizer = ClipTokenizer(context_length)
    (batch,) = build_loader({"texts": stream}, tokenizer, Clock(1, 1), 0, 1)
    texts = batch.streams["texts"]
    assert batch.refused == () and texts.images is None and texts.text is not None and texts.lengths is not None
    assert sorted(texts.ids.tolist()) == list(range(shards.num_samples))  # an epoch
    assert int(texts.lengths.max()) <= context_length
    decoded = {
        shards.key(sample): tokenizer.decode(row[:length].tolist()).split()
        for sample, row, length in zip(texts.ids.tolist(), texts.text, texts.lengths.tolist(), strict=True)
    }
    words = [word for _, found in sorted(decoded.items()) for word in found]
    assert words == [word for document in documents for word in document.split()]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")} == indexes  # no new scan


def test_samples_are_full(tmp_path: Path, capsys) -> None:
    write_documents(tmp_path / "a.txt", 200, longest=12)
    assert build(tmp_path / "a.txt", tmp_path / "out") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    packed = samples(tmp_path / "out")
    num_tokens = int(ClipTokenizer(1000)(list(packed.values()))[1].sum())
    assert manifest["num_tokens"] == num_tokens and manifest["num_samples"] == len(packed)
    assert num_tokens / len(packed) > 64 and max(text.count("\n") for text in packed.values()) > 5
    assert f"200 documents in {len(packed)} samples of {num_tokens / len(packed):.1f} tokens" in capsys.readouterr().out


def test_a_tokenizer_of_ones_own_measures_the_samples(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", 20)
    train_tokenizer(iter(WORDS), 260, lowercase=False).save(str(tmp_path / "tokenizer.json"))
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--context-length", "40"]
    assert build(tmp_path / "a.txt", tmp_path / "own", *tokenizer) == 0
    own: Tokenizer = tokenizer_of(path=str(tmp_path / "tokenizer.json"), context_length=1000)
    assert 30 < int(own(list(samples(tmp_path / "own").values()))[1].max()) <= 40


@pytest.mark.parametrize(
    ("document", "texts"),
    [
        ("paragraph", {"00000-000000002-00000": "a b c", "00000-000000006-00000": "d"}),
        ("line", {"00000-000000002-00000": "a b", "00000-000000003-00000": "c", "00000-000000006-00000": "d"}),
        ("file", {"00000-000000002-00000": "a b c d"}),
    ],
)
def test_what_of_plain_text_is_a_document(document: str, texts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\na  b\r\nc\n\n \t\nd")
    assert build(tmp_path / "a.txt", tmp_path / "out", "--no-pack", "--document", document) == 0
    assert samples(tmp_path / "out") == texts


def test_files_folders_and_globs_of_all_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"content": {"text": "packed"}}\n'))
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"plain"))
    (folder / "notes.md").write_text("not read")
    write_lines(tmp_path / "z1.jsonl", {"content": {"text": "first\u2028one"}, "id": 3}, "", {"content": {"text": "x"}})
    inputs = [tmp_path / "z*.jsonl", folder]
    assert build(inputs, tmp_path / "out", "--field", "content.text", "--no-pack") == 0
    assert samples(tmp_path / "out") == {
        "00000-000000001-00000": "first one",
        "00000-000000003-00000": "x",
        "00001-000000001-00000": "plain",
        "00002-000000001-00000": "packed",
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [Path(file).name for file in manifest["files"]] == ["z1.jsonl", "a.txt.gz", "b.jsonl.gz"]
    assert build(inputs, tmp_path / "joined", "--field", "content.text") == 0
    assert list(samples(tmp_path / "joined").values()) == ["first one\nx\nplain\npacked"]


def test_refused_lines_are_counted_and_listed(tmp_path: Path, capsys) -> None:
    rows = [
        {"text": "good"},
        "{",
        {"body": "b"},
        [1],
        {"text": 3},
        {"text": " \n"},
        '{"text": "\\ud800"}',
        {"text": "é"},
    ]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    with open(path, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    assert build(path, tmp_path / "out") == 0
    assert f"7 documents refused: {tmp_path / 'out' / 'refused.jsonl'}" in capsys.readouterr().out
    assert list(samples(tmp_path / "out").values()) == ["good\né"]
    reasons = {
        2: "its json member does not parse",
        3: "its json has no field 'text' (it has: body)",
        4: "its json has no field 'text' (it has: list)",
        5: "its field 'text' is int, expected a string",
        6: "its field 'text' is empty",
        7: "half a surrogate pair",
        9: "'utf-8' codec can't decode",
    }
    refused = refusals(tmp_path / "out")
    assert [refusal["line"] for refusal in refused] == list(reasons)
    for refusal, reason in zip(refused, reasons.values(), strict=True):
        assert reason in str(refusal["reason"]) and refusal["file"] == str(path)


@pytest.mark.parametrize(
    ("document", "kept", "refused"),
    [
        ("paragraph", ["first", "last"], [(3, 4)]),
        ("line", ["first", "fine", "au lait", "last"], [(4, 4)]),
        ("file", [], [(1, 4)]),
    ],
)
def test_documents_that_are_not_utf8_are_refused_alone(
    tmp_path: Path, document: str, kept: list[str], refused: list[tuple[int, int]]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "latin.txt").write_bytes(b"first\n\nfine\ncaf\xe9\nau lait\n\nlast")
    (folder / "other.txt").write_text("other")
    assert build(folder, tmp_path / "out", "--no-pack", "--document", document) == 0
    assert list(samples(tmp_path / "out").values()) == [*kept, "other"]
    reason = "not UTF-8 (invalid continuation byte); convert it, e.g. with iconv -t utf-8"
    assert refusals(tmp_path / "out") == [
        {"file": str(folder / "latin.txt"), "line": first, "reason": f"line {line}: {reason}"}
        for first, line in refused
    ]


def test_files_that_cannot_be_read_whole_are_refused_from_there_on(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = b"".join(b'{"text": "line %d of many"}\n' % i for i in range(20_000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-9000])
    (folder / "good.txt").write_text("good")
    (folder / "plain.txt.gz").write_text("plain")
    (folder / "broken.txt").symlink_to("/proc/self/mem")
    assert build(folder, tmp_path / "out", "--no-pack") == 0
    found = [text for text in samples(tmp_path / "out").values() if text != "good"]
    assert found == [f"line {i} of many" for i in range(len(found))] and 0 < len(found) < 20_000
    refused = {Path(str(refusal["file"])).name: refusal for refusal in refusals(tmp_path / "out")}
    assert list(refused) == ["broken.txt", "cut.jsonl.gz", "plain.txt.gz"]
    assert refused["broken.txt"]["reason"] == "line 1: the file cannot be read from here on (Input/output error)"
    assert refused["cut.jsonl.gz"]["line"] == len(found) + 1
    assert "the gzip file is damaged or incomplete from here on (Compressed" in str(refused["cut.jsonl.gz"]["reason"])


def test_documents_beyond_the_limit_are_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.documents.MAX_TEXT_BYTES", 20)
    monkeypatch.setattr("data_tools.documents.MAX_JSON_BYTES", 20)
    long, many = "x" * 50, "four five\n" * 3
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(f"\ufeff{long}\n\none two\nthree\n\n{many}\nsix\n\n{long}")
    write_lines(folder / "b.jsonl", {"text": "seven"}, {"text": long}, {"text": "eight"})
    assert build(folder, tmp_path / "out", "--no-pack") == 0
    assert list(samples(tmp_path / "out").values()) == ["one two three", "six", "seven", "eight"]
    assert [(refusal["line"], refusal["reason"]) for refusal in refusals(tmp_path / "out")] == [
        (1, "line 1: 54 bytes or more, over the limit of 20"),
        (6, "line 8: 27 bytes or more, over the limit of 20"),
        (12, "line 12: 50 bytes or more, over the limit of 20"),
        (2, "63 bytes or more, over the limit of 20"),
    ]


def test_the_same_bytes_whatever_the_workers_and_another_order_for_another_seed(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", 300, longest=100)  # of two groups
    options = ["--samples-per-shard", "50"]
    assert build(tmp_path / "a.txt", tmp_path / "a", *options) == 0
    assert build(tmp_path / "a.txt", tmp_path / "b", *options, "--workers", "3") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert build(tmp_path / "a.txt", tmp_path / "c", *options, "--seed", "1") == 0
    opened = [shards_of(tmp_path / name) for name in "ac"]
    keys = [[shards.key(i) for i in range(shards.num_samples)] for shards in opened]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1]) != keys[0]
    counts = shards_of(tmp_path / "a").counts
    assert counts.max() - counts.min() <= 1 and counts.max() <= 50


def test_a_later_build_replaces_an_earlier_one(make_pairs, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", 12)
    pairs = ["build", str(make_pairs(9)), "--image", "path", "--label", "kind", "--samples-per-shard", "1"]
    assert main([*pairs, "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert build(tmp_path / "a.txt", tmp_path / "out", "--samples-per-shard", "4") == 0
    assert build(tmp_path / "a.txt", tmp_path / "out") == 0
    assert build(tmp_path / "a.txt", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert len(list((tmp_path / "out").glob("*.npz"))) == 1


def test_input_that_is_refused_leaves_an_earlier_build(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", 3)
    assert build(tmp_path / "a.txt", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert build(write_lines(tmp_path / "a.jsonl", {"body": "x"}), tmp_path / "out") == 2
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("same", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_build_is_finished_by_the_next_of_the_same_text(same: bool, tmp_path: Path) -> None:
    write_documents(tmp_path / "a.txt", 120, longest=4)
    options = ["--no-pack", "--samples-per-shard", "1"]
    output = tmp_path / "out"
    command = [sys.executable, "-m", "data_tools", "build-text", str(tmp_path / "a.txt"), "--output", str(output)]
    process = subprocess.Popen(
        [*command, *options, "--workers", "1"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while len(list(output.glob("*.tar"))) < 3:
        with pytest.raises(subprocess.TimeoutExpired):  # it must not end by itself before it is killed
            process.wait(timeout=0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (output / "manifest.json").exists()
    done = {tar.name: tar.stat().st_mtime_ns for tar in output.glob("*.tar")}
    assert 3 <= len(done) < 120
    if not same:
        (tmp_path / "a.txt").write_text((tmp_path / "a.txt").read_text().replace("a", "e"))
    assert build(tmp_path / "a.txt", output, *options) == 0
    assert build(tmp_path / "a.txt", tmp_path / "whole", *options) == 0
    assert contents(output) == contents(tmp_path / "whole")  # and nothing else is left
    if same:
        assert {name: (output / name).stat().st_mtime_ns for name in done} == done  # they were not made again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.txt"], "INPUT 'none.txt': no such file; expected text files, folders of them or globs"),
        (["none*.txt"], "INPUT 'none*.txt': no file; expected some that end with .txt"),
        (["empty"], "INPUT 'empty': no file; expected some that end with .txt, .txt.gz, .jsonl, .jsonl.gz"),
        (["b.csv"], "INPUT 'b.csv': unknown kind; expected a name that ends with .txt"),
        (["./a.txt"], "INPUT 'a.txt': is named twice; name it once"),
        (["--output", "in/out", "in"], "--output 'in/out': is in 'in', which is read; name a folder elsewhere"),
        (["--output", "others"], "holds 0.tar, which no build wrote; name another folder"),
        (["--output", "b.csv"], "--output 'b.csv': is a file; expected a folder"),
        (["--document", "page"], "--document 'page': expected one of paragraph, line, file"),
        (["--context-length", "2"], "--context-length '2': Invalid value"),
        (["--samples-per-shard", "0"], "--samples-per-shard '0': Invalid value"),
        (["--tokenizer", "none.json"], "--tokenizer 'none.json': "),
        (["--tokenizer", "b.csv"], "--tokenizer 'b.csv': "),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "in", "others"):
        (tmp_path / folder).mkdir()
    for name in ("a.txt", "b.csv", "in/c.txt", "others/0.tar"):
        (tmp_path / name).write_text("text")
    assert main(["build-text", "a.txt", "--output", "out", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"body": "b"}], "the first is refused because: its json has no field 'text' (it has: body)"),
        ([], "no document in 1 files; expected at least one"),
    ],
)
def test_input_without_a_document_is_named(tmp_path: Path, capsys, rows: list[object], reason: str) -> None:
    assert build(write_lines(tmp_path / "a.jsonl", *rows), tmp_path / "out") == 2
    assert reason in capsys.readouterr().err
