"""Output folder of a build: ownership of its files, locking and completion.

`manifest.json` marks a complete build and lists its shards. `building.json` exists during a build and lists every file
that the build writes or has yet to delete. A build changes only files that one of the two lists, and none that differs
from its entry in the manifest.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.shard_writer import WrittenShard, delete_shard, file_sha256, shard_bounds, shard_path
from mmpretrain.data.stored_index import index_path

JOURNAL = "building.json"
MANIFEST = "manifest.json"
REFUSALS = "refused.jsonl"
CLASSES = "classes.tsv"
MADE_BY = "mmpretrain data_tools"

_LOCK = ".building.lock"
_LOCK_SECONDS = 5.0  # the workers of a killed build hold its lock until they notice its end
_SHARD_NAME = re.compile(r"\d{6,}\.tar")
_TEMPORARY = re.compile(r"\.(.+?\.(?:tar|json|jsonl|tsv|npz))(?:\.[^.]+){0,2}\.tmp")  # indexes add process and thread
_FORMER_JOURNAL = re.compile(r"(?:[0-9a-f]{64})?")  # the format before JSON: the plan alone


@dataclass(frozen=True)
class _Earlier:
    """Files of earlier builds, and the plan of an unfinished one, whose shards may be kept."""

    files: frozenset[str]
    plan: str | None


@contextmanager
def locked_output(output: Path, files: Sequence[str] = ()) -> Iterator[None]:
    """Lock an output folder for one build, as `locked_folder` does. Raises: errors of `check_output` and `locked_folder`."""
    check_output(output, files)
    with locked_folder(output):
        yield


@contextmanager
def locked_folder(output: Path) -> Iterator[None]:
    """Lock a folder for one command. A missing folder is created, and removed again if it stays empty.

    Raises: ValueError if another command has locked the folder.
    """
    is_new = not output.exists()
    lock = _lock(output)
    try:
        yield
    finally:
        (output / _LOCK).unlink(missing_ok=True)
        os.close(lock)
        if is_new:
            with suppress(OSError):  # not empty
                output.rmdir()


def _lock(output: Path) -> int:
    """Lock the folder's lock file and return its descriptor.

    Raises: ValueError if another build holds the lock or the file system supports no locks.
    """
    output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            lock = os.open(output / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _in_the_way(output, _LOCK) from error
            raise
        try:
            # flock, not a POSIX lock: forked workers of a killed build may still write, and must hold the lock, too.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise ValueError(
                    f"--output {str(output)!r}: cannot be locked ({error.strerror}); name a folder elsewhere"
                ) from error
            if _is_held_by_a_living(output / _LOCK) or time.monotonic() > until:
                raise ValueError(
                    f"--output {str(output)!r}: another command is writing there; wait for it, or name another folder"
                ) from error
            time.sleep(0.05)
            continue
        if os.fstat(lock).st_nlink:
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
            return lock
        os.close(lock)  # the previous holder has deleted the file


def _is_held_by_a_living(lock: Path) -> bool:
    """Return True if the build that took the lock is running; False if only workers of a killed build hold it."""
    try:
        os.kill(int(lock.read_text()), 0)
    except PermissionError:
        return True
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return False
    return True


def check_output(output: Path, files: Iterable[str] = ()) -> None:
    """Check that a build may write to a folder. Only the sizes of listed tars are checked; `open_output` reads them.

    Raises: ValueError if the folder holds a tar or one of `files` that no build wrote, or a changed file of an earlier
        build.
    """
    _earlier_build(output, files, read_tars=False)


def _earlier_build(output: Path, files: Iterable[str], read_tars: bool) -> _Earlier:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {str(output)!r}: is a file; expected a folder, new or an earlier build's")
    owned: set[str] = set()
    plan = None
    if os.path.lexists(output / MANIFEST):
        owned |= _listed_in_manifest(output, read_tars)
    if os.path.lexists(output / JOURNAL):
        listed, plan = _listed_in_journal(output)
        owned |= listed
    for name in [*sorted(tar.name for tar in output.glob("*.tar")), *files]:
        if name not in owned and os.path.lexists(output / name):
            raise _in_the_way(output, name)
    return _Earlier(frozenset(owned), plan)


def _in_the_way(output: Path, name: str) -> ValueError:
    return ValueError(f"--output {str(output)!r}: holds {name}, which no build wrote; name another folder")


def _listed_in_manifest(output: Path, read_tars: bool) -> set[str]:
    """Return the names of the files of a complete build.

    Raises: ValueError if the manifest is not from a build, or a file differs from its entry.
    """
    manifest = _read_json(output / MANIFEST)
    shards: Any = manifest.get("shards")
    sha256: Any = manifest.get("sha256", {})
    is_ours = (
        manifest.get("made_by", MADE_BY) == MADE_BY  # absent in earlier versions
        and isinstance(manifest.get("num_samples"), int)
        and isinstance(manifest.get("options"), dict)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and {"num_samples", "tar_bytes", "digest"} <= shard.keys() for shard in shards)
        and isinstance(sha256, dict)
    )
    names = {str(shard.get("name")) for shard in shards} if is_ours else set()
    if not is_ours or not all(map(_SHARD_NAME.fullmatch, names)):
        raise _in_the_way(output, MANIFEST)
    for shard in shards:
        path = output / str(shard["name"])
        if os.path.lexists(path):
            if not path.is_file() or path.stat().st_size != shard["tar_bytes"]:
                raise _replaced(output, path.name)
            if read_tars and "sha256" in shard and file_sha256(path) != shard["sha256"]:
                raise _replaced(output, path.name)
    if "num_refused" in manifest:
        names.add(REFUSALS)
    if "pairs" in manifest and manifest.get("num_classes") is not None:
        names.add(CLASSES)
    for name in sorted(names & {REFUSALS, CLASSES} & sha256.keys()):  # earlier versions stored no hashes
        path = output / name
        if os.path.lexists(path) and (not path.is_file() or file_sha256(path) != sha256[name]):
            raise _replaced(output, name)
    return names


def _replaced(output: Path, name: str) -> ValueError:
    return ValueError(
        f"--output {str(output)!r}: {name} has changed since the build there wrote it ({MANIFEST} lists another size or "
        "sha256); move it away, or name another folder"
    )


def _listed_in_journal(output: Path) -> tuple[set[str], str | None]:
    """Return the files and the plan of an unfinished build. Raises: ValueError if the journal is not from a build."""
    path = output / JOURNAL
    if path.is_file() and path.stat().st_size <= 64 and _FORMER_JOURNAL.fullmatch(path.read_text(errors="replace")):
        # A build of that version deleted all other tars before it wrote its own.
        tars = {tar.name for tar in output.glob("*.tar") if _SHARD_NAME.fullmatch(tar.name)}
        return tars | {REFUSALS, CLASSES}, None
    journal = _read_json(path)
    files = journal.get("files")
    if journal.get("made_by") != MADE_BY or not isinstance(files, list) or not all(map(_may_be_listed, files)):
        raise _in_the_way(output, JOURNAL)
    return set(files), journal.get("plan")


def _may_be_listed(name: object) -> bool:
    return isinstance(name, str) and (name in (REFUSALS, CLASSES) or _SHARD_NAME.fullmatch(name) is not None)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return {}
    return value if isinstance(value, dict) else {}


def open_output(
    output: Path, plan: str, num_samples: int, samples_per_shard: int, texts: Sequence[str] = ()
) -> list[tuple[Path, int, int]]:
    """Prepare a folder for a build. Files of a killed build with the same plan are kept; other builds' are deleted.

    Args:
        output: folder of the build, locked by `locked_output`.
        plan: hash of everything that determines the shards' bytes.
        num_samples: number of samples of the build.
        samples_per_shard: upper bound of the samples of a shard.
        texts: names of the text files beside the shards.

    Returns: (path, first sample, the one after the last sample) of each shard to write.
    Raises: ValueError, before anything is written, if the folder holds a tar or one of `texts` that no build wrote, or
        a file of an earlier build that differs from its entry in the manifest.
    """
    bounds = shard_bounds(num_samples, samples_per_shard)
    shards = [(shard_path(output, shard), low, high) for shard, (low, high) in enumerate(bounds)]
    files = [*(path.name for path, _, _ in shards), *texts]
    earlier = _earlier_build(output, files, read_tars=True)
    if earlier.plan != plan:
        # From here on the folder is an unfinished build without a plan: its shards will not be kept.
        _write_journal(output, None, sorted({*earlier.files, *files}))
        (output / MANIFEST).unlink(missing_ok=True)
        for name in sorted(earlier.files):
            if name.endswith(".tar"):
                delete_shard(output / name)
            else:
                (output / name).unlink(missing_ok=True)
        _write_journal(output, plan, files)
    _delete_temporary(output, {*earlier.files, *files})
    return shards


def _write_journal(output: Path, plan: str | None, files: Sequence[str]) -> None:
    write_atomically(output / JOURNAL, json.dumps({"made_by": MADE_BY, "plan": plan, "files": list(files)}) + "\n")


def _delete_temporary(output: Path, files: set[str]) -> None:
    """Delete the temporary files that a killed build left."""
    names = {*files, *(index_path(name).name for name in files), JOURNAL, MANIFEST}
    for leftover in output.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(leftover.name)
        if match is not None and match[1] in names:
            leftover.unlink()


def close_output(
    output: Path, shards: Sequence[WrittenShard], description: Mapping[str, object], texts: Iterable[str] = ()
) -> None:
    """Write the manifest, which marks the build as complete, and delete the journal.

    Args:
        output: folder of the build.
        shards: shards that were written.
        description: further contents of the manifest.
        texts: names of the text files beside the shards. The manifest records their hashes, since users may edit them.
    """
    manifest = {
        "made_by": MADE_BY,
        "num_samples": sum(shard.num_samples for shard in shards),
        **description,
        "shards": [asdict(shard) for shard in shards],
        "sha256": {name: file_sha256(output / name) for name in texts},
    }
    write_atomically(output / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    (output / JOURNAL).unlink()


def write_refusals(output: Path, refusals: Iterable[str]) -> None:
    """Write `refused.jsonl`: one JSON object per refused row or document, in input order."""
    write_atomically(output / REFUSALS, (refusal + "\n" for refusal in refusals))


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a UTF-8 text file, given whole or in parts, to a temporary file and rename it into place.

    Lone surrogates, as in file names that are not UTF-8, are written as JSON escapes: `\\udcff`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a leftover file, or a symbolic link
    with open(temporary, "x", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines([text] if isinstance(text, str) else text)
    os.replace(temporary, path)
