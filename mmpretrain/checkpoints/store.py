"""Storage of checkpoints: written to a temporary folder, renamed into place, and verified by hash before use, without pickle.

checkpoints/step_00001000/model.safetensors      state of the task: model.* and objectives.*
                          optimizer.safetensors  <parameter>/exp_avg, /exp_avg_sq, /step
                          ema.safetensors        averaged weights, in runs with a moving average
                          state.json             progress of the run
                          manifest.json          SHA-256 and size of each file above
                          scores.json            scores of the step's evaluation, which is done after saving
checkpoints/latest, checkpoints/best             names of the newest and the best checkpoint
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpretrain import files

log = logging.getLogger(__name__)

_NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}
_FILE = re.compile(r"\w+\.safetensors|state\.json")
_MAX_NAME_BYTES = 200


class CorruptCheckpoint(ValueError):
    """A checkpoint's files do not match its manifest."""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file with the default permissions of new files. Raises: OSError if it cannot be written."""
    path.touch()  # gets the default permissions; the library replaces it by a file that only its owner may read
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # raised when the disk is full, for example
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)


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
    path = path_of(folder, step)
    partial = folder / f"{files.PARTIAL}{path.name}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for part, named in tensors.items():
            save_tensors(named, partial / f"{part}.safetensors")
    except OSError:
        shutil.rmtree(partial)
        raise
    names = [*(f"{part}.safetensors" for part in tensors), "state.json"]
    manifest = {name: {"sha256": _sha256(partial / name), "bytes": (partial / name).stat().st_size} for name in names}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for name in (*names, "manifest.json"):
        files.sync(partial / name)
    files.sync(partial)
    partial.rename(path)
    files.sync(folder)
    files.write_text(folder / "latest", path.name + "\n")
    prune(folder, keep_last)
    return path


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step_{step:08d}"


def mark_best(path: Path, keep_last: int) -> None:
    """Point `best` to a checkpoint, and delete the previous best if it is not among the newest `keep_last`."""
    files.write_text(path.parent / "best", path.name + "\n")
    prune(path.parent, keep_last)


def prune(folder: Path, keep_last: int) -> None:
    """Delete all checkpoints except the newest `keep_last` and the best one; 0 keeps all.

    A kill between saving and pruning leaves surplus checkpoints. A resumed or finished run prunes them.
    """
    if keep_last:
        best = read_name(folder / "best") if (folder / "best").exists() else None
        for old in _all(folder)[keep_last:]:
            if old.name != best:
                shutil.rmtree(old)


def write_scores(path: Path, results: Mapping[str, float], best: float | None) -> None:
    """Write scores.json: the last value of every evaluation and the best score, once the step's evaluation is done."""
    files.write_text(path / "scores.json", json.dumps({"results": results, "best": best}, indent=2) + "\n")


def read_name(path: Path) -> str:
    """Return the checkpoint's name in `best` or `latest`. Raises: ValueError if it is not such a name."""
    name = files.read_text(path, _MAX_NAME_BYTES).strip()
    if not re.fullmatch(r"step_\d+", name):
        raise ValueError(f"{path} names {name!r}; expected a checkpoint beside it, such as step_00001000")
    return name


def _all(folder: Path) -> list[Path]:
    """Return all checkpoints of a run, newest first."""
    return sorted(folder.glob("step_*"), key=lambda path: (len(path.name), path.name), reverse=True)


def clean(folder: Path) -> None:
    """Remove partial checkpoints and files that a kill during saving left behind."""
    for partial in folder.glob(f"{files.PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises: CorruptCheckpoint that names the first file that is missing, truncated or changed.
    """
    try:
        manifest = files.read_json(path / "manifest.json")
        expected = {name: _entry(manifest.get(name), name) for name in {*_NEEDED, *manifest}}
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: manifest.json cannot be read ({error})") from error
    for name, (num_bytes, sha256) in expected.items():
        file = path / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{path}: {name} is missing")
        if file.stat().st_size != num_bytes:
            raise CorruptCheckpoint(f"{path}: {name} has {file.stat().st_size} bytes, expected {num_bytes}")
        if _sha256(file) != sha256:
            raise CorruptCheckpoint(f"{path}: {name} has another SHA-256 than when it was saved")


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
        for bad in corrupt if set_aside else ():
            shutil.rmtree(bad.with_name(f"corrupt_{bad.name}"), ignore_errors=True)
            bad.rename(bad.with_name(f"corrupt_{bad.name}"))
        return path
    if corrupt:
        raise CorruptCheckpoint(
            f"none of the {len(corrupt)} checkpoints in {folder} verifies; restore one, or remove the folder to begin anew"
        )
    return None


def load_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Load the tensors of a .safetensors file of a checkpoint, memory-mapped, on the CPU.

    Raises: ValueError if the file is not a valid .safetensors.
    """
    try:
        return load_file(path / name)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / name} holds no tensors ({reason}); expected it as the run wrote it") from error


def load_state(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state.json. Raises: ValueError if it is invalid."""
    state = files.read_json(path / "state.json")
    for key in ("step", "samples"):
        if key in state and (not isinstance(state[key], int) or not 0 <= state[key] < 1 << 63):
            raise ValueError(f"{path / 'state.json'}: {key} is {state[key]!r}; expected a non-negative integer")
    return state
