"""Copy of a run's directory in a bucket or another folder, from which the run goes on on another machine (`run.sync_to`).

A thread of rank 0 looks for new files while the training goes on. Only finished files are copied: a checkpoint's manifest
follows its other files, and `checkpoints/latest` follows the checkpoint.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from mmpretrain import files
from mmpretrain.checkpoints import store
from mmpretrain.data.remote import Remote, check_address, is_remote

log = logging.getLogger(__name__)

_LOOK_SECONDS, _CHANGING_SECONDS = 5.0, 60.0
_LAST_SECONDS = 30.0  # for a request at the end: a machine that is taken away waits no longer
_CHECKPOINTS, _MANIFEST = "checkpoints", "manifest.json"
_POINTERS = (f"{_CHECKPOINTS}/latest", f"{_CHECKPOINTS}/best")


class RunCopy:
    """Copy of a run's directory. Only one process uses it.

    Args:
        folder: the run's directory.
        place: address or folder of the copy.
        seconds: time after which a request that fails again and again is given up.
        keep_last: number of newest checkpoints to keep in the copy, besides those of the folder; 0: all.

    Raises: ValueError if the address holds credentials or cannot be written to, or if the two folders overlap.
    """

    def __init__(self, folder: Path, place: str, seconds: float, keep_last: int) -> None:
        check_address(place, "run.sync_to")
        if place.partition("://")[0] in ("http", "https"):
            raise ValueError(f"run.sync_to is {place!r}, which cannot be written to; expected s3://, gs:// or a folder")
        if not is_remote(place):
            own, other = os.path.realpath(folder), os.path.realpath(place)
            if os.path.commonpath([own, other]) in (own, other):
                raise ValueError(
                    f"run.sync_to is {place!r}, which overlaps the run's folder {str(folder)!r}; expected another place"
                )
        self._folder, self._keep_last = folder, keep_last
        self._place = (place if is_remote(place) else f"file://{os.path.abspath(place)}").rstrip("/")
        self._remote = Remote(seconds)
        self._copied: dict[str, tuple[int, int]] = {}
        self._elsewhere: set[str] = set()  # checkpoints of the copy that the folder lacks
        self._outdated: set[str] = set()  # checkpoints of the copy that the folder has with another content
        self._changing_at = 0.0
        self._has_warned = False
        self._restored: str | None = None

    def configuration(self) -> str | None:
        """Return config.yaml of the copy; None if there is no copy yet. Raises: Unreachable."""
        try:
            return self._remote.read(f"{self._place}/config.yaml").decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def restore(self) -> None:
        """Fetch the run if the copy is ahead of the folder: the newest checkpoint, the best one and the one that rollbacks
        go to, and all other files.

        Raises: Unreachable; ValueError if the copy is not that of a run.
        """
        names = self._names()
        theirs = self._checkpoint(names, "latest")
        if theirs is not None and theirs > self._latest():
            self._restored = theirs
            self._fetch(names, {theirs, self._checkpoint(names, "best"), self._due(theirs)})
        complete = {_checkpoint_of(name) for name in names if name.endswith(f"/{_MANIFEST}")} - {""}
        self._elsewhere = {name for name in complete if not (self._folder / _CHECKPOINTS / name).exists()}
        self._outdated = {name for name in complete - self._elsewhere if not self._is_same(name)}
        current = complete - self._elsewhere - self._outdated
        self._copied = {
            name: self._described(name)
            for name in names
            if _checkpoint_of(name) in current and not name.endswith("/scores.json")
        }

    def _due(self, checkpoint: str) -> str | None:
        """Return the name of the checkpoint that rollbacks go to, as the newest one has it."""
        state = json.loads(self._remote.read(f"{self._place}/{_CHECKPOINTS}/{checkpoint}/state.json"))
        due = state.get("due_step") if isinstance(state, dict) else None
        return store.path_of(self._folder, due).name if isinstance(due, int) and due > 0 else None

    def _is_same(self, checkpoint: str) -> bool:
        """Return True if the copy of a checkpoint has the same content as the folder's, by their hashes."""
        own = self._folder / _CHECKPOINTS / checkpoint / _MANIFEST
        theirs = self._remote.read(f"{self._place}/{_CHECKPOINTS}/{checkpoint}/{_MANIFEST}")
        return own.exists() and own.read_bytes() == theirs

    def _latest(self) -> str:
        """Return the name of the folder's newest checkpoint; an empty one without any."""
        pointer = self._folder / _POINTERS[0]
        name = store.read_name(pointer) if pointer.exists() else ""
        return name if name and (pointer.parent / name).exists() else ""

    def _fetch(self, names: Sequence[str], checkpoints: Collection[str | None]) -> None:
        """Fetch some checkpoints and all other files; what points to the checkpoints comes last."""
        wanted = [
            name
            for name in names
            if name in _POINTERS or not _checkpoint_of(name) or _checkpoint_of(name) in checkpoints
        ]
        for name in sorted(wanted, key=_POINTERS.__contains__):
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{files.PARTIAL}{path.name}")
            self._remote.fetch(f"{self._place}/{name}", partial)
            partial.replace(path)

    def _described(self, name: str) -> tuple[int, int]:
        """Return size and time of a file, which tell whether it has changed; zeros if it does not exist."""
        try:
            stat = (self._folder / name).stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_size, stat.st_mtime_ns

    def _names(self) -> list[str]:
        """Return the names of the copy's files, relative to it, checked: nothing outside of the folder is written."""
        names = [url.removeprefix(f"{self._place}/") for url in self._remote.walk(self._place)]
        for name in names:
            if ".." in PurePosixPath(name).parts or name.startswith("/"):
                raise ValueError(f"run.sync_to: {self._place} has a file {name!r}; expected the copy of a run")
        return names

    def _checkpoint(self, names: list[str], pointer: str) -> str | None:
        """Return the name of the checkpoint that `latest` or `best` names, if it is complete."""
        if f"{_CHECKPOINTS}/{pointer}" not in names:
            return None
        name = self._remote.read(f"{self._place}/{_CHECKPOINTS}/{pointer}").decode("ascii", "replace").strip()
        return name if f"{_CHECKPOINTS}/{name}/{_MANIFEST}" in names else None

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Copy new files while the block runs, and the rest when it ends. Failures are warnings: the run goes on."""
        if self._restored is not None:  # the log opens after the run is fetched
            log.info("%s was fetched from %s: %s", self._folder, self._place, self._restored)
        ends = threading.Event()

        def work() -> None:
            while not ends.wait(_LOOK_SECONDS):
                self.update()

        thread = threading.Thread(target=work, name="run.sync_to", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()
            self._changing_at = 0.0
            self._remote.deadline_seconds = min(self._remote.deadline_seconds, _LAST_SECONDS)
            self.update()

    def update(self) -> None:
        """Copy what is new, and remove checkpoints that the run has deleted."""
        try:
            self._copy_checkpoints()
            if time.monotonic() - self._changing_at > _CHANGING_SECONDS or not self._changing_at:
                self._copy_others()
                self._changing_at = time.monotonic()
            self._has_warned = False
        except Exception as error:  # file systems have exceptions of their own, and a run is worth more than its copy
            if not self._has_warned:  # once for each time that the storage is away
                log.warning("run.sync_to: %s; the run goes on, and copying is tried again", error)
            self._has_warned = True

    def _copy_checkpoints(self) -> None:
        folder = self._folder / _CHECKPOINTS
        complete = {path.parent.name for path in folder.glob(f"step_*/{_MANIFEST}")}
        for name in sorted(complete):
            with suppress(FileNotFoundError):  # deleted meanwhile, since newer ones are there
                manifest = f"{_CHECKPOINTS}/{name}/{_MANIFEST}"
                if name in self._outdated or self._copied.get(manifest) not in (None, self._described(manifest)):
                    self._remove(
                        name
                    )  # a rollback has written it anew: the old manifest must not stand beside new files
                own = sorted(path for path in (folder / name).rglob("*") if path.is_file() and path.name != _MANIFEST)
                for path in [*own, folder / name / _MANIFEST]:
                    self._copy(path)
        for pointer in _POINTERS:
            path = self._folder / pointer
            if path.exists() and store.read_name(path) in complete:
                self._copy(path)
        for name in {_checkpoint_of(each) for each in self._copied} - {""}:
            if not (folder / name).exists():
                self._remove(name)
        # Checkpoints that another machine has copied become surplus like the folder's own (see `store.prune`).
        newest_first = sorted({*complete, *self._elsewhere}, key=lambda name: (len(name), name), reverse=True)
        for name in newest_first[self._keep_last :] if self._keep_last else ():
            if name in self._elsewhere:
                self._remove(name)

    def _remove(self, checkpoint: str) -> None:
        """Remove a checkpoint from the copy."""
        self._remote.remove(f"{self._place}/{_CHECKPOINTS}/{checkpoint}")
        self._copied = {each: known for each, known in self._copied.items() if _checkpoint_of(each) != checkpoint}
        self._elsewhere.discard(checkpoint)
        self._outdated.discard(checkpoint)

    def _copy_others(self) -> None:
        for path in sorted(self._folder.rglob("*")):
            parts = path.relative_to(self._folder).parts
            is_hidden = any(part.startswith(".") for part in parts)  # the lock, and files that are being written
            if parts[0] != _CHECKPOINTS and not is_hidden and path.is_file():
                with suppress(FileNotFoundError):
                    self._copy(path)

    def _copy(self, path: Path) -> None:
        """Copy a file unless its copy is of the same size and time."""
        name = path.relative_to(self._folder).as_posix()
        described = self._described(name)
        if self._copied.get(name) != described:
            self._remote.put(path, f"{self._place}/{name}")
            self._copied[name] = described


def _checkpoint_of(name: str) -> str:
    """Return the checkpoint that a file belongs to; an empty text for other files."""
    parts = PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 and parts[0] == _CHECKPOINTS else ""
