"""The command line: `index`, help, and wrong use."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from webdataset import TarWriter

from data_tools.__main__ import main
from data_tools.indexing import index_tars
from mmpretrain.data.open_shards import StorageOptions, open_shards
from mmpretrain.data.stored_index import index_path, read_index
from mmpretrain.data.tar_index import index_tar
from tests.servers import http_server

REPOSITORY = Path(__file__).resolve().parents[2]


def write_tar(path: Path, keys: list[str], **members: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key in keys:
            writer.write({"__key__": key, **(members or {"jpg": b"image", "txt": b"caption"})})
    return path


def test_index_stores_indexes_and_says_how_fast(tmp_path: Path, capsys) -> None:
    tars = [write_tar(tmp_path / f"{i}.tar", ["a", "b"]) for i in range(3)]
    assert main(["index", str(tmp_path), "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "6 samples in 3 tars" in out and "samples/s" in out
    for tar in tars:
        assert read_index(index_path(tar)).keys == ["a", "b"]


def test_index_refreshes_even_what_looks_fresh(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", ["a"])
    assert main(["index", str(tar)]) == 0
    stored = index_path(tar)
    good = stored.read_bytes()
    stored.write_bytes(b"damaged")
    assert main(["index", str(tar)]) == 0
    assert stored.read_bytes() == good


def test_index_names_problems_and_exits_with_1(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "good.tar", ["a"])
    write_tar(tmp_path / "twice.tar", ["a", "b", "a"])
    write_tar(tmp_path / "gif.tar", ["a"], gif=b"image", txt=b"caption")
    write_tar(tmp_path / "text.tar", ["a"], txt=b"a text of a stream without images", json=b"{}")
    cut = write_tar(tmp_path / "cut.tar", ["a", "b"], jpg=bytes(5000), txt=b"[/caption]")
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "zip.tar").write_bytes(b"PK" * 1000)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "\udcff.tar").write_bytes(b"PK" * 1000)
    assert main(["index", str(tmp_path), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for name, problem in {
        "twice.tar": "1 duplicate keys: 'a' at byte",
        "gif.tar": "none of the 1 samples has an image",
        "cut.tar": "truncated: 'b.jpg' needs bytes",
        "zip.tar": "expected a plain, uncompressed tar",
        "empty.tar": "no sample in it",
        "pipe.tar": "expected a regular file",
        "\\udcff.tar": "expected a plain, uncompressed tar",
    }.items():
        assert any(name in line and problem in line for line in lines), name
    assert not any(name in line for line in lines for name in ("good.tar", "text.tar"))


def test_index_reads_fifty_thousand_samples_a_second(tmp_path: Path) -> None:
    """The figure is measured at 60,000 to 80,000; half of the promise is asserted, for machines share their cores."""
    one = io.BytesIO()
    with TarWriter(one, encoder=False, mtime=0) as writer:
        for number in range(4000):
            writer.write({"__key__": f"{number:09d}", "jpg": bytes(1500), "txt": b"a caption", "json": bytes(300)})
    path = tmp_path / "0.tar"
    path.write_bytes(one.getvalue())
    rates = []
    for _ in range(3):
        started = time.process_time()
        assert index_tar(path).num_samples == 4000
        rates.append(4000 / (time.process_time() - started))
    assert max(rates) > 25_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "missing.tar"], "shards 'missing.tar': no file 'missing.tar'; name existing tars"),
        (["index"], "Missing argument"),
        (["biuld"], "No such command 'biuld'"),
        (["shapes"], "Missing option '--output'"),
        (["shapes", "--output", "x", "--seed", "one"], "--seed 'one': Invalid value"),
    ],
)
def test_wrong_use_is_answered_in_one_line(capsys, arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("command", [["verify", "--output", "x.jsonl"], ["stats"]])
def test_an_index_dir_with_credentials_is_refused_without_telling_them(capsys, command: list[str]) -> None:
    assert main([*command, "http://127.0.0.1:9/0.tar", "--index-dir", "http://user:hidden@127.0.0.1:9/indexes"]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: --index-dir: the address on 127.0.0.1 holds a user or password") and "hidden" not in err
    )


@pytest.mark.parametrize("command", ["build", "build-text", "index", "download", "shapes", "verify", "stats"])
def test_help_has_examples(capsys, command: str) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"python -m data_tools {command}" in out and "Examples" in out


def test_as_a_module_without_a_terminal() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "data_tools", "index", "missing.tar"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: shards 'missing.tar'")


def test_index_lists_the_shards_of_a_folder_beside_their_indexes(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / "data" / f"{i}.tar", ["a", "b"][: i + 1]) for i in range(2)]
    assert main(["index", str(tars[0])]) == 0
    assert main(["index", str(tars[1])]) == 0  # adds to the table
    rows = json.loads((tmp_path / "data" / "shards.json").read_text())["shards"]
    assert [(row["name"], row["num_samples"]) for row in rows] == [("0.tar", 1), ("1.tar", 2)]
    for tar, row in zip(tars, rows, strict=True):
        index = read_index(index_path(tar))
        assert (row["digest"], row["tar_bytes"]) == (index.digest, index.tar_bytes)


def test_indexers_of_one_folder_lose_no_row(tmp_path: Path) -> None:
    tars = [str(write_tar(tmp_path / "data" / f"{i:02d}.tar", ["a"])) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda tar: index_tars([tar], workers=1), tars))
    rows = json.loads((tmp_path / "data" / "shards.json").read_text())["shards"]
    assert [row["name"] for row in rows] == [Path(tar).name for tar in tars]
    assert not list((tmp_path / "data").glob(".*"))


@pytest.mark.parametrize("content", ['{"a": 1}', '{"shards": [{"url": "0.tar", "nsamples": 1}]}', '{"shards": [1]}'])
def test_a_shards_json_of_something_else_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    tar = write_tar(tmp_path / "data" / "0.tar", ["a"])
    (tmp_path / "data" / "shards.json").write_text(content)
    assert main(["index", str(tar)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "shards.json: expected a list `shards` of name, num_samples and digest, as index writes; move it away" in line
    )
    assert (tmp_path / "data" / "shards.json").read_text() == content


def test_index_of_remote_tars_goes_to_a_folder_that_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "data" / "0.tar", ["a", "b"])
    with http_server(tmp_path / "data") as server:
        url = f"{server.url}/{{0..0}}.tar"
        assert main(["index", url]) == 2
        assert "--index-dir is not given; expected a local folder" in capsys.readouterr().err
        assert main(["index", url, "--index-dir", str(tmp_path / "indexes")]) == 0
        options = StorageOptions(index_dir=str(tmp_path / "indexes"))
        shards = open_shards(url, None, options)
        assert shards.is_indexed and shards.key(1) == "b"
    assert not (tmp_path / "data" / "0.tar.index.npz").exists()
