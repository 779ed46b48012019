"""Storage of checkpoints: written to a temporary folder, renamed into place, and verified by hash before use, without pickle.

checkpoints/step_00001000/model.safetensors      state of the task: model.* and objectives.*
                          optimizer.safetensors  <parameter>/exp_avg, /exp_avg_sq, /step
                          ema.safetensors        averaged weights, in runs with a moving average
                          state.json             progress of the run
                          manifest.json          SHA-256 and size of each file above, and the number of this format
                          scores.json            scores of the step's evaluation, which is done after saving

Where weights are sharded, each .safetensors file is a folder of them, one for each shard (see `tensor_files`).

checkpoints/latest, checkpoints/best             names of the newest and the best checkpoint
"""

import hashlib
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mmpretrain import distributed, files
from mmpretrain.checkpoints import tensor_files

log = logging.getLogger(__name__)

_FORMAT = 1
_NEEDED = ("model", "optimizer")
_FILE = re.compile(r"\w+\.safetensors|\w+/shard-[\w-]+\.safetensors|state\.json")
_MAX_NAME_BYTES = 200


Entry = Mapping[str, Any]
"""`bytes` and `sha256` of a file in manifest.json."""


class CorruptCheckpoint(ValueError):
    """A checkpoint's files do not match its manifest."""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write a checkpoint, point `latest` to it and delete all but the newest `keep_last` and the best one.

    Args:
        folder: the run's `checkpoints` folder.
        step: number of optimiser steps taken, which names the checkpoint.
        tensors: tensors by name for each file: `model`, `optimizer` and, if present, `ema`.
        state: further state of the run, written as JSON.
        keep_last: number of checkpoints to keep; 0 keeps all.

    Returns: the checkpoint's folder.
    Raises: OSError if the checkpoint cannot be written. Earlier checkpoints are kept.
    """
    partial = begin(folder, step)
    written = [partial / f"{part}{tensor_files.SUFFIX}" for part in tensors]
    with or_discard(partial):
        for file, named in zip(written, tensors.values(), strict=True):
            tensor_files.save(named, file)
        path = finish(partial, state, entries(partial, written))
    prune(folder, keep_last)
    return path


def save_sharded(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint like `save`, to which every rank contributes its files and their hashes. A collective.

    Args:
        folder, step, state, keep_last: see `save`; only those of rank 0 count. All ranks must see the same folder.
        tensors: tensors on the CPU by name for each part: DTensors, of which every shard is written once, or tensors that
            are the same on all ranks.
        group: group of all processes, whose backend works on the CPU.

    Raises: OSError on all ranks if a rank cannot write. Earlier checkpoints are kept.
    """
    partial = distributed.from_main(lambda: begin(folder, step), group)
    manifest: dict[str, Entry] = {}
    error = None
    try:
        written = [tensor_files.save_sharded(named, partial / part, group) for part, named in tensors.items()]
        manifest = entries(partial, chain(*written))  # not between the writes, which are collectives
    except OSError as refusal:
        error = refusal
    answers = distributed.gather_objects((manifest, error), group)

    def complete() -> Path:
        with or_discard(partial):
            for _, refusal in answers:
                if refusal is not None:
                    raise refusal
            return finish(partial, state, {name: entry for own, _ in answers for name, entry in own.items()})

    path = distributed.from_main(complete, group)
    if distributed.is_main():
        prune(folder, keep_last)
    return path


def begin(folder: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint. Raises: OSError."""
    partial = folder / f"{files.PARTIAL}{path_of(folder, step).name}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


@contextmanager
def or_discard(partial: Path) -> Iterator[None]:
    """Remove the temporary folder if the block raises OSError."""
    try:
        yield
    except OSError:
        shutil.rmtree(partial)
        raise


def entries(partial: Path, written: Iterable[Path]) -> dict[str, Entry]:
    """Return the entries of a checkpoint's files for its manifest, by path within it, once they are on the disk."""
    found: dict[str, Entry] = {}
    for file in written:
        files.sync(file)
        found[str(file.relative_to(partial))] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
    return found


def finish(partial: Path, state: Mapping[str, Any], manifest: Mapping[str, Entry]) -> Path:
    """Complete a checkpoint whose tensors are on the disk: rename its folder, and point `latest` to it.

    Args:
        partial: the checkpoint's temporary folder.
        state: see `save`.
        manifest: entries of the files with tensors.

    Returns: the checkpoint's folder.
    Raises: OSError.
    """
    folder, name = partial.parent, partial.name.removeprefix(files.PARTIAL)
    state_file, manifest_file = partial / "state.json", partial / "manifest.json"
    # A shard that is missing from the folder and the manifest would look like smaller tensors.
    shards = Counter(name.partition("/")[0] for name in manifest if "/" in name)
    state_file.write_text(json.dumps({**state, **({"shards": shards} if shards else {})}, indent=2) + "\n")
    listed = {"format": _FORMAT, **manifest, **entries(partial, [state_file])}
    manifest_file.write_text(json.dumps(listed, indent=2) + "\n")
    for path in (manifest_file, *filter(Path.is_dir, partial.iterdir()), partial):
        files.sync(path)
    path = partial.rename(folder / name)
    files.sync(folder)
    files.write_text(folder / "latest", name + "\n")
    return path


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def mark_best(path: Path, keep_last: int) -> None:
    """Point `best` to a checkpoint, and delete the previous best if it is not among the newest `keep_last`."""
    files.write_text(path.parent / "best", path.name + "\n")
    prune(path.parent, keep_last)


def prune(folder: Path, keep_last: int) -> None:
    """Delete all checkpoints except the newest `keep_last`, the best one and the one a rollback needs; 0 keeps all.

    A kill between saving and pruning leaves surplus checkpoints. A resumed or finished run prunes them. A checkpoint that
    cannot be deleted is named in a warning.
    """
    if keep_last:
        newest_first = _all(folder)
        kept = {read_name(folder / "best")} if (folder / "best").exists() else set()
        if len(newest_first) > keep_last and (due := load_state(newest_first[0]).get("due_step")):
            kept.add(path_of(folder, due).name)
        for old in newest_first[keep_last:]:
            if old.name not in kept:
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    log.warning("the old checkpoint %s cannot be deleted: %s", old, error)


def go_back(folder: Path, step: int) -> Path:
    """Delete the checkpoints after the newest valid one of at most `step` steps, point `latest` to it, and return it.

    Corrupt ones of at most `step` steps are renamed to `corrupt_*`. `best` is deleted with the checkpoint that it names.

    Raises: CorruptCheckpoint if there is none; OSError.
    """
    corrupt: list[Path] = []
    for path in _all(folder):
        if _place(path) > _place(path_of(folder, step)):
            continue
        try:
            verify(path)
        except CorruptCheckpoint as error:
            log.warning("checkpoint passed over: %s; going back to the one before", error)
            corrupt.append(path)
            continue
        files.write_text(folder / "latest", path.name + "\n")
        _set_aside(corrupt)
        for later in _all(folder):
            if _place(later) > _place(path):
                shutil.rmtree(later)
        best = folder / "best"
        if best.exists() and not (folder / read_name(best)).exists():
            best.unlink()
        return path
    raise CorruptCheckpoint(f"{folder} has no whole checkpoint of at most {step} steps")


def write_scores(path: Path, results: Mapping[str, float], best: float | None) -> None:
    """Write scores.json: the last value of every evaluation and the best score, once the step's evaluation is done."""
    scores = {"results": results, "best": best}
    listed = {**scores, "sha256": _sha256_of(scores)}  # the manifest has been written before
    files.write_text(path / "scores.json", json.dumps(listed, indent=2) + "\n")


def read_scores(path: Path) -> dict[str, Any] | None:
    """Return `results` and `best` of scores.json; None if there is none, or, with a warning, if it is damaged."""
    file = path / "scores.json"
    if not file.exists():
        return None
    try:
        scores = files.read_json(file)
    except ValueError as error:
        log.warning("%s; the step is evaluated again", error)
        return None
    # Earlier versions wrote no hash.
    if set(scores) - {"sha256"} != {"results", "best"} or scores.pop("sha256", None) not in (None, _sha256_of(scores)):
        log.warning("%s is not as the run wrote it; the step is evaluated again", file)
        return None
    return scores


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_name(path: Path) -> str:
    """Return the checkpoint's name in `best` or `latest`. Raises: ValueError if it is not such a name."""
    name = files.read_text(path, _MAX_NAME_BYTES).strip()
    if not re.fullmatch(r"step_\d+", name):
        raise ValueError(f"{path} names {name!r}; expected a checkpoint beside it, such as step_00001000")
    return name


def _all(folder: Path) -> list[Path]:
    """Return all checkpoints of a run, newest first."""
    return sorted(folder.glob("step_*"), key=_place, reverse=True)


def _place(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def clean(folder: Path) -> None:
    """Remove partial checkpoints and files that a kill during saving left behind."""
    for partial in folder.glob(f"{files.PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises: CorruptCheckpoint that names the first file that is missing, truncated or changed; ValueError if another version
        of mmpretrain has written it in another format.
    """
    try:
        manifest = files.read_json(path / "manifest.json")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: manifest.json cannot be read ({error})") from error
    if (version := manifest.pop("format", _FORMAT)) != _FORMAT:  # the first versions wrote no number
        raise ValueError(
            f"{path} has format {version}; expected {_FORMAT}: another version of mmpretrain has written it, which can go on"
        )
    try:
        parts = {name.split("/")[0].removesuffix(".safetensors") for name in manifest}
        needed = {f"{part}.safetensors" for part in _NEEDED if part not in parts} | {"state.json"}
        expected = {name: _entry(manifest.get(name), name) for name in {*needed, *manifest}}
        shards = Counter(name.partition("/")[0] for name in manifest if "/" in name)
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: manifest.json cannot be read ({error})") from error
    for name, (num_bytes, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{path}: {name} is missing")
        if file.stat().st_size != num_bytes:
            raise CorruptCheckpoint(f"{path}: {name} has {file.stat().st_size} bytes, expected {num_bytes}")
        if _sha256(file) != sha256:
            raise CorruptCheckpoint(f"{path}: {name} has another SHA-256 than when it was saved")
    for part in parts:
        for file in (path / f"{part}{tensor_files.SUFFIX}", *(path / part).glob(f"shard-*{tensor_files.SUFFIX}")):
            if file.exists() and str(file.relative_to(path)) not in expected:
                raise CorruptCheckpoint(f"{path}: {file.relative_to(path)} is not in its manifest")
    try:
        told = load_state(path).get("shards", shards)
    except ValueError as error:
        raise CorruptCheckpoint(str(error)) from error
    if told != shards:
        raise CorruptCheckpoint(f"{path}: its manifest lists {dict(shards)} shards, but {told} were written")


def manifest_hash(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's manifest.json, which tells its content apart from that of any other checkpoint."""
    return _sha256(path / "manifest.json")


def _entry(entry: Any, name: str) -> tuple[int, str]:
    """Return (bytes, SHA-256) of a manifest entry. Raises: ValueError if the file name or the size is invalid."""
    if not _FILE.fullmatch(name):
        raise ValueError(f"it names {name!r}; expected files of the checkpoint alone")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        raise ValueError(f"it does not say how many bytes {name} has")
    return entry["bytes"], str(entry.get("sha256"))


def find_latest(folder: Path, set_aside: bool = False) -> Path | None:
    """Return the newest valid checkpoint, or None if there are no checkpoints. Corrupt ones are skipped with a warning.

    Args:
        folder: the run's `checkpoints` folder.
        set_aside: rename corrupt checkpoints to `corrupt_*`, so that a resumed run does not find them again.

    Raises: CorruptCheckpoint if there are checkpoints but none is valid; nothing is renamed then. OSError if a checkpoint
        cannot be read, since it may still be valid.
    """
    corrupt: list[Path] = []
    for path in _all(folder):
        try:
            verify(path)
        except CorruptCheckpoint as error:
            log.warning("checkpoint passed over: %s; going on from the one before", error)
            corrupt.append(path)
            continue
        if set_aside:
            _set_aside(corrupt)
        return path
    if corrupt:
        raise CorruptCheckpoint(
            f"none of the {len(corrupt)} checkpoints in {folder} verifies; restore one, or remove the folder to begin anew"
        )
    return None


def _set_aside(corrupt: Iterable[Path]) -> None:
    """Rename corrupt checkpoints to `corrupt_*`, so that they are not found again."""
    for bad in corrupt:
        shutil.rmtree(bad.with_name(f"corrupt_{bad.name}"), ignore_errors=True)
        bad.rename(bad.with_name(f"corrupt_{bad.name}"))


def has(path: Path, part: str) -> bool:
    """Return True if a checkpoint has tensors of a part: `model`, `optimizer` or `ema`."""
    return any((path / name).exists() for name in (part, f"{part}{tensor_files.SUFFIX}"))


def load_tensors(path: Path, part: str, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint's part: `model`, `optimizer` or `ema` (see `tensor_files.load`)."""
    return tensor_files.load(path / part, like)


def load_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises: ValueError if it is invalid."""
    state = files.read_json(path / "state.json")
    for key in ("step", "samples"):
        if key in state and (not isinstance(state[key], int) or not 0 <= state[key] < 1 << 63):
            raise ValueError(f"{path / 'state.json'}: {key} is {state[key]!r}; expected a non-negative integer")
    return state
