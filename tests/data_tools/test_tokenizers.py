"""Training a tokenizer, and training with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mmpretrain
from data_tools.__main__ import main
from data_tools.tokenizers import SPECIAL_TOKENS, read_texts, train_tokenizer, usable_texts
from mmpretrain.data.tokenizer import FileTokenizer, HuggingFaceTokenizer, tokenizer_of
from tests import runs
from tests.tars import make_samples, write_tars
from tests.tokenizers import hugging_face_tokenizer

TEXTS = ["a red circle above a blue square", "two green stars", "a big yellow ring", "ein großer Kreis 🙂"] * 5


def write_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    path = folder / "tokenizer.json"
    train_tokenizer(iter(TEXTS), vocab_size, lowercase=True).save(str(path))
    return path


def test_any_text_comes_back_and_ids_are_where_they_are_expected(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(str(write_tokenizer(tmp_path)), context_length=32)
    assert [tokenizer.pad_id, tokenizer.end_id, tokenizer.mask_id] == [0, 2, 3]
    assert tokenizer.vocab_size <= 300
    ids, lengths = tokenizer(["A red CIRCLE", "日本語 ✓"])
    assert tokenizer.decode(ids[0].tolist()) == "a red circle"
    assert tokenizer.decode(ids[1].tolist()) == "日本語 ✓"
    for row, length in zip(ids, lengths.tolist(), strict=True):
        assert row[0] == SPECIAL_TOKENS.index("[BOS]")
        assert row[length - 1] == SPECIAL_TOKENS.index("[EOS]")
        assert (row[length:] == 0).all()


def test_long_texts_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(path=str(write_tokenizer(tmp_path)), context_length=6)
    ids, lengths = tokenizer(["a red circle above a blue square and so on"])
    assert lengths.tolist() == [6]
    assert ids[0, 0] == 1 and ids[0, -1] == 2


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_texts_come_from_files_tables_and_tars(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.tsv").write_text("filepath\ttitle\ttags\nx.png\tthree\tfour\n")
    write_tars(tmp_path, [{**sample, "txt": f"text {i}"} for i, sample in enumerate(make_samples(3))], [3])
    assert list(read_texts(str(tmp_path / "a.txt"), "caption")) == ["one", "two"]
    assert list(read_texts(str(tmp_path / "b.tsv"), "title,tags")) == ["three, four"]
    assert list(read_texts(str(tmp_path / "000.tar"), "txt")) == ["text 0", "text 1", "text 2"]


def test_texts_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\n  two\x0b\r\n")
    rows = ['{"caption": "three"}', '{"caption": "\\ud800"}', "{"]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    assert list(read_texts(str(tmp_path / "a.txt"), "caption"))[::2] == ["one", "  two"]
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert main(["tokenizer", *files, "--output", str(tmp_path / "t.json"), "--vocab-size", "300"]) == 0
    note = "note: 3 texts are left out, the first because: not UTF-8 (invalid continuation byte)"
    assert note in capsys.readouterr().err


def test_words_without_end_are_cut_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.tokenizers.MAX_PIECE_CHARACTERS", 8)
    cut_words: list[str] = []
    texts = ["a red circle above", "x" * 20 + " y", "a  b", " " * 20]
    pieces = list(usable_texts(iter(texts), [], cut_words))
    assert pieces[:3] == ["a red", " circle", " above"] and pieces[3:6] == ["x" * 8, "x" * 8, "xxxx y"]
    assert "".join(pieces) == "".join(texts) and max(map(len, pieces)) == 8
    assert cut_words == ["x" * 20 + " y"]
    monkeypatch.undo()
    (tmp_path / "a.txt").write_text("".join(np.random.default_rng(0).choice(list("abcdefgh"), 50_000)))
    arguments = ["tokenizer", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t.json"), "--vocab-size", "300"]
    assert main(arguments) == 0
    note = "note: 1 texts are cut inside words of more than 4096 characters, the first begins"
    assert note in capsys.readouterr().err


def test_cutting_between_words_changes_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_tokenizer(iter([" ".join(TEXTS)]), 300, lowercase=True)
    monkeypatch.setattr("data_tools.tokenizers.MAX_PIECE_CHARACTERS", 20)
    pieces = list(usable_texts([" ".join(TEXTS)], [], []))
    assert len(pieces) > 5 and train_tokenizer(iter(pieces), 300, lowercase=True).to_str() == whole.to_str()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TSV", "--caption", "titel"], "--caption 'titel': no such column; did you mean 'title'?"),
        (["TXT", "--vocab-size", "10"], "--vocab-size is 10; expected at least 260"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.tsv").write_text("title\nthree\n")
    (tmp_path / "a.txt").write_text("one\n")
    named = {"TSV": str(tmp_path / "b.tsv"), "TXT": str(tmp_path / "a.txt")}
    full = ["tokenizer", *(named.get(a, a) for a in arguments), "--output", str(tmp_path / "t.json")]
    assert main(full) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_a_run_keeps_its_tokenizer(pairs: Path, tmp_path: Path) -> None:
    arguments = ["tokenizer", f"{pairs}/train", "--caption", "txt", "--vocab-size", "300"]
    assert main([*arguments, "--output", str(tmp_path / "mine.json")]) == 0
    vocab_size = FileTokenizer(str(tmp_path / "mine.json")).vocab_size
    settings = (
        f"data.root={pairs}", "schedule=constant", f"data.tokenizer.path={tmp_path}/mine.json",
        f"model.text.vocab_size={vocab_size}",
    )  # fmt: skip
    finished = runs.train(tmp_path, *settings, "trainer.duration=2steps")
    assert finished.code == 0, finished.stderr
    kept = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (tmp_path / "mine.json").read_bytes()

    (tmp_path / "mine.json").unlink()
    _, _, tokenizer = mmpretrain.load(tmp_path / "run")
    ids, lengths = tokenizer(["a red circle"])
    assert torch.equal(ids, FileTokenizer(str(kept), 16)(["a red circle"])[0]) and lengths.item() > 2

    other = json.loads(kept.read_text())
    other["normalizer"] = None
    (tmp_path / "mine.json").write_text(json.dumps(other))
    refused = runs.train(tmp_path, *settings, "trainer.duration=4steps")
    assert refused.code == 2
    assert "mine.json is not the tokenizer that" in refused.errors[0]


def test_a_run_keeps_a_folder_of_hugging_face(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = hugging_face_tokenizer(tmp_path / "siglip")
    finished = runs.train(
        tmp_path, f"data.root={pairs}", "trainer.duration=2steps", f"data.tokenizer.path={path}", "eval=[]",
        "model.text.vocab_size=400",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    expected = HuggingFaceTokenizer(str(path), 16)(["a red circle"])[0]
    shutil.rmtree(path)
    _, _, tokenizer = mmpretrain.load(tmp_path / "run")
    assert torch.equal(tokenizer(["a red circle"])[0], expected)


def test_a_tokenizer_that_makes_more_ids_than_the_model_has_is_refused(pairs: Path, tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    overrides = (f"data.tokenizer.path={path}", "model.text.vocab_size=200")
    finished = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=1steps", *overrides)
    assert finished.code == 2
    assert "model.text.vocab_size is 200; expected at least the tokenizer's" in finished.stderr
