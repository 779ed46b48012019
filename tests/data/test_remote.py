"""Requests that fail for a passing reason are repeated until a deadline; others are told at once."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmpretrain.data.remote import Remote, check_address, is_remote
from mmpretrain.errors import Unreachable
from tests.servers import RangeHandler, RangeServer, http_server, s3_server

SECRETS = ("api_key", "access_key", "private_key", "sas", "jwt", "client_key", "subscription-key", "key")
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with http_server(tmp_path) as server:
        yield server


def failing_once(how: Callable[[RangeHandler], None]) -> Callable[[RangeHandler, str, int], bool]:
    def fault(handler: RangeHandler, path: str, earlier: int) -> bool:
        if earlier < 2:
            how(handler)
        return earlier < 2

    return fault


FAULTS: dict[str, Callable[[RangeHandler], None]] = {
    "500": lambda handler: handler.fail(500),
    "503": lambda handler: handler.fail(503),
    "429": lambda handler: handler.fail(429),
    "drop": RangeHandler.drop,
    "truncate": RangeHandler.truncate,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_costs_requests_and_no_byte(fault: str, server: RangeServer) -> None:
    server.fault = failing_once(FAULTS[fault])
    remote, url = Remote(30), f"{server.url}/a.tar"
    assert remote.read_range(url, 100, 1100) == CONTENT[100:1100]
    assert [path for path, _ in server.requests] == ["a.tar"] * 3
    server.requests.clear()
    assert remote.size(url)[0] == len(CONTENT)
    server.requests.clear()
    assert remote.read(url) == CONTENT


def test_a_server_that_stalls_is_asked_again(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpretrain.data.remote._SILENT_SECONDS", 0.3)
    server.fault = failing_once(RangeHandler.stall)
    assert Remote(30).read_range(f"{server.url}/a.tar", 0, 10) == CONTENT[:10]


def test_the_deadline_ends_the_attempts(server: RangeServer) -> None:
    server.fault = lambda handler, path, earlier: handler.fail(503) or True
    with pytest.raises(Unreachable, match=rf"^{server.url}/a\.tar cannot be read, for 1 seconds .*: .*503"):
        Remote(1).read_range(f"{server.url}/a.tar", 0, 10)
    assert 2 <= len(server.requests) <= 4  # after 0, .1, .3 and .7 seconds, or later on a busy machine


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [(404, FileNotFoundError, "does not exist"), (403, Unreachable, "cannot be read .*403")],
)
def test_what_does_not_pass_is_told_at_once(status: int, error: type[OSError], told: str, server: RangeServer) -> None:
    server.fault = lambda handler, path, earlier: handler.fail(status) or True
    for read in (lambda url: Remote(30).read_range(url, 0, 10), Remote(30).read, Remote(30).size):
        server.requests.clear()
        with pytest.raises(error, match=told):
            read(f"{server.url}/a.tar")
        assert len(server.requests) <= 2  # fsspec asks for a size by HEAD, then by GET


def test_a_server_without_ranges_is_named(server: RangeServer) -> None:
    server.answers_ranges = False
    with pytest.raises(Unreachable, match=r"asked for bytes 10 to 20, got 10240 bytes; expected a server that answers"):
        Remote(30).read_range(f"{server.url}/a.tar", 10, 20)


def test_a_range_other_than_the_one_asked_for_is_refused(server: RangeServer) -> None:
    def other_range(handler: RangeHandler, path: str, earlier: int) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-9/{len(CONTENT)}")
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(CONTENT[:10])
        return True

    server.fault = other_range
    with pytest.raises(Unreachable, match=r"asked for bytes 10 to 20, got bytes 0-9/10240; expected a server that"):
        Remote(30).read_range(f"{server.url}/a.tar", 10, 20)


def test_objects_of_a_bucket_are_listed_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train/0.tar", "train/1.tar", "train/1.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(CONTENT)
    with s3_server(tmp_path) as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        remote = Remote(30)
        assert remote.glob("s3://bucket/train/*.tar") == ["s3://bucket/train/0.tar", "s3://bucket/train/1.tar"]
        assert remote.read_range("s3://bucket/train/1.tar", 7, 17) == CONTENT[7:17]
        assert remote.size("s3://bucket/train/1.tar")[0] == len(CONTENT)
        with pytest.raises(FileNotFoundError, match=r"s3://bucket/train/2\.tar does not exist"):
            remote.read_range("s3://bucket/train/2.tar", 0, 1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens


@pytest.mark.parametrize(
    "url",
    [
        "https://user:pass@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=pass",
        "https://host/a.tar?sig=pass&x=1",
        *(f"https://host/a.tar?{name}=pass" for name in SECRETS),
        "https://host/a.tar#token=pass",
        "https://host/a.tar?a=1;token=pass",
        "https://host/a;token=pass/a.tar",
        "https://host/a.tar?to%6ben=pass",
    ],
)
def test_addresses_with_credentials_are_refused_without_telling_them(url: str) -> None:
    with pytest.raises(ValueError, match=r"^shards: the address on host holds .*; expected credentials in") as refused:
        check_address(url, "shards")
    assert "pass@" not in str(refused.value) and "=pass" not in str(refused.value)


def test_an_invalid_address_with_a_password_is_refused_without_telling_it() -> None:
    with pytest.raises(
        ValueError, match=r"^shards: no valid address; expected one such as https://host/path or"
    ) as refused:
        check_address("https://user:hidden@ho\u2100st/", "shards")
    assert "hidden" not in str(refused.value)


def test_a_redirect_with_credentials_is_told_without_them(server: RangeServer) -> None:
    def redirect(handler: RangeHandler, path: str, earlier: int) -> bool:
        handler.send_response(302)
        handler.send_header("Location", "ftp://user:hidden@host/a.tar?sig=hidden#token=hidden")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    server.fault = redirect
    with pytest.raises(Unreachable, match=r"a\.tar cannot be read.*ftp://host/a\.tar") as refused:
        Remote(0.5).read(f"{server.url}/a.tar")
    assert "hidden" not in str(refused.value)


def test_addresses_have_a_scheme() -> None:
    assert is_remote("s3://b/a.tar") and is_remote("https://h/a.tar") and not is_remote("a/b.tar")
    for harmless in (
        "https://host/a.tar?version=3",
        "https://host/monkeys=2/a.tar?monkey=1",
        "s3://bucket/day=2/a.tar",
    ):
        check_address(harmless, "shards")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^nothing://host/a\.tar: .*; expected an address such as https://, s3:// or gs://"
    ):
        Remote(30).read("nothing://host/a.tar")


def test_a_bucket_that_refuses_connections_is_asked_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:  # bound and not listening: connections are refused
        listener.bind(("127.0.0.1", 0))
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}", "AWS_ACCESS_KEY_ID": "a",
                       "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        for call in (Remote(0.5).read, Remote(0.5).size, Remote(0.5).glob, Remote(0.5).walk):
            with pytest.raises(Unreachable, match=r"s3://bucket/a cannot be read, for 0\.5 seconds"):
                call("s3://bucket/a")


def test_what_a_folder_refuses_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("content")
    (tmp_path / "file").write_text("")
    with pytest.raises(Unreachable, match=r"file/a cannot be written .*File exists.*check its address"):
        Remote(30).put(tmp_path / "a", f"file://{tmp_path}/file/a")


def test_a_large_file_is_waited_for_past_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with (tmp_path / "a").open("wb") as file:
        file.truncate(64 << 20)
    with s3_server(tmp_path / "empty") as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # which may be connected to another test's server
        Remote(0.02).put(tmp_path / "a", "s3://bucket/a")
        assert Remote(30).size("s3://bucket/a")[0] == 64 << 20


def test_a_deadline_that_becomes_shorter_holds_for_a_request_that_waits(tmp_path: Path) -> None:
    class Away(MemoryFileSystem):
        protocol = "away"

        def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
            remote.deadline_seconds = 0.0
            raise ConnectionError("away")

    fsspec.register_implementation("away", Away, clobber=True)
    remote = Remote(1e9)
    with pytest.raises(Unreachable, match=r"away://a cannot be read, for 0 seconds"):
        remote.read("away://a")
