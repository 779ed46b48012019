"""Servers on loopback for tests of remote data: HTTP with ranges and faults, and S3's API."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

Fault = Callable[["RangeHandler", str, int], bool]
"""Called with the handler, the path and the number of earlier requests of that path; True: the fault has answered."""


class RangeHandler(BaseHTTPRequestHandler):
    """Files of a folder, whole or in ranges."""

    protocol_version = "HTTP/1.1"
    server: "RangeServer"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.lstrip("/")
        with self.server.lock:
            earlier = sum(asked == path for asked, _ in self.server.requests)
            self.server.requests.append((path, self.headers.get("Range", "")))
        if self.server.fault is not None and self.server.fault(self, path, earlier):
            return
        file = self.server.folder / path
        if self.server.lists and file.is_dir():
            return self._list(file, with_body)
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and self.server.answers_ranges:
            start, end = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            content = content[start:end]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        stat = file.stat()
        marks = {"ETag": f'"{stat.st_mtime_ns}"', "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
        self.send_header(self.server.mark, marks[self.server.mark])
        self.end_headers()
        if with_body:
            self.wfile.write(content)
        with self.server.answered_condition:
            self.server.answered.append((path, self.headers.get("Range", "")))
            self.server.answered_condition.notify_all()

    def _list(self, folder: Path, with_body: bool) -> None:
        page = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in sorted(folder.iterdir())).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if with_body:
            self.wfile.write(page)

    def fail(self, status: int) -> None:
        """Answer with an error."""
        self.send_error(status)

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.close()

    def truncate(self) -> None:
        """Announce more bytes than are sent; without a body to cut, drop the connection."""
        if self.command == "HEAD":
            return self.drop()
        self.send_response(206)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)
        self.close_connection = True

    def stall(self) -> None:
        """Send nothing until the server is closed."""
        self.server.is_closing.wait()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class RangeServer(ThreadingHTTPServer):
    """HTTP server of a folder.

    Attributes:
        requests: (path, range) of each request.
        answered: (path, range) of each request that was answered with a file; guarded by `answered_condition`.
        lists: whether folders are answered by a page of links.
        fault: see `Fault`.
        answers_ranges: whether ranges are answered, or the whole file instead.
        mark: header that tells the version of a file, ETag or Last-Modified.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.answered: list[tuple[str, str]] = []
        self.answered_condition = threading.Condition()
        self.lists = False
        self.fault: Fault | None = None
        self.answers_ranges = True
        self.mark = "ETag"
        self.lock = threading.Lock()
        self.is_closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up


@contextmanager
def http_server(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder."""
    server = RangeServer(folder)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.is_closing.set()
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(folder: Path, bucket: str = "bucket") -> Iterator[dict[str, str]]:
    """Serve the files of a folder as a bucket through S3's API. Yields the environment of its clients."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test-key-id",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        reset = Request(
            f"{environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST"
        )  # servers share their content
        urlopen(reset).close()
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test-key-id",
            aws_secret_access_key="test-secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=bucket)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                client.put_object(Bucket=bucket, Key=str(file.relative_to(folder)), Body=file.read_bytes())
        yield environment
    finally:
        server.stop()
