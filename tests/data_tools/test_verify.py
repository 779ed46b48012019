"""The command `verify`: reasons, problems of whole tars, exit codes and continuation."""

import fcntl
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.__main__ import main
from mmpretrain.data.tar_index import index_tar
from tests.servers import RangeHandler, http_server
from tests.tars import encode, make_samples, pairs, write_members, write_tar, write_tars

REPOSITORY = Path(__file__).resolve().parents[2]
JPEG = encode(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def verified(output: Path, *arguments: object) -> int:
    return main(["verify", *map(str, arguments), "--output", str(output), "--workers", "1"])


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def bad(output: Path) -> dict[str, str]:
    """Reason of each bad sample by key."""
    return {row["key"]: row["reason"] for row in lines(output) if "reason" in row}


def test_good_tars_are_counted_and_listed_with_their_digests(tmp_path: Path, capsys) -> None:
    paths = write_tars(tmp_path, make_samples(5), [3, 2])
    output = tmp_path / "verify.jsonl"
    assert verified(output, tmp_path) == 0
    assert capsys.readouterr().out == "5 samples in 2 tars: 0 bad\n"
    rows = lines(output)
    assert [(row["shard"], row["num_samples"], row["num_bad"]) for row in rows] == [(paths[0], 3, 0), (paths[1], 2, 0)]
    assert all(len(row["digest"]) == 64 for row in rows)


def test_each_bad_sample_has_its_reason(tmp_path: Path, capsys) -> None:
    samples: list[dict[str, Any]] = [{"jpg": JPEG, "txt": "a caption"} for _ in range(8)]
    samples[1]["jpg"] = JPEG[: len(JPEG) // 2]
    samples[2]["jpg"] = JPEG[: len(JPEG) // 3]
    samples[3]["jpg"] = b"This is a text, whatever its name says."
    samples[4]["txt"] = " \u200b\n"
    samples[5]["txt"] = b"\xff"
    del samples[6]["txt"], samples[7]["jpg"]
    path = write_tar(tmp_path / "0.tar", samples)
    output = tmp_path / "verify.jsonl"
    assert verified(output, path) == 1
    reasons = bad(output)
    assert sorted(reasons) == [f"{i:06d}" for i in range(1, 8)]
    for key, reason in {
        "000001": "the JPEG is damaged",
        "000003": "no readable image",
        "000004": "its caption field 'txt' is empty",
        "000005": "its txt member is not UTF-8",
        "000006": "it has no member txt",
        "000007": "it has no member jpg",
    }.items():
        assert reason in reasons[key]
    codes = {row["key"]: row["code"] for row in lines(output) if "code" in row}
    assert [codes[f"{i:06d}"] for i in (1, 3, 4, 5, 6)] == [
        "image_damaged",
        "image_format",
        "caption_empty",
        "caption_encoding",
        "member_missing",
    ]
    assert lines(output)[-1]["num_bad"] == 7
    out = capsys.readouterr().out
    assert "8 samples in 1 tars: 7 bad" in out
    row = next(line for line in out.splitlines() if "the JPEG is damaged" in line)
    assert f"{path}: 000001" in row and row.split()[-2] == "2"  # numbers in a reason make no rows of their own
    assert "1 samples without a caption" in out and "1 samples without an image" in out


def test_reasons_are_counted_apart_from_their_numbers_the_most_frequent_first(tmp_path: Path, capsys) -> None:
    texts = [" ", b"\xff", b"a\xff", b"ab\xff"]
    path = write_tar(tmp_path / "0.tar", [{"jpg": JPEG, "txt": text} for text in texts])
    assert verified(tmp_path / "verify.jsonl", path) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if f"{path}: " in line]
    assert [row.split()[-2] for row in rows] == ["3", "1"]
    assert "invalid start byte at byte 0" in rows[0] and "000001" in rows[0]


def test_images_that_need_more_memory_than_allowed_are_bad(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(1))
    assert verified(tmp_path / "a.jsonl", path, "--max-image-bytes", 100) == 1
    assert "more than the limit" in bad(tmp_path / "a.jsonl")["000000"]


def test_captions_are_read_from_the_given_field(tmp_path: Path) -> None:
    samples = make_samples(3)
    samples[1]["json"] = {"caption": ["", None]}
    path = write_tar(tmp_path / "0.tar", samples)
    output = tmp_path / "verify.jsonl"
    assert verified(output, path, "--caption", "json.caption") == 1
    assert list(bad(output)) == ["000001"]
    assert verified(output, path) == 0  # the block of another field does not count


def test_texts_alone_need_no_images(tmp_path: Path, capsys) -> None:
    texts = write_tar(tmp_path / "texts.tar", [{"txt": "a text"}] * 3)
    assert verified(tmp_path / "a.jsonl", texts) == 0
    images = write_tar(tmp_path / "pairs.tar", make_samples(1))
    assert verified(tmp_path / "b.jsonl", texts, images) == 1
    assert bad(tmp_path / "b.jsonl") == {}
    assert "none of its 3 samples has an image, but other tars have" in capsys.readouterr().out


def test_members_under_other_names_are_one_problem_of_the_tar(tmp_path: Path, capsys) -> None:
    path = write_members(
        tmp_path / "0.tar", [("a.0.jpg", JPEG), ("a.json", b"{}"), ("b.0.jpg", JPEG), ("b.json", b"{}")]
    )
    assert verified(tmp_path / "a.jsonl", path) == 1
    out = capsys.readouterr().out
    assert "none of the 2 samples has a member jpg, jpeg, png, webp, but: 0.jpg, json" in out
    assert "none of the 2 samples has a member txt, but: 0.jpg, json; name the field: --caption" in out
    assert bad(tmp_path / "a.jsonl") == {}


def test_compressed_members_are_read(tmp_path: Path) -> None:
    text, image = gzip.compress(b"a caption"), gzip.compress(JPEG)
    damaged = {"b": text[:-3], "c": text + b"junk", "d": b"no gzip", "e": gzip.compress(bytes(17 << 20))}
    texts = [(f"{key}.txt.gz", content) for key, content in {"a": text, **damaged}.items()]
    assert verified(tmp_path / "texts.jsonl", write_members(tmp_path / "texts.tar", texts)) == 1
    assert sorted(bad(tmp_path / "texts.jsonl")) == ["b", "c", "d", "e"]
    images = [("a.jpg.gz", image), ("a.txt", b"a"), ("b.jpg.gz", image[:-20]), ("b.txt", b"b")]
    assert verified(tmp_path / "images.jsonl", write_members(tmp_path / "images.tar", images)) == 1
    assert list(bad(tmp_path / "images.jsonl")) == ["b"]


def test_damaged_tars_are_problems_and_others_are_still_read(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "good.tar", make_samples(1))
    cut = Path(write_tar(tmp_path / "cut.tar", make_samples(2)))
    content = cut.read_bytes()
    cut.write_bytes(content[: content.index(b"000001.jpg") + 600])
    (tmp_path / "zip.tar").write_bytes(b"PK" * 1000)
    write_members(tmp_path / "twice.tar", pairs(["a", "b", "a"], JPEG))
    output = tmp_path / "verify.jsonl"
    for _ in range(2):  # the second time from the output
        assert verified(output, tmp_path) == 1
        out = capsys.readouterr().out.splitlines()
        for name, problem in {
            "cut.tar": "truncated",
            "zip.tar": "expected a plain, uncompressed tar",
            "twice.tar": "1 duplicate keys",
        }.items():
            assert any(name in line and problem in line for line in out), name
        assert not any("good.tar" in line for line in out)
    assert {Path(row["shard"]).name for row in lines(output)} == {"good.tar", "cut.tar", "twice.tar"}


def test_finished_tars_are_not_read_again_unless_they_changed(tmp_path: Path, capsys) -> None:
    samples = make_samples(4)
    samples[0]["jpg"] = b"no image"
    paths = write_tars(tmp_path, samples, [2, 2])
    output = tmp_path / "verify.jsonl"
    assert verified(output, *paths) == 1
    capsys.readouterr()
    edited = output.read_bytes().replace(b"no readable image", b"kept from the file")
    output.write_bytes(edited)  # shows whether it was read again
    assert verified(output, *paths) == 1
    second = capsys.readouterr().out
    assert "4 samples in 2 tars, of which 2 were verified before: 1 bad" in second and "kept from the file" in second
    assert output.read_bytes() == edited
    write_tar(Path(paths[0]), make_samples(2))
    assert verified(output, *paths) == 0
    assert "of which 1 were verified before: 0 bad" in capsys.readouterr().out
    assert output.read_bytes().startswith(edited) and len(lines(output)) == 4


def with_large_member(path: Path) -> int:
    """Write a tar of one large PNG; return a position in it that the digest of its index does not cover."""
    image = encode(np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8), "PNG")
    write_members(path, pairs(["a"], image))
    return path.read_bytes().index(image) + 5000


def test_a_tar_damaged_after_it_was_verified_is_read_again(tmp_path: Path, capsys) -> None:
    tar, output = tmp_path / "0.tar", tmp_path / "verify.jsonl"
    position = with_large_member(tar)
    assert verified(output, tar) == 0
    before = index_tar(tar).digest
    with open(tar, "r+b") as file:
        file.seek(position)
        file.write(bytes(1000))
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))
    assert index_tar(tar).digest == before, "a part that the digest does not cover"
    capsys.readouterr()
    assert verified(output, tar) == 1
    assert list(bad(output)) == ["a"] and "verified before" not in capsys.readouterr().out


def test_lines_of_an_earlier_release_are_kept_and_its_tars_read_again(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(1))
    output = tmp_path / "verify.jsonl"
    assert verified(output, path) == 0
    (row,) = lines(output)
    del row["version"]
    output.write_text(json.dumps(row) + "\n")
    capsys.readouterr()
    assert verified(output, path) == 0
    assert capsys.readouterr().out == "1 samples in 1 tars: 0 bad\n" and len(lines(output)) == 2


def test_a_tar_that_cannot_be_read_to_its_end_is_read_again_by_the_next_run(tmp_path: Path, capsys) -> None:
    paths = [Path(path) for path in write_tars(tmp_path, make_samples(4), [2, 2])]
    output = tmp_path / "verify.jsonl"
    assert main(["index", str(tmp_path)]) == 0
    whole, stat = paths[0].read_bytes(), paths[0].stat()
    paths[0].write_bytes(whole.replace(b"000001.jpg", b"00000x.jpg"))  # the index says otherwise
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    capsys.readouterr()
    assert verified(output, tmp_path) == 1
    assert "not read to its end" in capsys.readouterr().out
    assert [row["shard"] for row in lines(output)] == [str(paths[1])]
    paths[0].write_bytes(whole)
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert verified(output, tmp_path) == 0
    assert "4 samples in 2 tars, of which 1 were verified before: 0 bad" in capsys.readouterr().out


def test_a_tar_named_twice_is_read_once(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(2))
    assert verified(tmp_path / "verify.jsonl", tmp_path, path) == 0
    assert capsys.readouterr().out == "2 samples in 1 tars: 0 bad\n"


def test_the_table_of_reasons_has_a_limit(tmp_path: Path, capsys) -> None:
    fields = ["".join(chr(97 + number // 26**place % 26) for place in range(3)) for number in range(1010)]
    path = write_tar(tmp_path / "0.tar", [{"json": {field: 1}} for field in fields])
    assert verified(tmp_path / "verify.jsonl", path, "--caption", "json.caption") == 1
    out = capsys.readouterr().out
    assert out.count("its json has no field") == 1000
    row = next(line for line in out.splitlines() if "other reasons" in line)
    assert row.split()[-2] == "10" and len(bad(tmp_path / "verify.jsonl")) == 1010


@pytest.mark.parametrize("kept_bytes", [1, 60, -1, -40])
def test_what_a_kill_cut_off_is_dropped(tmp_path: Path, kept_bytes: int) -> None:
    samples = make_samples(4)
    samples[2]["jpg"] = samples[3]["jpg"] = b"no image"
    paths = write_tars(tmp_path, samples, [2, 2])
    output = tmp_path / "verify.jsonl"
    assert verified(output, *paths) == 1
    whole = output.read_bytes()
    first = whole.index(b"\n") + 1
    output.write_bytes(whole[: first + kept_bytes] if kept_bytes > 0 else whole[:kept_bytes])
    assert verified(output, *paths) == 1
    assert output.read_bytes() == whole


def test_a_killed_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    samples = make_samples(4)
    samples[1]["jpg"] = samples[2]["jpg"] = b"no image"
    write_tars(tmp_path / "data", samples, [2, 2])
    assert main(["index", str(tmp_path / "data")]) == 0
    second_is_read, is_killed = threading.Event(), threading.Event()

    def hold_second(handler: RangeHandler, path: str, earlier: int) -> bool:
        if path == "001.tar":
            second_is_read.set()
            is_killed.wait()
        return False

    with http_server(tmp_path / "data") as server:
        url, output, whole = f"{server.url}/{{000..001}}.tar", tmp_path / "verify.jsonl", tmp_path / "whole.jsonl"
        server.fault = hold_second
        command = [sys.executable, "-m", "data_tools", "verify", url, "--output", str(output), "--workers", "1"]
        with subprocess.Popen(command, cwd=REPOSITORY) as process:
            assert second_is_read.wait(60)
            process.kill()
            is_killed.set()
        assert list(bad(output)) == ["000001"]
        capsys.readouterr()
        assert verified(output, url) == 1
        assert "4 samples in 2 tars, of which 1 were verified before: 2 bad" in capsys.readouterr().out
        assert verified(whole, url) == 1
        assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"shard": "a"}\n', b'{"key": "a"}\n', b"PK\0\0" * 100]
)
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, capsys, content: bytes) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(1))
    output = tmp_path / "notes.jsonl"
    output.write_bytes(content)
    assert verified(output, path) == 2
    assert "the line at byte 0 is not of verify; name a new file" in capsys.readouterr().err
    assert output.read_bytes() == content


def test_two_commands_do_not_write_to_one_file(tmp_path: Path, capsys) -> None:
    write_tars(tmp_path, make_samples(2), [2])
    output = tmp_path / "verify.jsonl"
    with open(output, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert verified(output, tmp_path) == 2
    assert "another verify is writing to it; wait for it, or name another file" in capsys.readouterr().err
    assert verified(output, tmp_path) == 0


def test_a_malformed_caption_field_is_refused(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(1))
    assert verified(tmp_path / "a.jsonl", path, "--caption", "json") == 2
    assert "--caption is 'json'; expected a member such as txt" in capsys.readouterr().err


def test_several_processes_write_what_one_does(tmp_path: Path) -> None:
    samples = make_samples(6)
    samples[3]["jpg"] = b"no image"
    write_tars(tmp_path, samples, [2, 2, 2])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert verified(one, tmp_path) == 1
    assert main(["verify", str(tmp_path), "--output", str(two), "--workers", "2"]) == 1
    assert one.read_bytes() == two.read_bytes()


def test_remote_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    samples = make_samples(4)
    samples[3]["jpg"] = b"no image"
    write_tars(tmp_path / "data", samples, [2, 2])
    assert main(["index", str(tmp_path / "data")]) == 0
    with http_server(tmp_path / "data") as server:
        output = tmp_path / "verify.jsonl"
        assert verified(output, f"{server.url}/{{000..001}}.tar") == 1
        assert list(bad(output)) == ["000003"]
        capsys.readouterr()
        assert verified(output, f"{server.url}/{{000..001}}.tar") == 1
        assert "of which 2 were verified before" in capsys.readouterr().out
        os.utime(tmp_path / "data" / "000.tar", ns=(0, 1))  # the server's ETag
        assert verified(output, f"{server.url}/{{000..001}}.tar") == 1
        assert "of which 1 were verified before" in capsys.readouterr().out


def test_a_remote_tar_damaged_after_it_was_verified_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    tar, output = tmp_path / "data" / "0.tar", tmp_path / "verify.jsonl"
    position = with_large_member(tar)
    assert main(["index", str(tar)]) == 0
    with http_server(tmp_path / "data") as server:
        assert verified(output, f"{server.url}/0.tar") == 0
        with open(tar, "r+b") as file:
            file.seek(position)
            file.write(bytes(1000))
        os.utime(tar, ns=(0, 1))  # the server's ETag
        assert verified(output, f"{server.url}/0.tar") == 1
    assert list(bad(output)) == ["a"]
