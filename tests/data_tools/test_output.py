"""The folder of a build: what is not a build's stays as it is, and one build writes at a time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.__main__ import main
from data_tools.output import locked_output, open_output, write_atomically
from data_tools.shard_writer import write_shard

REPOSITORY = Path(__file__).resolve().parents[2]


def build(pairs: Path, output: Path, *options: str) -> int:
    arguments = ["build", str(pairs), "--image", "path", "--output", str(output), "--samples-per-shard", "2"]
    return main([*arguments, "--workers", "1", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused_and_left(pairs: Path, output: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(output)
    capsys.readouterr()
    assert build(pairs, output, "--label", "kind") == 2
    error = capsys.readouterr().err
    assert f"holds {name}, which no build wrote; name another folder" in error and error.count("\n") == 1
    assert contents(output) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("000000.tar", "precious"),
        ("other.tar", "precious"),
        ("classes.tsv", "label\tprompt\ncat\ta photo of a cat\n"),
        ("refused.jsonl", "{}\n"),
        ("manifest.json", '{"name": "a browser extension"}'),
        ("manifest.json", '{"num_samples": 3, "options": {}, "shards": [{"name": "../secret"}]}'),
        ("manifest.json", "[" * 100_000),
        ("building.json", '{"floors": 3}'),
        ("building.json", '{"made_by": "mmpretrain data_tools", "plan": "x", "files": ["../secret"]}'),
    ],
)
def test_a_file_that_no_build_wrote_is_named_and_left(
    make_pairs, tmp_path: Path, capsys, name: str, content: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    if name in ("manifest.json", "building.json"):
        (tmp_path / "out" / "000000.tar").write_text("precious")  # beside which another program's does not make it ours
    check_refused_and_left(make_pairs(4), tmp_path / "out", name, capsys)


@pytest.mark.parametrize("name", ["000077.tar", "other.tar", "classes.tsv"])
def test_a_file_that_the_earlier_build_did_not_write_is_named_and_left(
    make_pairs, tmp_path: Path, capsys, name: str
) -> None:
    pairs = make_pairs(4)
    assert build(pairs, tmp_path / "out") == 0
    (tmp_path / "out" / name).write_text("precious")
    check_refused_and_left(pairs, tmp_path / "out", name, capsys)


@pytest.mark.parametrize("name", ["000000.tar", "classes.tsv", "refused.jsonl"])
@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_that_replaced_the_earlier_builds_is_named_and_left(
    make_pairs, tmp_path: Path, capsys, name: str, same_size: bool
) -> None:
    pairs, output = make_pairs(4, some=["", "a", "b", "c"]), tmp_path / "out"
    assert build(pairs, output, "--label", "kind", "--caption", "some") == 0
    size = (output / name).stat().st_size if same_size else 100
    (output / name).write_bytes(b"x" * size)
    before = contents(output)
    capsys.readouterr()
    assert build(pairs, output, "--seed", "1") == 2
    error = capsys.readouterr().err
    assert f"{name} has changed since the build there wrote it" in error and error.count("\n") == 1
    assert contents(output) == before
    (output / name).unlink()
    assert build(pairs, output, "--seed", "1") == 0


def test_symbolic_links_are_not_written_through(make_pairs, tmp_path: Path, capsys) -> None:
    pairs, output = make_pairs(4), tmp_path / "out"
    output.mkdir()
    (tmp_path / "victim").write_text("precious")
    for name in ("000000.tar", "manifest.json", "building.json", "refused.jsonl"):
        (output / f".{name}.tmp").symlink_to(tmp_path / "victim")
    assert build(pairs, output) == 0
    (output / ".building.lock").symlink_to(tmp_path / "victim")
    assert build(pairs, output) == 2
    assert "holds .building.lock, which no build wrote" in capsys.readouterr().err
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("write", [lambda path: write_shard(path, []), lambda path: write_atomically(path, "text")])
def test_a_temporary_file_is_made_anew(tmp_path: Path, write: Callable[[Path], object]) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".000000.tar.tmp").symlink_to(tmp_path / "victim")
    write(tmp_path / "000000.tar")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "000000.tar").is_symlink()


def test_files_that_are_not_in_the_way_stay(make_pairs, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    others = {"classes.tsv": b"my prompts", "README.md": b"notes", ".draft.tmp": b"a", ".notes.json.tmp": b"b"}
    for name, content in others.items():
        (output / name).write_bytes(content)
    (output / ".000001.tar.tmp").touch()
    (output / ".000001.tar.index.npz.abc_1.tmp").touch()
    (output / ".000001.tar.index.npz.19675.140210098879360.tmp").touch()
    assert build(make_pairs(4), output) == 0
    assert build(make_pairs(4), output, "--seed", "1") == 0
    assert contents(output).items() >= others.items()
    assert sorted(path.name for path in output.glob(".*")) == [".draft.tmp", ".notes.json.tmp"]


def test_builds_of_earlier_versions_are_replaced(make_pairs, tmp_path: Path) -> None:
    pairs, output = make_pairs(8), tmp_path / "out"
    assert build(pairs, tmp_path / "fresh", "--samples-per-shard", "8") == 0
    for journal in (None, "", "0" * 64):
        assert build(pairs, output, "--label", "kind") == 0
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest.pop("made_by") == "mmpretrain data_tools"
        assert list(manifest.pop("sha256")) == ["refused.jsonl", "classes.tsv"]
        (output / "manifest.json").write_text(json.dumps(manifest))  # as they were written
        if journal is not None:
            (output / "manifest.json").unlink()
            (output / "building.json").write_text(journal)
        assert build(pairs, output, "--samples-per-shard", "8") == 0
        names = ["000000.tar", "000000.tar.index.npz", "manifest.json", "refused.jsonl"]
        assert sorted(path.name for path in output.iterdir()) == names
        assert (output / "000000.tar").read_bytes() == (tmp_path / "fresh" / "000000.tar").read_bytes()


def test_a_build_that_was_killed_while_it_cleared_the_folder_is_finished(
    make_pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, output = make_pairs(8), tmp_path / "out"
    assert build(pairs, output) == 0

    def kill(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.output.delete_shard", kill)
        with pytest.raises(KeyboardInterrupt):
            open_output(output, "other", 1, 1)
    assert not (output / "manifest.json").exists() and len(list(output.glob("*.tar"))) == 4
    assert build(pairs, output, "--samples-per-shard", "8") == 0
    assert [path.name for path in output.glob("*.tar")] == ["000000.tar"]


def test_a_folder_that_nothing_was_written_to_is_removed(make_pairs, tmp_path: Path) -> None:
    pairs = make_pairs(2, empty=["", ""])
    assert build(pairs, tmp_path / "out", "--caption", "empty") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["build", "build-text", "shapes"])
def test_a_second_build_at_the_same_time_is_refused(make_pairs, tmp_path: Path, capsys, command: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    arguments = {
        "build": [str(make_pairs(2)), "--image", "path"],
        "build-text": [str(tmp_path / "a.txt")],
        "shapes": ["--train", "1", "--val", "1", "--composition", "1"],
    }
    output = tmp_path / "out"
    with locked_output(output / "val" if command == "shapes" else output):
        assert main([command, *arguments[command], "--output", str(output), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "another command is writing there; wait for it, or name another folder" in error and error.count("\n") == 1
    assert main([command, *arguments[command], "--output", str(output), "--workers", "1"]) == 0


def test_the_lock_of_a_killed_build_goes_with_its_last_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import os, sys
from pathlib import Path
from data_tools.output import locked_output
with locked_output(Path(sys.argv[1])):
    if os.fork():
        print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with monkeypatch.context() as patch:
            patch.setattr("data_tools.output._LOCK_SECONDS", 0.0)
            with pytest.raises(ValueError, match="another command is writing there"), locked_output(tmp_path):
                pass
        process.stdin.close()  # its worker ends
        with locked_output(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_hand_made_class_list_of_shapes_is_left(tmp_path: Path, capsys) -> None:
    (tmp_path / "classes.tsv").write_text("mine")
    arguments = ["shapes", "--train", "1", "--val", "1", "--composition", "1", "--output", str(tmp_path)]
    assert main([*arguments, "--workers", "1"]) == 2
    assert "holds classes.tsv, which no build wrote; name another folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"classes.tsv": b"mine"}
