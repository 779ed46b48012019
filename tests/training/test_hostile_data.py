"""A run on a tar that is made to harm it: nothing is executed or extracted, and each refused sample is told."""

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpretrain.data.tar_index import index_tar
from tests import runs
from tests.tars import encode, smooth_pixels

GOOD = encode(smooth_pixels(40, 40))


class _Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, with the data of a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animated_gif() -> bytes:
    frames = [Image.fromarray(smooth_pixels(40, 40, seed)).convert("P") for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(evil) (w) file\n%%EOF\n"
BAD_SAMPLES: dict[str, tuple[dict[str, bytes], str]] = {
    "huge_header": ({"png": png_header(50_000, 50_000), "txt": b"huge"}, "image_size"),
    "truncated": ({"jpg": GOOD[: len(GOOD) // 2], "txt": b"truncated"}, "image_damaged"),
    "animated": ({"jpg": animated_gif(), "txt": b"animated"}, "image_animated"),
    "eps": ({"jpg": EPS, "txt": b"eps"}, "image_format"),
    "long_caption": ({"jpg": GOOD, "txt": b"word " * (2 << 20)}, "caption_length"),
    "utf16": ({"jpg": GOOD, "txt": "a caption".encode("utf-16")}, "caption_encoding"),
    "blank": ({"jpg": GOOD, "txt": "\u200b\u00ad \n".encode()}, "caption_empty"),
    "zip_bomb": ({"jpg": GOOD, "txt.gz": zlib.compress(bytes(1 << 27), 9, wbits=31)}, "member_size"),
    "symlink": ({"txt": b"its image is a link"}, "member_missing"),
    "sparse": ({"txt": b"its image is sparse"}, "member_missing"),
}


def members(marker: Path) -> Iterator[tuple[str, bytes]]:
    for i in range(60):
        yield f"{i:03d}.jpg", encode(smooth_pixels(40, 40, i))
        yield f"{i:03d}.txt", f"sample {i}".encode()
        if i == 10:
            for extension in ("pyd", "pickle", "pth", "pkl"):
                yield f"{i:03d}.{extension}", pickle.dumps(_Touches(str(marker)))
    for name in ("../../outside", "/outside", "a/../../outside"):
        yield f"{name}.jpg", GOOD
        yield f"{name}.txt", b"outside"
    yield "twice.jpg", GOOD
    yield "twice.jpg", GOOD
    yield "twice.txt", b"twice"
    for key, (content, _) in BAD_SAMPLES.items():
        for extension, data in content.items():
            yield f"{key}.{extension}", data


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    root = runs.write_pairs(tmp_path / "data")
    marker = tmp_path / "executed"
    with tarfile.open(root / "train" / "hostile.tar", "w") as tar:
        for name, content in members(marker):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == "symlink.txt":
                link = tarfile.TarInfo("symlink.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
            if name == "sparse.txt":
                sparse = tarfile.TarInfo("sparse.jpg")
                sparse.type = tarfile.GNUTYPE_SPARSE
                tar.addfile(sparse)
            tar.addfile(info, io.BytesIO(content))
    return root


def test_a_run_on_a_hostile_tar_goes_on_and_tells_each_refusal(hostile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    settings = ("data.train.pairs.shards=train/hostile.tar", "data.max_bad_fraction=1", "trainer.duration=3epochs")
    finished = runs.train(folder, f"data.root={hostile}", *settings, "data.workers=2")
    assert finished.code == 0, finished.stderr
    assert not (tmp_path / "executed").exists()
    after = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    assert {path.name for path in after - before} <= {"hostile.tar.index.npz", "000000.tar.index.npz"}
    refused = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"]: line["code"] for line in refused} == {key: code for key, (_, code) in BAD_SAMPLES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [False, True])
def test_a_million_tiny_members_are_indexed_in_bounded_memory(repeats: bool, tmp_path: Path) -> None:
    path = tmp_path / "many.tar"
    empty = tarfile.TarInfo("0000000.txt").tobuf()
    with open(path, "wb") as file:
        for first in range(0, 1_000_000, 10_000):
            blocks = np.tile(np.frombuffer(empty, np.uint8), (10_000, 1))
            if not repeats:
                for row, block in enumerate(blocks):
                    info = tarfile.TarInfo(f"{first + row:07d}.txt")
                    block[:] = np.frombuffer(info.tobuf(), np.uint8)
            file.write(blocks.tobytes())
        file.write(bytes(1024))
    script = (
        "import resource, sys; from mmpretrain.data.tar_index import index_tar; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; index = index_tar(sys.argv[1]); "
        "print(index.num_samples, len(index.problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    num_samples, num_problems, grown_kilobytes = map(int, done.stdout.split())
    assert num_samples == (1 if repeats else 1_000_000) and num_problems < 20
    assert grown_kilobytes < 500_000
    assert index_tar(path).num_samples == num_samples
