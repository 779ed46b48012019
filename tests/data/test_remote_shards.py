"""Remote tars give the samples of local ones, whatever describes them, and fetch no more than they must."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.__main__ import main as data_tools
from mmpretrain.data import remote_shards, shards
from mmpretrain.data.decode import BadSample
from mmpretrain.data.open_shards import StorageOptions, open_shards
from mmpretrain.data.shards import OnMissingShard, Shards
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.stored_index import index_path, load_index
from mmpretrain.errors import Unreachable
from tests.servers import RangeHandler, RangeServer, http_server
from tests.tars import make_samples, write_tars

COUNTS = (5, 7, 4)


@pytest.fixture
def tars(tmp_path: Path) -> list[str]:
    """Three tars in a folder `data`, with indexes."""
    folder = tmp_path / "data"
    folder.mkdir()
    paths = write_tars(folder, make_samples(sum(COUNTS)), COUNTS)
    Shards(paths)
    return paths


@pytest.fixture
def server(tars: list[str], tmp_path: Path) -> Iterator[RangeServer]:
    with http_server(tmp_path / "data") as server:
        yield server


def options(tmp_path: Path, **others: object) -> StorageOptions:
    given = {"cache_dir": str(tmp_path / "cache"), "storage_seconds": 5.0, **others}
    return StorageOptions(**given)  # type: ignore[arg-type]


def urls(server: RangeServer, tars: list[str]) -> list[str]:
    return [f"{server.url}/{Path(tar).name}" for tar in tars]


def samples_of(shards: Shards) -> list[tuple[str, bytes, bytes]]:
    return [(shards.key(i), shards.read(i, ["jpg"]), shards.read(i, ["txt"])) for i in range(shards.num_samples)]


def remove_indexes(tars: list[str]) -> None:
    for tar in tars:
        index_path(tar).unlink()


def test_remote_tars_with_indexes_are_the_local_ones(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    local, remote = Shards(tars), open_shards(urls(server, tars), None, options(tmp_path))
    assert remote.is_indexed and remote.is_remote and not local.is_remote
    assert remote.fingerprint == local.fingerprint
    assert samples_of(remote) == samples_of(local)
    fetched = [path for path, _ in server.requests if path.endswith(".tar")]
    assert sorted(fetched) == sorted(Path(tar).name for tar in tars), "each range once"
    server.requests.clear()
    assert samples_of(open_shards(urls(server, tars), None, options(tmp_path))) == samples_of(local)
    assert not [path for path, _ in server.requests if path.endswith(".tar")], "the cache outlives the process"


def test_ranges_and_what_crosses_them(
    server: RangeServer, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shards, "RANGE_BYTES", 700)  # smaller than the members
    remote = open_shards(urls(server, tars), None, options(tmp_path))
    assert samples_of(remote) == samples_of(Shards(tars))


def write_counts(kind: str, tars: list[str]) -> None:
    folder = Path(tars[0]).parent
    names = [Path(tar).name for tar in tars]
    if kind == "sizes.json":
        (folder / kind).write_text(json.dumps(dict(zip(names, COUNTS, strict=True))))
    elif kind == "stats":
        for name, count in zip(names, COUNTS, strict=True):
            stats = {"count": count + 3, "successes": count, "failed_to_download": 3}
            (folder / name.replace(".tar", "_stats.json")).write_text(json.dumps(stats))
    else:
        rows = [{"name": name, "num_samples": n, "digest": "0"} for name, n in zip(names, COUNTS, strict=True)]
        (folder / kind).write_text(json.dumps({"shards": rows}))


@pytest.mark.parametrize("kind", ["sizes.json", "stats", "shards.json", "manifest.json"])
def test_tars_without_indexes_are_fetched_whole_when_they_are_needed(
    kind: str, server: RangeServer, tars: list[str], tmp_path: Path
) -> None:
    local = samples_of(Shards(tars))
    remove_indexes(tars)
    write_counts(kind, tars)
    if kind in ("shards.json", "manifest.json"):
        server.lists = True  # otherwise an index is expected where its digest is known
    remote = open_shards(urls(server, tars), None, options(tmp_path))
    assert not remote.is_indexed and remote.counts.tolist() == list(COUNTS)
    assert not [path for path, _ in server.requests if path.endswith(".tar")], "opening reads no tar"
    first = sum(COUNTS[:1])
    assert remote.read(first, ["txt"]) == local[first][2]
    assert {path for path, _ in server.requests if path.endswith(".tar")} == {Path(tars[1]).name}
    assert samples_of(remote) == local


@pytest.mark.parametrize("mark", ["ETag", "Last-Modified"])
def test_the_cache_gives_no_bytes_of_a_former_version(
    mark: str, server: RangeServer, tars: list[str], tmp_path: Path
) -> None:
    server.mark = mark
    remove_indexes(tars)
    write_counts("sizes.json", tars)
    open_shards(urls(server, tars), None, options(tmp_path)).read(0, ["txt"])
    tar = Path(tars[0])
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"sample 0", b"SAMPLE 0"))
    os.utime(tar, (0, 0))
    assert open_shards(urls(server, tars), None, options(tmp_path)).read(0, ["txt"]).startswith(b"SAMPLE 0")


def test_an_index_of_another_digest_is_not_taken_from_the_cache(
    server: RangeServer, tars: list[str], tmp_path: Path
) -> None:
    server.mark = "Last-Modified"
    tar = Path(tars[0])
    for word in (b"sample 0", b"s@mple 0"):
        tar.write_bytes(tar.read_bytes().replace(b"sample 0", word))
        index = load_index(tar)
        os.utime(index_path(tar), (0, 0))
        row = {"name": tar.name, "num_samples": COUNTS[0], "digest": index.digest}
        (tar.parent / "shards.json").write_text(json.dumps({"shards": [row]}))
        assert open_shards(urls(server, tars[:1]), None, options(tmp_path)).read(0, ["txt"]).startswith(word)


def test_without_counts_the_fix_is_told(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    remove_indexes(tars)
    told = r"number of its samples is not known; expected an index, shards\.json, .*python -m data_tools index"
    with pytest.raises(ValueError, match=told):
        open_shards(urls(server, tars), None, options(tmp_path))


@pytest.mark.parametrize("changes", [1, 9])
def test_a_tar_that_changes_while_it_is_fetched_is_never_mixed(
    changes: int, server: RangeServer, tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shards, "RANGE_BYTES", 7000)  # two ranges and more
    remove_indexes(tars)
    write_counts("sizes.json", tars)
    tar, rest = Path(tars[1]), [b"Sample", b"SAMPLE"] * changes
    assert tar.stat().st_size > 14000

    def changing(handler: RangeHandler, path: str, earlier: int) -> bool:
        if path == tar.name and handler.headers.get("Range", "").startswith("bytes=7000-") and len(rest) > changes:
            tar.write_bytes(re.sub(b"sample", rest.pop(), tar.read_bytes(), flags=re.IGNORECASE))
            os.utime(tar, (0, len(rest)))
        return False

    server.fault = changing
    remote, ids = open_shards(urls(server, tars), None, options(tmp_path)), range(COUNTS[0], sum(COUNTS[:2]))
    if changes == 1:
        assert {remote.read(i, ["txt"])[:6] for i in ids} == {b"SAMPLE"}
    else:
        with pytest.raises(FileChanged, match=rf"{tar.name} was changed or replaced while it was read; restore it"):
            remote.read(ids[0], ["txt"])


def forbid(handler: RangeHandler) -> None:
    handler.fail(403)


def show_page(handler: RangeHandler) -> None:
    page = b"<!doctype html><p>nothing here</p>"
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(b"" if handler.command == "HEAD" else page)


@pytest.mark.parametrize(
    ("answer", "told"),
    [(forbid, r"/shards\.json cannot be read \(.*403"), (show_page, r"/shards\.json is a web page$")],
)
def test_files_that_a_server_forbids_or_answers_with_a_page_count_as_missing(
    answer: Callable[[RangeHandler], None], told: str, server: RangeServer, tars: list[str], tmp_path: Path
) -> None:
    server.fault = lambda handler, path, earlier: not (server.folder / path).is_file() and (answer(handler) or True)
    given = options(tmp_path)
    assert samples_of(open_shards(urls(server, tars), None, given)) == samples_of(Shards(tars))
    remove_indexes(tars)
    with pytest.raises(ValueError, match=rf"number of its samples is not known; .*{told}"):
        open_shards(urls(server, tars), None, given)
    write_counts("sizes.json", tars)
    assert open_shards(urls(server, tars), None, given).counts.tolist() == list(COUNTS)


def test_indexes_may_lie_elsewhere(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    place = tmp_path / "indexes" / f"127.0.0.1:{server.server_port}"
    place.mkdir(parents=True)
    for tar in tars:
        shutil.move(index_path(tar), place)
    remote = open_shards(urls(server, tars), None, options(tmp_path, index_dir=str(tmp_path / "indexes")))
    assert remote.is_indexed and samples_of(remote) == samples_of(Shards(tars))


def test_local_tars_keep_their_indexes_in_index_dir(tars: list[str], tmp_path: Path) -> None:
    remove_indexes(tars)
    shards = open_shards(tars, None, options(tmp_path, index_dir=str(tmp_path / "indexes")))
    assert shards.num_samples == sum(COUNTS)
    assert all(not index_path(tar).exists() and (tmp_path / f"indexes{tar}.index.npz").exists() for tar in tars)


@pytest.mark.parametrize("has_list", [False, True])
def test_a_damaged_index_is_named_with_the_command_that_makes_it_again(
    has_list: bool, server: RangeServer, tars: list[str], tmp_path: Path
) -> None:
    index_path(tars[0]).write_bytes(index_path(tars[0]).read_bytes()[:500])
    if has_list:
        write_counts("shards.json", tars)
    url = urls(server, tars)[0]
    told = rf"^{url}\.index\.npz: unusable index \(.*\); make it again with `python -m data_tools index {url} --index"
    with pytest.raises(Unreachable, match=told) as damaged:
        open_shards(urls(server, tars), None, options(tmp_path))
    assert "/proc/" not in str(damaged.value) and "is made again" not in str(damaged.value)


def test_local_tars_have_no_indexes_at_an_address(
    tars: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=r"000\.tar: .* is an address; expected a folder of this machine: data\.index_dir"
    ):
        open_shards(tars, None, options(tmp_path, index_dir="http://127.0.0.1:9/indexes"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_and_a_glob_that_the_server_lists(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    server.lists = True
    for pattern in (server.url, f"{server.url}/", f"{server.url}/*.tar"):
        assert list(open_shards(pattern, None, options(tmp_path)).paths) == urls(server, tars)
    with pytest.raises(ValueError, match=r"no tar there; name tars, a folder that can be listed, or a glob"):
        open_shards(f"{server.url}/other-*.tar", None, options(tmp_path))


@pytest.mark.parametrize("policy", OnMissingShard)
def test_a_shard_that_stays_unreachable_ends_the_run_or_is_replaced(
    policy: OnMissingShard, server: RangeServer, tars: list[str], tmp_path: Path
) -> None:
    given = options(tmp_path, on_missing_shard=policy, storage_seconds=0.3)
    remote = open_shards(urls(server, tars), None, given)
    server.fault = lambda handler, path, earlier: path.endswith("1.tar") and (handler.fail(503) or True)
    lost, url = COUNTS[0], urls(server, tars)[1]
    with pytest.raises(BadSample if policy == OnMissingShard.replace else Unreachable, match=f"{url} cannot be read"):
        remote.read(lost, ["jpg"])
    server.requests.clear()
    if policy == OnMissingShard.replace:
        with pytest.raises(BadSample, match=url):
            remote.read(lost + 1, ["jpg"])
        assert not server.requests, "it is not waited for again"
    assert remote.read(0, ["jpg"]) == Shards(tars).read(0, ["jpg"])


@pytest.mark.parametrize("are_kept", [True, False])
@pytest.mark.parametrize("policy", OnMissingShard)
def test_a_shard_without_its_index_ends_the_run_or_is_replaced(
    policy: OnMissingShard,
    are_kept: bool,
    server: RangeServer,
    tars: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "_KEPT_SAMPLES", sum(COUNTS) if are_kept else 0)
    indexes = [(Path(tar).name, load_index(tar)) for tar in tars]
    rows = [{"name": name, "num_samples": index.num_samples, "digest": index.digest} for name, index in indexes]
    (Path(tars[0]).parent / "shards.json").write_text(json.dumps({"shards": rows}))
    local = samples_of(Shards(tars))
    index_path(tars[1]).unlink()
    lost, given = COUNTS[0], options(tmp_path, on_missing_shard=policy)
    uses = (
        lambda remote: remote.prefetch(np.array([lost]), is_urgent=True),
        lambda remote: remote.key(lost),
        lambda remote: remote.read(lost, ["jpg"]),
    )
    for use in uses:
        if policy == OnMissingShard.fail:
            with pytest.raises(
                FileNotFoundError, match=r"001\.tar\.index\.npz does not exist; .*on_missing_shard=replace"
            ):
                use(open_shards(urls(server, tars), None, given))
    if policy == OnMissingShard.replace:
        remote = open_shards(urls(server, tars), None, given)
        uses[0](remote)
        assert remote.key(lost) == "#0" and remote.read(0, ["jpg"]) == local[0][1]
        with pytest.raises(BadSample, match=r"001\.tar\.index\.npz does not exist"):
            remote.read(lost, ["jpg"])


def test_other_counts_than_announced_lose_no_run(
    server: RangeServer, tars: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remove_indexes(tars)
    announced = {Path(tar).name: count + more for tar, count, more in zip(tars, COUNTS, (2, 0, -1), strict=True)}
    (Path(tars[0]).parent / "sizes.json").write_text(json.dumps(announced))
    remote = open_shards(urls(server, tars), None, options(tmp_path))
    assert remote.num_samples == sum(COUNTS) + 1
    with pytest.raises(BadSample, match="it has no member jpg"):
        remote.read(5, ["jpg"])
    assert remote.key(5) == "#5" and "has 5 samples, but 7 were announced" in caplog.text
    assert remote.read(7, ["txt"]) == Shards(tars).read(5, ["txt"])


def test_a_tar_that_is_replaced_by_another_is_told(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    remote = open_shards(urls(server, tars), None, options(tmp_path))
    size = Path(tars[0]).stat().st_size
    other = Path(write_tars(tmp_path, make_samples(COUNTS[0], first=90), [COUNTS[0]])[0]).read_bytes()
    Path(tars[0]).write_bytes(other[:size].ljust(size, b"\0"))
    with pytest.raises(FileChanged, match="is not what its index says"):
        for i in range(COUNTS[0]):
            remote.read(i, ["jpg"])


def test_prefetched_samples_are_read_from_the_cache(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    remote = open_shards(urls(server, tars), None, options(tmp_path))
    remote.prefetch(np.array([0, 1, 6]), is_urgent=False)
    with server.answered_condition:
        assert server.answered_condition.wait_for(
            lambda: {"000.tar", "001.tar"} <= {path for path, _ in server.answered}, timeout=30
        )
    assert remote.read(6, ["jpg"]) == Shards(tars).read(6, ["jpg"])
    assert sum(path == "001.tar" for path, _ in server.requests) == 1


def test_a_listing_leads_to_no_file_outside_of_index_dir(
    server: RangeServer, tars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = b'<a href="x/../../../../outside.tar">a</a>'

    def hostile(handler: RangeHandler, path: str, earlier: int) -> bool:
        handler.send_response(200)
        content = Path(tars[0]).read_bytes() if path.endswith(".tar") else page
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(b"" if handler.command == "HEAD" else content)
        return True

    server.fault = hostile
    place = tmp_path / "a" / "indexes"
    for pattern in ("evil/**/*.tar", "evil/x/../../../../outside.tar"):
        assert data_tools(["index", f"{server.url}/{pattern}", "--index-dir", str(place), "--workers", "1"]) != 0
        assert "has a part '..'; expected an address without" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has a part '\.\.'; expected an address without"):
        index_path("s3://bucket/../../a.tar", place)
    assert not list(tmp_path.rglob("outside.*"))


def test_local_and_remote_tars_are_not_mixed(server: RangeServer, tars: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local and remote tars in one list"):
        open_shards([tars[0], urls(server, tars)[1]], None, options(tmp_path))
