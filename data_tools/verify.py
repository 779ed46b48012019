"""Command `verify`: decode every sample of tars once, as training does, and record what is wrong.

Each bad sample is a line of `verify.jsonl`, and the lines of a tar end with one that tells its digest, version and counts.
Such a block is appended when its tar is finished. The same command again reads no tar whose last block has the same digest,
version and options.
"""

import fcntl
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_tools.pool import run_tasks
from data_tools.tars import expand_tars, open_table, open_tar, remote_row
from mmpretrain.data.decode import BadSample, decode_image
from mmpretrain.data.fields import check_caption_field, read_captions
from mmpretrain.data.open_shards import StorageOptions
from mmpretrain.data.remote import Remote, is_remote
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.shards import Shards
from mmpretrain.data.storage import open_regular
from mmpretrain.data.tar_index import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, TarIndex, is_text_alone
from mmpretrain.data.transforms import CenterCrop

_IMAGE_SIZE = 224  # pixels; larger images are decoded at a fraction of their size, as in training
_MAX_KINDS = 1000  # of reasons, so that the memory does not grow with the number of bad samples
_OTHER = "other reasons"
_BEGINNING = b'{"shard": '
_MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True)
class VerifyOptions:
    """Options that decide which samples are bad.

    Attributes:
        caption: caption field, `txt` or `json.<path>`.
        max_image_bytes: memory limit for decoding one image, in bytes.
    """

    caption: str
    max_image_bytes: int


@dataclass
class Reason:
    """Samples that are bad for one reason: their number, and the first of them with its own reason and its code."""

    num_samples: int
    shard: str
    key: str
    reason: str
    code: str


@dataclass(frozen=True)
class BadLine:
    """Bad sample of a tar: its key, the reason, and its code as in a run's quarantine.jsonl; of two reasons, the first's."""

    key: str
    reason: str
    code: str


@dataclass(frozen=True)
class Verification:
    """Result for a set of tars.

    Attributes:
        num_tars, num_samples: number of tars, and of the samples in those that could be read to their end.
        num_kept: number of tars whose result an earlier run had recorded.
        num_bad: number of bad samples.
        reasons: bad samples by reason, the most frequent first. Reasons that differ in numbers alone are one.
        problems: (tar, problem) for defects of whole tars.
    """

    num_tars: int
    num_samples: int
    num_kept: int
    num_bad: int
    reasons: Sequence[Reason]
    problems: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Block:
    """Lines of one tar in the output: what its last line says, and its first byte and the one after its last.

    The version is None in files of earlier releases, whose tars are verified again.
    """

    digest: str
    version: str | None
    options: VerifyOptions
    start: int
    end: int


@dataclass(frozen=True)
class _VerifiedTar:
    """Result for one tar: its bad samples, None if not all samples were read; and problems of the tar."""

    tar: str
    problems: Sequence[str]
    digest: str = ""
    version: str = ""
    num_samples: int = 0
    has_images: bool = False
    is_text_alone: bool = False
    is_kept: bool = False
    bad: Sequence[BadLine] | None = None


def verify_tars(
    tars: Sequence[str], index_dir: str | None, output: Path, options: VerifyOptions, workers: int
) -> Verification:
    """Decode every sample of tars, and append the bad ones to `output`.

    Args:
        tars: patterns of tars, all local or all remote.
        index_dir: folder or address of the indexes; None: beside the tars.
        output: file of JSON lines, new or of an earlier run, which is continued.
        options: options that decide which samples are bad.
        workers: number of processes.

    Raises: ValueError if `output` is another file, a pattern matches nothing, or the caption field is malformed;
        Unreachable for a remote folder.
    """
    check_caption_field(options.caption, "--caption")
    paths = list(dict.fromkeys(expand_tars(tars)))  # patterns may overlap
    table = open_table(paths, index_dir) if any(map(is_remote, paths)) else None
    reasons: dict[str, Reason] = {}
    problems: list[tuple[str, str]] = []
    num_samples = num_kept = num_bad = 0
    with_images: set[str] = set()
    of_texts: dict[str, int] = {}
    with _appending(output) as file:
        blocks = _read_blocks(output)
        tasks = [
            (path, None if table is None else remote_row(table, i), blocks.get(path)) for i, path in enumerate(paths)
        ]
        for result in run_tasks(
            partial(_verify_one, index_dir=index_dir, options=options), tasks, workers, "verifying"
        ):
            problems += [(result.tar, problem) for problem in result.problems]
            if result.has_images:
                with_images.add(result.tar)
            if result.is_text_alone:
                of_texts[result.tar] = result.num_samples
            bad = result.bad
            if result.is_kept:
                bad = _read_bad(output, blocks[result.tar])
                num_kept += 1
            elif bad is not None:
                file.write(_lines_of(result, bad, options))
                file.flush()  # also before the next worker is forked, which would inherit what is not written
            if bad is not None:
                num_samples += result.num_samples
                num_bad += len(bad)
                for line in bad:
                    _count(reasons, result.tar, line)
    if with_images:
        problems += [
            (tar, f"none of its {num} samples has an image, but other tars have; verify tars of texts by themselves")
            for tar, num in of_texts.items()
        ]
    ordered = sorted(reasons.values(), key=lambda reason: -reason.num_samples)
    return Verification(len(paths), num_samples, num_kept, num_bad, ordered, problems)


@contextmanager
def _appending(output: Path) -> Iterator[BinaryIO]:
    """Open and lock the output. Raises: ValueError if another process writes to it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(output):
        os.close(open_regular(output))  # opening a pipe to write would wait for a reader
    with open(output, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--output {str(output)!r}: another verify is writing to it; wait for it, or name another file"
            ) from error
        yield file


def _count(reasons: dict[str, Reason], shard: str, line: BadLine) -> None:
    kind = re.sub(r"0x[0-9a-f]+|\d+", "#", line.reason)
    if kind not in reasons and len(reasons) >= _MAX_KINDS:
        kind = _OTHER
    if kind in reasons:
        reasons[kind].num_samples += 1
    else:
        told, code = (_OTHER, "") if kind == _OTHER else (line.reason, line.code)
        reasons[kind] = Reason(1, shard, line.key, told, code)


def _verify_one(
    task: tuple[str, ShardTable | None, _Block | None], index_dir: str | None, options: VerifyOptions
) -> _VerifiedTar:
    tar, row, block = task
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the processes share the cores
    try:
        shards = open_tar(tar, index_dir, row)
        index = shards.index(0)
        version = _version(tar, index)
    except (ValueError, OSError) as error:
        return _VerifiedTar(tar, [str(error)])
    wants_image, wants_caption, missing = _wanted(index, options.caption)
    result = _VerifiedTar(
        tar,
        [*index.problems, *missing],
        index.digest,
        version,
        shards.num_samples,
        has_images=wants_image,
        is_text_alone=is_text_alone(index.members),
    )
    if block is not None and (block.digest, block.version, block.options) == (index.digest, version, options):
        return replace(result, is_kept=True)
    bad = []
    try:
        with _cache_of(row, is_changed=block is not None and block.version != version) as cache_dir:
            if cache_dir is not None:
                shards = open_tar(tar, index_dir, row, cache_dir)
            for sample in range(shards.num_samples):
                errors = _errors(shards, sample, wants_image, wants_caption, options)
                if errors:
                    bad.append(BadLine(shards.key(sample), "; ".join(map(str, errors)), errors[0].code))
    except OSError as error:
        # No property of the sample: without a block in the output, the next run reads the tar again.
        return replace(result, problems=[*result.problems, f"not read to its end: {error}"])
    return replace(result, bad=bad)


@contextmanager
def _cache_of(row: ShardTable | None, is_changed: bool) -> Iterator[str | None]:
    """Yield an empty folder for the cache of a remote tar that has changed, or else None for the usual cache.

    The usual one may hold ranges of the earlier version, whose index has the same digest.
    """
    if row is None or not is_changed:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        yield folder


def _version(tar: str, index: TarIndex) -> str:
    """Return a text that changes with a tar: the digest covers only parts of large members. Raises: OSError."""
    if is_remote(tar):
        return Remote(StorageOptions().storage_seconds).size(tar)[1]
    return f"{index.tar_bytes} bytes, modified at {index.mtime_ns} ns"


def _wanted(index: TarIndex, caption: str) -> tuple[bool, bool, list[str]]:
    """Return whether each sample of a tar needs an image and a caption, and what no sample has under the right name.

    A tar without any image or caption has this as a problem of its index, not as a reason of every sample.
    """
    field = caption.partition(".")[0]
    extensions = {extension.removesuffix(".gz") for extension in index.members}
    suffixes = {extension.rpartition(".")[2] for extension in extensions}
    has_images, has_captions = not extensions.isdisjoint(IMAGE_EXTENSIONS), field in extensions
    names, num = ", ".join(list(index.members)[:10]), index.num_samples
    missing = []
    if not has_images and not suffixes.isdisjoint(IMAGE_EXTENSIONS):
        missing.append(
            f"none of the {num} samples has a member {', '.join(IMAGE_EXTENSIONS)}, but: {names}; rename them"
        )
    if not has_captions and not suffixes.isdisjoint({*CAPTION_EXTENSIONS, "json"}):
        missing.append(f"none of the {num} samples has a member {field}, but: {names}; name the field: --caption")
    return has_images, has_captions, missing


def _errors(
    shards: Shards, sample: int, wants_image: bool, wants_caption: bool, options: VerifyOptions
) -> list[BadSample]:
    """Return why training would refuse a sample; empty if it would not. Raises: OSError."""
    errors = []
    if wants_image:
        try:
            data = shards.read(sample, IMAGE_EXTENSIONS)
            decode_image(data, CenterCrop(), _IMAGE_SIZE, max_bytes=options.max_image_bytes)
        except BadSample as error:
            errors.append(error)
    if wants_caption:
        try:
            read_captions(shards, sample, options.caption)
        except BadSample as error:
            errors.append(error)
    return errors


def _lines_of(result: _VerifiedTar, bad: Sequence[BadLine], options: VerifyOptions) -> bytes:
    rows: list[dict[str, Any]] = [{"shard": result.tar, **asdict(line)} for line in bad]
    counts = {"num_samples": result.num_samples, "num_bad": len(bad)}
    rows.append({"shard": result.tar, "digest": result.digest, "version": result.version, **counts, **asdict(options)})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read_blocks(output: Path) -> dict[str, _Block]:
    """Return the last block of each tar, and cut off the block that a killed run left unfinished.

    Raises: ValueError if the file is not of this command.
    """
    if not os.path.lexists(output):
        return {}
    blocks: dict[str, _Block] = {}
    start = end = 0
    with open(open_regular(output), "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            if not line.startswith(_BEGINNING[: len(line)]):
                raise _not_ours(output, end)
            if not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
                break
            row = _parsed(output, line, end)
            end += len(line)
            if "digest" in row:
                options = VerifyOptions(row["caption"], row["max_image_bytes"])
                blocks[row["shard"]] = _Block(row["digest"], row.get("version"), options, start, end)
                start = end
    os.truncate(output, start)
    return blocks


def _parsed(output: Path, line: bytes, offset: int) -> dict[str, Any]:
    """Return a line of the output. Raises: ValueError if this command has not written it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise _not_ours(output, offset) from None
    keys = (
        {"shard", "key", "reason", "code"},
        {"shard", "digest", "num_samples", "num_bad", "caption", "max_image_bytes"},
    )
    if not isinstance(row, dict) or set(row) - {"version"} not in keys:
        raise _not_ours(output, offset)
    return row


def _not_ours(output: Path, offset: int) -> ValueError:
    return ValueError(
        f"--output {str(output)!r}: the line at byte {offset} is not of verify; name a new file, or one that verify wrote"
    )


def _read_bad(output: Path, block: _Block) -> list[BadLine]:
    """Return the bad samples of a block."""
    with open(output, "rb") as file:
        file.seek(block.start)
        lines = file.read(block.end - block.start).splitlines()
    return [BadLine(row["key"], row["reason"], row["code"]) for row in map(json.loads, lines[:-1])]
