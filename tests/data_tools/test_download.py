"""`download`: img2dataset as a program of its own, from a server on this machine."""

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.__main__ import main
from mmpretrain.data.shards import Shards, expand_shards
from tests.servers import http_server
from tests.tars import make_samples, pairs, write_members, write_tar

PROGRAM = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")


@pytest.fixture
def urls(make_pairs, tmp_path: Path) -> Iterator[Path]:
    """A table of 8 images on a local server, of which the last one is missing."""
    folder = make_pairs(8).parent
    (folder / "7.png").unlink()
    with http_server(folder) as server:
        lines = [f"{server.url}/{i}.png\tcaption {i}\tkind {i}\n" for i in range(8)]
        (tmp_path / "urls.tsv").write_text("url\tcaption\tkind\n" + "".join(lines))
        yield tmp_path / "urls.tsv"


def download(urls: Path, output: Path, program: str, *options: str) -> int:
    arguments = ["download", str(urls), "--output", str(output), "--img2dataset", program, "--workers", "1"]
    return main([*arguments, *options])


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no img2dataset on PATH, nor named by IMG2DATASET")
def test_images_are_downloaded_and_a_second_call_keeps_them(
    urls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for _ in range(2):
        assert (
            download(urls, output, str(PROGRAM), "--columns", "kind", "--samples-per-shard", "4", "--", "--retries=1")
            == 0
        )
        printed = capsys.readouterr().out
        assert "7 of 8 images in 2 shards" in printed and "HTTP Error 404" in printed
    shards = Shards(expand_shards(str(output)))
    assert sorted(shards.counts.tolist()) == [3, 4] and shards.problems == []
    kinds = {json.loads(shards.read(i, ("json",)))["kind"] for i in range(7)}
    assert kinds == {f"kind {i}" for i in range(7)}
    table = pyarrow.parquet.read_table(output / "00001.parquet").to_pydict()
    assert table["status"].count("failed_to_download") == 1 and "caption 4" in table["caption"]
    assert json.loads((output / "00001_stats.json").read_text())["successes"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--url", "ulr"), "--url 'ulr': no such column; did you mean 'url'? the columns are url, caption, kind"),
        (("--caption", "text"), "--caption 'text': no such column"),
        (("--columns", "kind,tags"), "--columns 'tags': no such column"),
        (("--image-size", "0"), "--image-size '0': Invalid value"),
    ],
)
def test_wrong_use_is_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "urls.tsv").write_text("url\tcaption\tkind\nhttp://127.0.0.1:9/a.png\ta\tb\n")
    assert download(tmp_path / "urls.tsv", tmp_path / "out", "true", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_columns_of_each_kind_of_table_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"URL": ["a"], "TEXT": ["b"]}), tmp_path / "0.parquet")
    (tmp_path / "1.jsonl").write_text('{"URL": "a", "TEXT": "b"}\n')
    (tmp_path / "2.csv").write_text('"URL",TEXT\na,b\n')
    for urls in (tmp_path / "0.parquet", tmp_path, tmp_path / "1.jsonl", tmp_path / "2.csv"):
        assert download(urls, tmp_path / "out", "true") == 2
        assert "--url 'url': no such column; " in (error := capsys.readouterr().err)
        assert error.endswith("the columns are URL, TEXT\n")
    for urls, message in (
        ("none.tsv", "no such file"),
        ("3.json", "unknown kind '.json'"),
        ("4.parquet", "not a readable"),
    ):
        if urls != "none.tsv":
            (tmp_path / urls).write_text("[]")
        assert download(tmp_path / urls, tmp_path / "out", "true") == 2
        assert message in capsys.readouterr().err


def test_without_img2dataset_one_line_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "urls.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.png\ta\n")
    assert download(tmp_path / "urls.tsv", tmp_path / "out", "no-img2dataset") == 2
    error = capsys.readouterr().err
    assert "--img2dataset 'no-img2dataset': no such program" in error and "pipx install img2dataset" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_failure_of_the_program_or_of_every_image_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "urls.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.png\ta\n")
    assert download(tmp_path / "urls.tsv", tmp_path / "out", "false") == 2
    assert "img2dataset failed with exit code 1" in capsys.readouterr().err
    stats = {"count": 1, "successes": 0, "status_dict": {"Connection refused": 1}}
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(stats)}' > {tmp_path}/out/00000_stats.json\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert download(tmp_path / "urls.tsv", tmp_path / "out", str(program)) == 2
    assert "none of 1 images arrived, most often because: Connection refused" in capsys.readouterr().err


def test_a_folder_of_another_build_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "urls.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.png\ta\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert download(tmp_path / "urls.tsv", tmp_path / "out", "true") == 2
    assert "holds manifest.json, not from a download; name another folder" in capsys.readouterr().err


def fake_program(path: Path, *commands: str) -> str:
    """A program in img2dataset's place that runs shell commands."""
    path.write_text("\n".join(["#!/bin/sh", *commands, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A table, and a folder `out` with a finished shard and its statistics."""
    (tmp_path / "urls.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.png\ta\n")
    (tmp_path / "out").mkdir()
    write_tar(tmp_path / "out" / "00000.tar", make_samples(2))
    (tmp_path / "out" / "00000_stats.json").write_text(json.dumps({"count": 2, "status_dict": {"success": 2}}))
    return tmp_path / "urls.tsv"


def test_problems_of_tars_give_exit_code_1(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert download(finished, output, "true") == 0
    write_members(output / "00000.tar", pairs(["a", "a"]) + pairs(["b", "a"]))
    assert download(finished, output, "true") == 1
    assert "1 duplicate keys" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["true", "false"])
def test_the_shards_are_listed_again_whatever_happens(finished: Path, tmp_path: Path, program: str) -> None:
    (tmp_path / "out" / "shards.json").write_text("{}")
    assert download(finished, tmp_path / "out", program) == (0 if program == "true" else 2)
    (row,) = json.loads((tmp_path / "out" / "shards.json").read_text())["shards"]
    assert (row["name"], row["num_samples"]) == ("00000.tar", 2)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"count": 1}', '{"count": 1, "status_dict": {"success": "1"}}'])
def test_statistics_that_cannot_be_read_are_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    stats = tmp_path / "out" / "00001_stats.json"
    for program in ("true", fake_program(tmp_path / "program", f"echo '{content}' > {stats}")):
        stats.write_text(content)
        assert download(finished, tmp_path / "out", program) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{stats}: expected statistics of img2dataset" in line and "remove it, and the same" in line
        stats.unlink()
    assert download(finished, tmp_path / "out", program) == 2, "written by the program itself"
    assert f"{stats}: expected statistics of img2dataset" in capsys.readouterr().err


def test_two_downloads_do_not_write_to_one_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = "import sys; from data_tools.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = f"download {finished} --output {tmp_path / 'out'} --img2dataset true --workers 1"
    program = fake_program(
        tmp_path / "program",
        f"{sys.executable} -c '{again}' {arguments} 2> {tmp_path}/second",
        f"echo $? >> {tmp_path}/second",
    )
    assert download(finished, tmp_path / "out", program) == 0
    message, code = (tmp_path / "second").read_text().splitlines()
    assert "another command is writing there; wait for it, or name another folder" in message and code == "2"
