"""Embeddings of data sets on disk, for later evaluations of the same weights on the same data."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmpretrain import __version__, distributed, files
from mmpretrain.batch import Refused
from mmpretrain.evals.embeddings import Embedded, EvalSet, tell_refused

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_TENSORS = ("images", "features", "texts", "text_features", "samples", "pairs", "labels")


class EmbeddingCache:
    """Folder of embeddings. Files unused for longest are removed when all of them take more than `max_bytes`.

    Args:
        folder: folder of the files; it is created when embeddings are written.
        model: text that identifies the weights, the tokenizer and the precision.
        max_bytes: limit on the size of all files, in bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], model: str, max_bytes: int = 10_000_000_000) -> None:
        self.folder = Path(folder).expanduser()
        self._model = model
        self._max_bytes = max_bytes

    def embedded(self, data: EvalSet, batch_size: int, device: torch.device, embed: Callable[[], Embedded]) -> Embedded:
        """Return the embeddings of a data set: those on disk, or the result of `embed`, which is written. A collective.

        Args:
            data: the data set.
            batch_size: number of samples that a device embeds at once. The last bits of embeddings depend on it.
            device: device of the embeddings.
            embed: collective function that embeds the data set.
        """
        path = self.folder / f"{self._key(data, batch_size, device)}{_SUFFIX}"
        found = self._read(path, device)
        # Machines have folders of their own.
        if all(distributed.gather_objects(found is not None)):
            assert found is not None
            if distributed.is_main():
                log.info("the embeddings of %s were computed before: %s", data.shown_key, path)
            tell_refused(data, found.refused)
            return found
        embedded = embed()
        if distributed.local_rank() == 0:
            self._write(embedded, path)
        return embedded

    def _key(self, data: EvalSet, batch_size: int, device: torch.device) -> str:
        preprocess = None if data.preprocess is None else vars(data.preprocess)
        parts = {
            "version": __version__, "tensors": _TENSORS, "model": self._model, "device": device.type,
            "batch_size": batch_size,
            "data": str(data.shards.fingerprint), "sources": data.sources, "preprocess": preprocess,
            "caption": data.caption, "label": data.label,
            "fields": dict(data.fields), "classes": None if data.classes is None else list(data.classes.names),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:40]

    def _read(self, path: Path, device: torch.device) -> Embedded | None:
        """Return the embeddings in a file; None if there is none or, with a warning, if it is damaged."""
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            values = json.loads(tensors["values"].numpy().tobytes())
            os.utime(path)  # the times of use order the files
            on_cpu = {"samples": tensors.pop("samples")}
            return Embedded(
                **on_cpu,
                **{name: tensors[name].to(device) for name in _TENSORS if name not in on_cpu},
                captions=values["captions"],
                fields=values["fields"],
                refused=[Refused(**each) for each in values["refused"]],
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s); the data set is embedded again", path, error)
            return None

    def _write(self, embedded: Embedded, path: Path) -> None:
        values = {
            "captions": list(embedded.captions),
            "fields": {name: list(column) for name, column in embedded.fields.items()},
            "refused": [asdict(each) for each in embedded.refused],
        }
        encoded = np.frombuffer(json.dumps(values).encode(), np.uint8).copy()
        tensors = {name: getattr(embedded, name).cpu().contiguous() for name in _TENSORS}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{files.PARTIAL}{os.getpid()}-{path.name}")
            try:
                save_file({**tensors, "values": torch.from_numpy(encoded)}, partial)
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)
            self._make_room()
        except (OSError, SafetensorError) as error:
            log.warning("the embeddings cannot be kept in %s: %s; cache=none keeps none", self.folder, error)

    def _make_room(self) -> None:
        stats = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob(f"*{_SUFFIX}"))
        total = sum(size for _, size, _ in stats)
        for _, size, path in stats[:-1]:
            if total > self._max_bytes:
                path.unlink(missing_ok=True)
                total -= size
