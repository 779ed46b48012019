"""Copy of a run's directory in a bucket or another folder, from which the run goes on on another machine (`run.sync_to`).

A thread of rank 0 looks for new files while the training goes on. Only finished files are copied: a checkpoint's manifest
follows its other files. The newest checkpoint comes first, and an older one is removed from the copy only when a newer one is
complete there, so that the copy always holds one to go on from, however slow the storage is.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mmpretrain import files
from mmpretrain.checkpoints import store
from mmpretrain.data.remote import Remote, canonical, check_address, is_remote

log = logging.getLogger(__name__)

_LOOK_SECONDS, _CHANGING_SECONDS = 5.0, 60.0
_LAST_SECONDS = 30.0  # for a request after a signal: a machine that is taken away waits no longer
_CHECKPOINTS, _MANIFEST, _SCORES = "checkpoints", "manifest.json", "scores.json"


class RunCopy:
    """Copy of a run's directory. Only one process uses it.

    Args:
        folder: the run's directory.
        place: address or folder of the copy.
        seconds: time after which a request that fails again and again is given up.
        keep_last: number of newest checkpoints to keep in the copy, besides those of the folder; 0: all.

    Raises: ValueError if the address holds credentials, is of an unknown kind or cannot be written to, or if the two folders
        overlap.
    """

    def __init__(self, folder: Path, place: str, seconds: float, keep_last: int) -> None:
        check_address(place, "run.sync_to")
        if place.partition("://")[0].lower() in ("http", "https"):
            raise ValueError(f"run.sync_to is {place!r}, which cannot be written to; expected s3://, gs:// or a folder")
        self._place = canonical(place if is_remote(place) else f"file://{os.path.abspath(place)}")
        if self._place.startswith("file://"):
            own, other = os.path.realpath(folder), os.path.realpath(self._place.removeprefix("file://"))
            if os.path.commonpath([own, other]) in (own, other):
                raise ValueError(
                    f"run.sync_to is {place!r}, which overlaps the run's folder {str(folder)!r}; expected another place"
                )
        self._folder, self._checkpoints, self._keep_last = folder, folder / _CHECKPOINTS, keep_last
        self._remote = Remote(seconds)
        self._copied: dict[str, tuple[int, int]] = {}
        self._elsewhere: set[str] = set()  # checkpoints of the copy that the folder lacks
        self._stale: set[str] = set()  # those that are incomplete or damaged, or that differ from the folder's
        self._pointed: dict[str, str | None] = {}  # checkpoints that `latest` and `best` of the copy name
        self._changing_at = 0.0
        self._has_warned = False

    def configuration(self) -> str | None:
        """Return config.yaml of the copy; None if there is no copy yet. Raises: Unreachable."""
        content = self._read("config.yaml")
        return None if content is None else content.decode("utf-8", "replace")

    def restore(self) -> tuple[str | None, list[str]]:
        """Fetch the run if the copy is ahead of the folder: the newest whole checkpoint, the best one and the one that
        rollbacks go to, and all other files. Nothing of the folder is replaced before these checkpoints are verified.

        Returns: name of the newest checkpoint that was fetched, or None, and warnings of damaged ones.
        Raises: Unreachable; ValueError if the copy is not that of a run, or if the folder has no checkpoint and none of the
            copy's is whole.
        """
        names, own, warnings = self._names(), self._own(), list[str]()
        held = {_checkpoint_of(name) for name in names} - {""}
        complete = _newest_first(name for name in held if f"{_CHECKPOINTS}/{name}/{_MANIFEST}" in names)
        newer = [name for name in complete if not own or _age(name) > _age(own[0])]
        self._pointed = {pointer: self._read_pointer(pointer) for pointer in ("latest", "best")}
        restored = next((name for name in newer if self._fetch_checkpoint(names, name, warnings)), None)
        damaged = set(newer[: newer.index(restored)] if restored else newer)
        if damaged and not restored and not own:
            raise ValueError(
                f"run.sync_to: none of the {len(damaged)} checkpoints in {self._place} is whole ({warnings[0]}); restore "
                "one, or remove the copy to begin anew"
            )
        if restored:
            due = store.load_state(self._partial(restored)).get("due_step")
            wanted = {self._pointed["best"]}
            if isinstance(due, int) and due > 0:
                wanted.add(store.path_of(self._checkpoints, due).name)
            further = [name for name in complete if name in wanted - {restored} and not self._is_same(name)]
            fetched = [name for name in further if self._fetch_checkpoint(names, name, warnings)]
            damaged.update(set(further) - set(fetched))
            self._place_fetched(names, [*fetched, restored])
        own = self._own()
        same = {name for name in complete if name in own and self._is_same(name)}
        self._elsewhere = set(complete) - set(own) - damaged
        self._stale = held - same - self._elsewhere
        self._copied = {
            name: self._described(self._folder / name)
            for name in names
            if _checkpoint_of(name) in same and not name.endswith(f"/{_SCORES}")
        }
        return restored, warnings

    def _fetch_checkpoint(self, names: Collection[str], checkpoint: str, warnings: list[str]) -> bool:
        """Fetch a checkpoint into a temporary folder. Returns: False, with a warning, if it is damaged."""
        partial, place = self._partial(checkpoint), f"{self._place}/{_CHECKPOINTS}/{checkpoint}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            for name in names:
                if _checkpoint_of(name) == checkpoint:
                    self._fetch(name, partial / PurePosixPath(name).relative_to(_CHECKPOINTS, checkpoint))
            store.verify(partial)
        except (FileNotFoundError, store.CorruptCheckpoint) as error:
            warnings.append(str(error).replace(str(partial), place))
            shutil.rmtree(partial, ignore_errors=True)
            return False
        return True

    def _place_fetched(self, names: Collection[str], checkpoints: list[str]) -> None:
        """Fetch the other files, and move fetched checkpoints to their names, the newest one last: it ends the restoring."""
        for name in names:
            if not name.startswith(f"{_CHECKPOINTS}/"):
                path = self._folder / name
                partial = path.with_name(f"{files.PARTIAL}{path.name}")
                self._fetch(name, partial)
                partial.replace(path)
        for checkpoint in checkpoints:
            if (path := self._checkpoints / checkpoint).exists():  # of another content
                shutil.rmtree(path)
            self._partial(checkpoint).rename(path)
        files.write_text(self._checkpoints / "latest", f"{checkpoints[-1]}\n")
        best = self._pointed["best"]
        if best is not None and (self._checkpoints / best / _MANIFEST).exists():
            files.write_text(self._checkpoints / "best", f"{best}\n")

    def _partial(self, checkpoint: str) -> Path:
        return self._checkpoints / f"{files.PARTIAL}{checkpoint}"

    def _fetch(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._remote.fetch(f"{self._place}/{name}", path)

    def _read(self, name: str) -> bytes | None:
        """Return the content of a file of the copy; None if there is none."""
        try:
            return self._remote.read(f"{self._place}/{name}")
        except FileNotFoundError:
            return None

    def _read_pointer(self, pointer: str) -> str | None:
        """Return the name in `latest` or `best` of the copy; None if there is none."""
        name = (self._read(f"{_CHECKPOINTS}/{pointer}") or b"").decode("ascii", "replace").strip()
        return name if _is_checkpoint(name) else None

    def _is_same(self, checkpoint: str) -> bool:
        """Return True if the folder has a checkpoint with the same content as the copy's, by their hashes."""
        own = self._checkpoints / checkpoint / _MANIFEST
        return own.exists() and own.read_bytes() == self._read(f"{_CHECKPOINTS}/{checkpoint}/{_MANIFEST}")

    def _own(self) -> list[str]:
        """Return the names of the folder's checkpoints, newest first."""
        return _newest_first(path.parent.name for path in self._checkpoints.glob(f"step_*/{_MANIFEST}"))

    def _complete(self) -> list[str]:
        """Return the names of the checkpoints that are complete in the copy, newest first."""
        return _newest_first(
            {_checkpoint_of(name) for name in self._copied if name.endswith(f"/{_MANIFEST}")} | self._elsewhere
        )

    def _names(self) -> list[str]:
        """Return the names of the copy's files, relative to it, checked: nothing outside of the folder is written."""
        names: list[str] = []
        for address in self._remote.walk(self._place):
            name = address.removeprefix(f"{self._place}/")
            if name == address or ".." in PurePosixPath(name).parts or name.startswith("/"):
                raise ValueError(f"run.sync_to: {self._place} has a file {name!r}; expected the copy of a run")
            if not any(part.startswith(".") for part in PurePosixPath(name).parts):  # such as a lock
                names.append(name)
        return names

    @contextmanager
    def kept_up(self) -> Iterator[Callable[[], None]]:
        """Copy new files while the block runs, and the rest when it ends. Failures are warnings: the run goes on.

        Yields: function that copies what must not be lost when the process has to end soon, after a signal: the newest
            checkpoint and the other files. It may be called from any thread.
        """
        ends = threading.Event()

        def work() -> None:
            is_behind = False
            while not ends.wait(0.0 if is_behind else _LOOK_SECONDS):
                is_behind = self.update()

        thread = threading.Thread(target=work, name="run.sync_to", daemon=True)

        def end() -> None:
            ends.set()
            thread.join()
            self._changing_at = 0.0

        def hurry() -> None:
            self._remote.deadline_seconds = min(self._remote.deadline_seconds, _LAST_SECONDS)
            end()
            until = time.monotonic() + _LAST_SECONDS
            while self.update(is_last=True) and time.monotonic() < until:
                pass

        thread.start()
        try:
            yield hurry
        finally:
            is_given_up = ends.is_set() and self._has_warned  # the storage is away, and the process has to end
            end()
            while not is_given_up and self.update(is_last=True):
                pass

    def update(self, is_last: bool = False) -> bool:
        """Copy the newest checkpoint that the copy lacks and what else is new, and remove checkpoints that are surplus.

        Args:
            is_last: whether the run ends, which a warning of a failure then says.

        Returns: True if further checkpoints may wait.
        """
        try:
            is_behind = self._copy_newest()
            self._copy_scores()
            self._point()
            self._remove_surplus()
            if time.monotonic() - self._changing_at > _CHANGING_SECONDS or not self._changing_at:
                self._copy_others()
                self._changing_at = time.monotonic()
            self._has_warned = False
        except Exception as error:  # file systems have exceptions of their own, and a run is worth more than its copy
            if is_last:
                log.warning("run.sync_to: %s; the copy is not complete, and the same command completes it", error)
            elif not self._has_warned:  # once for each time that the storage is away
                log.warning("run.sync_to: %s; the run goes on, and copying is tried again", error)
            self._has_warned = True
            return False
        return is_behind

    def _copy_newest(self) -> bool:
        """Copy the newest checkpoint that the copy lacks. Returns: False if there is none."""
        for checkpoint in self._own():
            manifest = f"{_CHECKPOINTS}/{checkpoint}/{_MANIFEST}"
            described, known = self._described(self._folder / manifest), self._copied.get(manifest)
            if known == described:
                continue
            with self._held(checkpoint) as held:
                if held is None:
                    continue
                if checkpoint in self._stale or known is not None:
                    # A rollback has written it anew: the old manifest must not stand beside new files.
                    self._remove(checkpoint)
                for path in sorted(held.rglob("*"), key=lambda path: (path.name == _MANIFEST, path)):
                    if path.is_file():
                        self._copy(path, f"{_CHECKPOINTS}/{checkpoint}/{path.relative_to(held).as_posix()}")
            return True
        return False

    @contextmanager
    def _held(self, checkpoint: str) -> Iterator[Path | None]:
        """Hold a checkpoint's files by links in a hidden folder, since the run may delete it while it is copied.

        Yields: the folder; None if the checkpoint is being deleted.
        """
        source, held = self._checkpoints / checkpoint, self._checkpoints / f"{files.PARTIAL}copy"
        shutil.rmtree(held, ignore_errors=True)
        try:
            yield held if _is_linked(source, held) else None
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _copy_scores(self) -> None:
        """Copy the scores of checkpoints that were evaluated after they were copied."""
        own = self._own()
        for checkpoint in self._complete():
            if checkpoint in own and (path := self._checkpoints / checkpoint / _SCORES).exists():
                self._copy(path, f"{_CHECKPOINTS}/{checkpoint}/{_SCORES}")

    def _point(self) -> None:
        """Let `latest` and `best` of the copy name checkpoints that are complete there."""
        own, complete, best = self._own(), self._complete(), self._checkpoints / "best"
        # A rollback deletes checkpoints: later ones than the folder's newest are no longer part of the run.
        latest = next((name for name in complete if own and _age(name) <= _age(own[0])), None)
        for pointer, name in (("latest", latest), ("best", store.read_name(best) if best.exists() else None)):
            if name in complete and self._pointed.get(pointer) != name:
                self._remote.write(f"{self._place}/{_CHECKPOINTS}/{pointer}", f"{name}\n".encode())
                self._pointed[pointer] = name

    def _remove_surplus(self) -> None:
        """Remove the checkpoints that the run has deleted, but none that `latest` or `best` of the copy names, and none of
        the newest `keep_last` that are complete there.
        """
        own, latest = self._own(), self._pointed.get("latest")
        kept = {*own, *self._pointed.values()}
        # Checkpoints that another machine has copied become surplus like the folder's own (see `store.prune`).
        before = [name for name in self._complete() if not own or _age(name) <= _age(own[0])]
        kept |= set(before[: self._keep_last]) if self._keep_last else self._elsewhere
        passed = {name for name in self._stale if latest is not None and _age(name) < _age(latest)}
        for checkpoint in ({_checkpoint_of(name) for name in self._copied} | self._elsewhere | passed) - kept - {""}:
            self._remove(checkpoint)

    def _remove(self, checkpoint: str) -> None:
        """Remove a checkpoint from the copy."""
        self._remote.remove(f"{self._place}/{_CHECKPOINTS}/{checkpoint}")
        self._copied = {each: known for each, known in self._copied.items() if _checkpoint_of(each) != checkpoint}
        self._elsewhere.discard(checkpoint)
        self._stale.discard(checkpoint)

    def _copy_others(self) -> None:
        for path in sorted(self._folder.rglob("*")):
            place = path.relative_to(self._folder)
            is_hidden = any(part.startswith(".") for part in place.parts)  # the lock, and files that are being written
            if place.parts[0] != _CHECKPOINTS and not is_hidden and path.is_file():
                self._copy(path, place.as_posix())

    def _copy(self, path: Path, name: str) -> None:
        """Copy a file unless its copy is of the same size and time, or it has been deleted meanwhile."""
        described = self._described(path)
        if self._copied.get(name) != described:
            try:
                self._remote.put(path, f"{self._place}/{name}")
            except FileNotFoundError:
                if path.exists():  # the bucket is missing
                    raise
            else:
                self._copied[name] = described

    def _described(self, path: Path) -> tuple[int, int]:
        """Return size and time of a file, which tell whether it has changed; zeros if it does not exist."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_size, stat.st_mtime_ns


def _is_linked(source: Path, held: Path) -> bool:
    """Link a checkpoint's files in the folder `held`. Returns: False if the checkpoint lacks files of its manifest."""
    try:
        for path in source.rglob("*"):
            if path.is_file():
                link = held / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, link)
                except FileNotFoundError:
                    raise
                except OSError:  # a file system without links
                    shutil.copy2(path, link)
        return all((held / name).is_file() for name in files.read_json(held / _MANIFEST) if name != "format")
    except FileNotFoundError:
        return False


def _checkpoint_of(name: str) -> str:
    """Return the checkpoint that a file belongs to; an empty text for other files."""
    parts = PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 and parts[0] == _CHECKPOINTS and _is_checkpoint(parts[1]) else ""


def _is_checkpoint(name: str) -> bool:
    return re.fullmatch(r"step_\d+", name) is not None


def _age(name: str) -> tuple[int, str]:
    """Return a checkpoint's place in the order of steps."""
    return len(name), name


def _newest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=_age, reverse=True)
