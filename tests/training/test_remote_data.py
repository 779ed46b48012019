"""Training on remote shards: the samples and weights of local ones, whatever the server does."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from webdataset import TarWriter

from data_tools.__main__ import main as data_tools
from tests import runs
from tests.servers import RangeHandler, RangeServer, http_server, s3_server

SETTINGS = ("trainer.duration=30steps", "data.workers=2", "data.storage_seconds=60")
TARS = ("data.train.pairs.shards=train/{000000..000001}.tar", "data.val.val.shards=val/000000.tar")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.root` with indexes and lists of shards."""
    root = runs.write_pairs(tmp_path_factory.mktemp("indexed"))
    assert data_tools(["index", str(root / "train"), str(root / "val"), "--workers", "1"]) == 0
    return root


@pytest.fixture(scope="module")
def local(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("local")
    runs.trained(folder, indexed, *SETTINGS)
    return runs.exact_outcome(folder / "run")


@pytest.fixture
def server(indexed: Path) -> Iterator[RangeServer]:
    with http_server(indexed) as server:
        yield server


def trained(folder: Path, root: str, *overrides: str, environment: dict[str, str] | None = None) -> dict[str, object]:
    cache = f"data.cache_dir={folder / 'cache'}"
    given = (*SETTINGS, f"data.root={root}", cache, *overrides)
    finished = runs.train(folder, *given, environment=environment)
    assert finished.code == 0, finished.stderr
    return runs.exact_outcome(folder / "run")


def faulty(handler: RangeHandler, path: str, earlier: int) -> bool:
    """Fail two of three requests of a file, each in another way."""
    kinds = (lambda: handler.fail(500), handler.drop, lambda: handler.fail(503), handler.truncate)
    if path.endswith((".tar", ".npz", ".json")) and earlier % 3 < 2:
        kinds[(earlier + earlier // 3) % 4]()
        return True
    return False


@pytest.mark.parametrize("is_faulty", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_over_http_is_the_local_one_bit_for_bit(
    is_faulty: bool, local: dict[str, object], server: RangeServer, tmp_path: Path
) -> None:
    server.fault = faulty if is_faulty else None
    assert trained(tmp_path, server.url, *TARS) == local
    assert (len(server.requests) > 2 * len(server.answered)) == is_faulty


def test_a_run_from_a_bucket_is_the_local_one_and_tells_no_credential(
    local: dict[str, object], indexed: Path, tmp_path: Path
) -> None:
    with s3_server(indexed) as environment:
        assert trained(tmp_path, "s3://bucket", environment=environment) == local
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert environment["AWS_SECRET_ACCESS_KEY"].encode() not in written
    assert environment["AWS_ACCESS_KEY_ID"].encode() not in written


NUM_TEXTS = 8200  # of a shard: two of them are a window


@pytest.fixture(scope="module")
def unindexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.root` with four tars of texts and their sizes, without indexes."""
    root = tmp_path_factory.mktemp("unindexed")
    (root / "texts").mkdir()
    for i in range(4):
        with TarWriter(str(root / "texts" / f"{i:03d}.tar"), encoder=False, mtime=0) as writer:
            for j in range(NUM_TEXTS):
                writer.write({"__key__": f"{i}-{j:05d}", "txt": f"text {j} of shard {i}".encode()})
    (root / "texts" / "sizes.json").write_text(json.dumps({f"{i:03d}.tar": NUM_TEXTS for i in range(4)}))
    return root


TEXTS = (
    "objective=[mlm]", "objective.mlm.stream=texts", "data.train.texts.shards=texts/{000..003}.tar", "eval=[]",
    "data.train.texts.shuffle=shards", "data.workers=2", "trainer.batch_size=128", "trainer.duration=180steps",
    "~data.val.val",
)  # fmt: skip


@pytest.mark.slow
def test_shards_without_indexes_are_fetched_a_window_ahead_within_the_bound(unindexed: Path, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    copied = shutil.copytree(unindexed, tmp_path / "copy")  # indexes are written beside local tars
    runs.trained(tmp_path / "local", copied, *TEXTS)
    (tmp_path / "remote").mkdir()
    tar_bytes = (unindexed / "texts" / "000.tar").stat().st_size
    may_go_on, tars, largest = threading.Event(), set(), [0]

    def of_the_second_window_later(handler: RangeHandler, path: str, earlier: int) -> bool:
        cached = [file.stat().st_size for file in (tmp_path / "cache").glob("*.[bp]*")]
        largest[0] = max(largest[0], sum(cached))
        if path.endswith(".tar"):
            tars.add(path)
            if len(tars) > 2:
                may_go_on.wait()
        return False

    with http_server(unindexed) as server:
        server.fault = of_the_second_window_later
        cache = (f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_bytes={int(3.5 * tar_bytes)}")
        command = runs.start_train(tmp_path / "remote", *TEXTS, f"data.root={server.url}", *cache)
        command.wait_for(lambda: runs.num_records(tmp_path / "remote" / "run") > 20, "steps of the first window")
        assert len({path for path, _ in server.answered if path.endswith(".tar")}) == 2
        may_go_on.set()
        finished = command.wait()
    assert finished.code == 0, finished.stderr
    assert runs.exact_outcome(tmp_path / "remote" / "run") == runs.exact_outcome(tmp_path / "local" / "run")
    assert 2 * tar_bytes < largest[0] <= 3.5 * tar_bytes


def test_shards_without_indexes_need_an_order_by_shards(unindexed: Path, tmp_path: Path) -> None:
    with http_server(unindexed) as server:
        finished = runs.train(tmp_path, *TEXTS, f"data.root={server.url}", "data.train.texts.shuffle=blocks")
    assert finished.code == 2 and "expected data.train.texts.shuffle=shards, or indexes" in finished.stderr


@pytest.mark.parametrize("policy", ["fail", "replace"])
def test_a_shard_that_is_gone_is_named(policy: str, indexed: Path, tmp_path: Path) -> None:
    gone = shutil.copytree(indexed, tmp_path / "gone")
    (gone / "train" / "000001.tar").unlink()
    with http_server(gone) as server:
        finished = runs.train(
            tmp_path, *SETTINGS, *TARS, f"data.root={server.url}", f"data.cache_dir={tmp_path / 'cache'}",
            f"data.on_missing_shard={policy}", "data.max_bad_fraction=1",
        )  # fmt: skip
    if policy == "fail":
        assert finished.code == 2 and f"{server.url}/train/000001.tar does not exist" in finished.stderr
        return
    assert finished.code == 0, finished.stderr
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert lines and all("000001.tar does not exist" in line for line in lines)


@pytest.mark.parametrize(
    "override",
    [
        "data.root=http://user:SECRETPW@127.0.0.1:9/data",
        "data.index_dir=http://user:SECRETPW@127.0.0.1:9/indexes",
        "data.train.pairs.shards=['https://host/a.tar?auth=SECRETPW']",
        "run.sync_to=s3://user:SECRETPW@bucket/run",
    ],
)
def test_an_address_with_credentials_is_refused_and_shown_nowhere(override: str, pairs: Path, tmp_path: Path) -> None:
    finished = runs.train(tmp_path, f"data.root={pairs}", "trainer.duration=2steps", override)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: {override.partition('=')[0]}: the address on ")
    assert "expected credentials in the environment" in line
    shown = [finished.stdout, finished.stderr, *(str(path) for path in tmp_path.rglob("*"))]
    shown += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("SECRETPW" in text for text in shown)
