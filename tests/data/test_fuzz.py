"""What others wrote, mutated at random: readers raise what they document, in time and memory that the input allows.

    FUZZ_SECONDS=600 python -m pytest tests/data/test_fuzz.py -n 4

goes on for so long with each of them, with fresh examples; without it the examples are few, and always the same.
"""

import io
import json
import logging
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmpretrain.data.decode import BadSample, decode_image
from mmpretrain.data.fields import decode_captions, read_json_field, read_label
from mmpretrain.data.shards import Shards
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.stored_index import index_path, load_index, read_index, write_index
from mmpretrain.data.tar_index import TarIndex, index_tar
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import CenterCrop
from mmpretrain.seeds import hash64
from tests.tars import encode, smooth_pixels

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
EXAMPLE_SECONDS = 20.0
MAX_BYTES = 64 << 20

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow comments on damaged images


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "mmpretrain.data.stored_index")  # it warns of every damaged index


def fuzzed(
    max_examples: int, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """A test of a property: some examples, always the same, or fresh ones for `FUZZ_SECONDS`."""

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        def timed(**drawn: Any) -> None:
            started = time.monotonic()
            check(**drawn)
            assert time.monotonic() - started < EXAMPLE_SECONDS

        def run() -> None:
            options: dict[str, Any] = {
                "deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": not SECONDS,
            }  # fmt: skip
            test = settings(max_examples=max_examples, **options)(given(**strategies)(timed))
            end = time.monotonic() + SECONDS
            test()
            while time.monotonic() < end:
                test()

        run.__name__, run.__doc__ = check.__name__, check.__doc__
        return run

    return decorate


# ---------------------------------------------------------------- what must not happen


class _Writes:
    """Files that this process opens for writing, while somebody listens."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.paths is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.paths.append(os.fspath(arguments[0]) if isinstance(arguments[0], str | Path) else str(arguments[0]))


WRITES = _Writes()


def peak_bytes() -> int:
    """The most memory that this process had since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


@contextmanager
def bounded(folder: str, max_bytes: int) -> Iterator[None]:
    """Inside, nothing is written outside of `folder`, and little memory is taken."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_bytes()
    WRITES.paths = []
    try:
        yield
    finally:
        written, WRITES.paths = WRITES.paths, None
    assert peak_bytes() - before < max_bytes
    assert [path for path in written if not path.startswith(folder)] == []


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that were overwritten, cut, repeated or filled up here and there."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["byte", "bytes", "zeros", "cut", "removed", "repeated", "number"]))
        length = draw(st.sampled_from([1, 2, 4, 16, 100, 512, 1024]))
        if kind == "byte":
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "bytes":
            new = draw(st.binary(max_size=16))
            data[place : place + len(new)] = new
        elif kind == "zeros":
            data[place : place + length] = bytes(length)
        elif kind == "cut":
            del data[place:]
        elif kind == "removed":
            del data[place : place + length]
        elif kind == "repeated":
            data[place:place] = data[place : place + length] * draw(st.integers(1, 4))
        else:
            number = draw(
                st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, (1 << 63) - 1, (1 << 64) - 1])
            )
            size = draw(st.sampled_from([2, 4, 8]))
            data[place : place + size] = (number % (1 << 8 * size)).to_bytes(
                size, draw(st.sampled_from(["little", "big"]))
            )
    return bytes(data)


# ---------------------------------------------------------------- tars

NAMES = st.sampled_from(["a.jpg", "a.txt", "b.jpg", "b.json", "c/d.txt", ".x", "e", "f.1.2.3.jpg", "g" * 130 + ".txt"])
NUMBERS = ["-1", "0", "7777777", "77777777777", "x", "99999999999999999999", "9" * 5000]


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """A tar of any format, some headers of which say what they should not, under a right checksum."""
    format = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    parts = []
    for name in draw(st.lists(NAMES, max_size=6)):
        member = tarfile.TarInfo(name)
        content = draw(st.binary(max_size=600))
        member.size, member.mtime = len(content), draw(st.sampled_from([0, 1.5]))
        if format == tarfile.PAX_FORMAT and draw(st.booleans()):
            keyword = draw(st.sampled_from(["path", "size", "GNU.sparse.major", "comment", "a" * 300]))
            member.pax_headers = {keyword: draw(st.sampled_from([*NUMBERS, "x.jpg", "x\0y.jpg", "\n5 a=b\n", ""]))}
        try:
            header = bytearray(member.tobuf(format))
        except ValueError:  # a name that ustar cannot hold
            continue
        if draw(st.booleans()):
            kind = draw(st.sampled_from(b"0\0001234567LKxXgSV\xff"))
            header[156] = kind
        if draw(st.booleans()):
            start, stop = draw(st.sampled_from([(0, 100), (124, 136), (257, 265), (345, 500)]))
            field = draw(
                st.sampled_from([*(n.encode()[:12] for n in NUMBERS), b"\x80" + b"\xff" * 11, b"\xff" * 12, b""])
            )
            header[start:stop] = field.ljust(stop - start, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        parts.append(bytes(header) + content + bytes(-len(content) % 512))
    return b"".join(parts) + bytes(draw(st.sampled_from([0, 512, 1024, 10240, 30000])))


def check_index(index: TarIndex, data: bytes) -> None:
    assert len(index.keys) == index.num_samples and all(isinstance(problem, str) for problem in index.problems)
    for extension, (offsets, sizes) in index.members.items():
        assert ((sizes == -1) | (offsets >= 512) & (sizes >= 0) & (offsets + sizes <= len(data))).all()
        assert len(offsets) == len(sizes) == len(index.header_sums[extension]) == index.num_samples


@fuzzed(400, data=mutated(st.one_of(tars(), st.builds(bytes.__add__, tars(), tars()))) | st.binary(max_size=4096))
def test_any_bytes_are_indexed_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        path.write_bytes(data)
        with bounded(folder, 32 << 20):
            try:
                index = index_tar(path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                return
            check_index(index, data)
            write_index(index, f"{folder}/index.npz")
            stored = read_index(f"{folder}/index.npz")
            assert stored.keys == index.keys and stored.problems == index.problems
            if index.num_samples:
                shards = Shards([str(path)])
                for sample in range(min(shards.num_samples, 20)):
                    for extension, (_, sizes) in index.members.items():
                        if sizes[sample] >= 0:
                            assert len(shards.read(sample, (extension,))) == sizes[sample]


# ---------------------------------------------------------------- stored indexes


@lru_cache(maxsize=1)
def small_tar() -> tuple[bytes, bytes]:
    """A tar, and its stored index, whose time of modification is 0."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in "abc":
            for extension in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = 700
                tar.addfile(member, io.BytesIO(f"{key}.{extension}".encode() * 140))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        path.write_bytes(buffer.getvalue())
        os.utime(path, ns=(0, 0))
        write_index(index_tar(path), f"{folder}/index.npz")
        return buffer.getvalue(), Path(folder, "index.npz").read_bytes()


@st.composite
def rewritten_indexes(draw: st.DrawFn) -> bytes:
    """A stored index of which a part is another one, whole as an archive."""
    with np.load(io.BytesIO(small_tar()[1])) as arrays:
        parts = dict(arrays)
    header = json.loads(parts["header"].tobytes())
    name = draw(st.sampled_from([*parts, *header]))
    odd = st.recursive(
        st.none()
        | st.booleans()
        | st.floats()
        | st.text(max_size=4)
        | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64]),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
    if name in header:
        header[name] = draw(odd)
        parts["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    elif name == "header" or draw(st.booleans()):
        dtype = draw(st.sampled_from(["u1", "i1", "<i4", "<i8", ">i8", "<u4", "<f8", "U3", "S2", "<c16", "?"]))
        shape = draw(st.sampled_from([(), (0,), (3,), (2, 3), (3, 2), (2, 0), (6,), (1, 2, 3)]))
        parts[name] = np.zeros(shape, dtype)
    else:
        array = parts[name].copy()
        place = draw(st.integers(0, array.size - 1))
        limits = np.iinfo(array.dtype)
        extremes = [limits.min, limits.max, 0, min(512, int(limits.max))]
        array.flat[place] = draw(st.integers(limits.min, limits.max) | st.sampled_from(extremes))
        parts[name] = array
    buffer = io.BytesIO()
    (np.savez_compressed if draw(st.integers(0, 9)) == 0 else np.savez)(buffer, **parts)
    return buffer.getvalue()


@fuzzed(400, stored=mutated(st.builds(lambda: small_tar()[1])) | rewritten_indexes() | st.binary(max_size=300))
def test_any_stored_index_is_read_or_made_again(stored: bytes) -> None:
    """What is read may name other bytes of the tar than it should; then the header in front of them tells."""
    data = small_tar()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
        index_path(path).write_bytes(stored)
        with bounded(folder, 32 << 20):
            try:
                check_index(read_index(index_path(path)), data)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            index = load_index(path)
            check_index(index, data)
            if not index.num_samples:
                return
            shards = Shards([str(path)])
            for sample in range(shards.num_samples):
                for extension in ("jpg", "txt"):
                    try:
                        read = shards.read(sample, (extension,))
                    except (BadSample, FileChanged):
                        continue
                    assert read[:5] in data


# ---------------------------------------------------------------- images

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "I;16", {}), ("PNG", "RGBA", {}), ("PNG", "1", {}),
    ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "P", {}),
    ("TIFF", "RGB", {}), ("TIFF", "L", {"compression": "tiff_lzw"}), ("TIFF", "CMYK", {}),
]  # fmt: skip


@cache
def encoded(number: int) -> bytes:
    format, mode, options = OPTIONS[number]
    image = Image.fromarray(smooth_pixels(40, 50))
    return encode(image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode), format, **options)


@fuzzed(
    1200,
    data=mutated(st.integers(0, len(OPTIONS) - 1).map(encoded)),
    channels=st.sampled_from([1, 3, 4]),
    size=st.sampled_from([1, 16, 40]),
)
def test_any_image_is_decoded_or_refused(data: bytes, channels: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder, bounded(folder, 2 * MAX_BYTES):
        try:
            image = decode_image(data, CenterCrop(), size, channels, max_bytes=MAX_BYTES)
        except BadSample as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert image.shape == (channels, size, size)


# ---------------------------------------------------------------- captions and json

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=30),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["caption", "a", "ü\n"]), inner, max_size=3)
    ),
    max_leaves=12,
)
JSON = st.builds(
    lambda value, ascii: json.dumps(value, ensure_ascii=ascii).encode("utf-8", "surrogatepass"), VALUES, st.booleans()
)
DEEP = st.builds(
    lambda opening, times: opening * times, st.sampled_from([b"[", b'{"a":', b"9", b"\\ud83d"]), st.integers(0, 100_000)
)
REFERENCES = st.builds(
    lambda *parts: "".join(parts).encode(),
    st.sampled_from(["", "a &", "&amp;", "\uff06", "&", "&" + "amp;" * 50]),
    st.sampled_from(["#", "#x", "#X", "\uff03", "&#35;"]),
    st.builds(str.__mul__, st.sampled_from(["9", "0", "f", "\uff19", "&#57;", "9&#"]), st.integers(0, 10_000)),
    st.sampled_from(["", ";", "66;", " cat"]),
)
TOKENIZER = ClipTokenizer()


@fuzzed(
    800,
    data=mutated(JSON) | DEEP | REFERENCES | st.binary(max_size=200) | st.text(max_size=100).map(str.encode),
    field=st.sampled_from(["txt", "cls", "json.caption", "json.a", "json.a.caption"]),
)
def test_any_text_gives_captions_that_can_be_used_or_is_refused(data: bytes, field: str) -> None:
    with tempfile.TemporaryDirectory() as folder, bounded(folder, 64 << 20):
        try:
            for caption in decode_captions(data, field):
                assert caption.strip()
                hash64(caption)
                (ids,), (length,) = TOKENIZER([caption])
                assert 2 <= length <= 77 and ids.min() >= 0 and ids.max() < TOKENIZER.vocab_size
        except BadSample as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        try:
            hash64(read_label(data, field))
            read_json_field(data, "caption")
        except BadSample as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
