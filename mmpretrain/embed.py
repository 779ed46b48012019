"""Embed images or texts: python -m mmpretrain.embed checkpoint=RUN_DIR images=DIR_OR_TARS texts=FILE output=DIR."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from numpy.lib.format import open_memmap
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mmpretrain import build, errors, files
from mmpretrain.checkpoints.load import Loaded, load_checkpoint
from mmpretrain.config import command_line, resolve
from mmpretrain.config.schema import EmbedConfig, Precision
from mmpretrain.data.image_batches import image_batches
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.training.precision import autocast

log = logging.getLogger(__name__)


def main() -> None:
    """Run the command."""
    command_line.entry("embed", _hydra_main)


@hydra.main(version_base="1.3", config_path="pkg://mmpretrain.conf", config_name="embed")
def _hydra_main(cfg: DictConfig) -> None:
    with command_line.job(), errors.usage_errors():
        settings: EmbedConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
        resolve.check_known(settings)
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        run(settings)


def run(cfg: EmbedConfig) -> list[Path]:
    """Embed images, texts or both. An interrupted command is resumed.

    Returns: paths of the files with embeddings and keys.
    Raises: ValueError for a usage error.
    """
    if cfg.images is None and cfg.texts is None:
        raise ValueError("neither images nor texts is given; expected images=<folder or tars>, texts=<file> or both")
    device = build.device_of(cfg.device)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    precision = cfg.precision or Precision(loaded.setting("trainer.precision", Precision))
    errors.check_number("batch_size", cfg.batch_size, at_least=1)
    errors.check_number("workers", cfg.workers, at_least=0)
    folder = Path(cfg.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {cfg.output!r}, a file; expected a folder, new or an earlier one's")
    folder.mkdir(parents=True, exist_ok=True)
    # Inputs that the embeddings depend on. If any of them changed, earlier output is not reused.
    work = {
        "checkpoint": hashlib.sha256((loaded.path / "manifest.json").read_bytes()).hexdigest(),
        "ema": cfg.ema,
        "precision": precision,
    }
    written = []
    with autocast(device, precision):
        if cfg.images is not None:
            images = _Images(cfg.images, loaded.preprocess)
            written += _write(
                folder / "images", images.keys, loaded, {**work, "images": images.fingerprint},
                lambda start: _of_images(images, loaded, cfg, start),
            )  # fmt: skip
        if cfg.texts is not None:
            texts = _texts(Path(cfg.texts))
            written += _write(folder / "texts", texts, loaded, work, lambda start: _of_texts(texts, loaded, cfg, start))
    for path in written:
        Console(markup=False, emoji=False).print(str(path), soft_wrap=True)
    return written


def _texts(path: Path) -> list[str]:
    """Return the non-empty lines of a file. Raises: ValueError if there are none, or if the file is not UTF-8."""
    try:
        texts = [line.rstrip("\r") for line in path.read_bytes().decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"texts={path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"texts={path} is empty; expected one text a line")
    return texts


class _Images:
    """Images of a folder or of tar files, with keys and a fingerprint. Raises: ValueError for a folder without images."""

    def __init__(self, source: str | Sequence[str], preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self._shards: Shards | None = None
        self._files: list[Path] = []
        if isinstance(source, str) and Path(source).is_dir() and not any(Path(source).glob("*.tar")):
            kinds = {f".{extension}" for extension in IMAGE_EXTENSIONS}
            self._files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in kinds)
            if not self._files:
                raise ValueError(f"images={source}: no image in it; expected {', '.join(sorted(kinds))}, or tars")
            self.keys = [str(path.relative_to(source)) for path in self._files]
            stats = [path.stat() for path in self._files]
            lines = "".join(f"{stat.st_size} {stat.st_mtime_ns}\n" for stat in stats)
            described = f"{Path(source).resolve()}\n{lines}".encode("utf-8", "surrogateescape")
            self.fingerprint = hashlib.sha256(described).hexdigest()
        else:
            self._shards = Shards(expand_shards(source))
            self.keys = [self._shards.key(sample) for sample in range(self._shards.num_samples)]
            self.fingerprint = self._shards.fingerprint

    def __call__(self, i: int, out: Tensor) -> None:
        """Write image `i` to `out`, uint8 [c, h, w]. Raises: BadSample."""
        self._preprocess(self._files[i] if self._shards is None else self._shards.read(i, IMAGE_EXTENSIONS), out)


def _of_images(images: _Images, loaded: Loaded, cfg: EmbedConfig, start: int) -> Iterator[Tensor]:
    """Yield embeddings [b, e] of the images from `start` on. Rows of images that cannot be decoded are NaN."""
    size, channels = loaded.preprocess.image_size, loaded.preprocess.channels
    numbers = range(start, len(images.keys))
    for batch in image_batches(images, numbers, cfg.batch_size, channels, size, cfg.workers):
        for number, reason in batch.refused:
            log.warning("refused %s: %s", images.keys[number], reason)
        rows = torch.full((len(batch.samples) + len(batch.refused), loaded.model.embed_dim), torch.nan)
        if batch.samples:
            rows[[number - start for number in batch.samples]] = loaded.model.embed_images(batch.images).float().cpu()
        start += len(rows)
        yield rows


def _of_texts(texts: Sequence[str], loaded: Loaded, cfg: EmbedConfig, start: int) -> Iterator[Tensor]:
    """Yield embeddings [b, e] of the texts from `start` on."""
    for first in range(start, len(texts), cfg.batch_size):
        yield loaded.model.embed_texts(*loaded.tokenizer(texts[first : first + cfg.batch_size])).float().cpu()


def _key_line(key: str) -> bytes:
    """Return the bytes of a key as in the file system or tar, with line breaks escaped."""
    return key.encode("utf-8", "surrogateescape").replace(b"\r", b"\\r").replace(b"\n", b"\\n")


def _write(
    path: Path,
    keys: Sequence[str],
    loaded: Loaded,
    inputs: Mapping[str, Any],
    rows_from: Callable[[int], Iterator[Tensor]],
) -> list[Path]:
    """Write embeddings to `PATH.npy`, float32 [n, e] of unit length, and keys to `PATH.keys.txt`, one line per row.

    Keys are written as bytes with line breaks escaped as `\\n` and `\\r`. Rows and keys of images that could not be
    decoded are left out. `PATH.json` records the inputs of the embeddings. Batches are written to a partial file together
    with the number of finished rows, so that the same command resumes after a kill.

    Args:
        path: path of the output files without extension.
        keys: key of each row.
        loaded: checkpoint with the model.
        inputs: inputs that the embeddings depend on.
        rows_from: function that yields the embeddings from a given row on.

    Returns: paths of the `.npy` and the `.keys.txt`.
    """
    array, key_file = path.with_name(f"{path.name}.npy"), path.with_name(f"{path.name}.keys.txt")
    partial, note = path.with_name(f".partial-{path.name}.npy"), path.with_name(f".progress-{path.name}.json")
    lines = [_key_line(key) for key in keys]
    work = {**inputs, "keys": hashlib.sha256(b"\n".join(lines)).hexdigest()}
    done = path.with_name(f"{path.name}.json")
    if done.exists() and json.loads(done.read_text()) == work:
        log.info("%s is there already", array)
        return [array, key_file]
    start = 0
    if (
        note.exists()
        and partial.exists()
        and {**(state := json.loads(note.read_text())), "rows": 0} == {**work, "rows": 0}
    ):
        start = state["rows"]
        log.info("going on at %d of %d", start, len(keys))
    shape = (len(keys), loaded.model.embed_dim)
    rows = open_memmap(partial, mode="r+" if start else "w+", dtype=np.float32, shape=shape)
    batches = rows_from(start)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(path.name, total=len(keys), completed=start)
        for batch in batches:
            rows[start : start + len(batch)] = batch.numpy()
            start += len(batch)
            rows.flush()
            files.write_text(note, json.dumps({**work, "rows": start}))
            progress.update(task, completed=start)
    kept = np.isfinite(rows).all(axis=1)
    if kept.all():
        del rows
        partial.rename(array)
    else:
        np.save(array, rows[kept])
        partial.unlink()
    files.write_bytes(key_file, b"".join(line + b"\n" for line, is_kept in zip(lines, kept, strict=True) if is_kept))
    files.write_text(done, json.dumps(work) + "\n")
    note.unlink()
    return [array, key_file]


if __name__ == "__main__":
    main()
