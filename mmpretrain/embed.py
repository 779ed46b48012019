"""Embed images or texts: python -m mmpretrain.embed checkpoint=RUN_DIR images=DIR_OR_TARS texts=FILE output=DIR."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hydra
import numpy as np
import torch
from numpy.lib.format import open_memmap
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmpretrain import build, command, config, usage
from mmpretrain.checkpoint import write_text
from mmpretrain.config import EmbedConfig
from mmpretrain.data.decode import BadSample
from mmpretrain.data.loader import ignore_signals
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.storage import LocalStorage
from mmpretrain.data.stream import read_member
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.loading import Loaded, load_checkpoint
from mmpretrain.precision import PrecisionName, autocast

log = logging.getLogger(__name__)


def main() -> None:
    """The command."""
    command.entry(_hydra_main)


@hydra.main(version_base="1.3", config_path="pkg://mmpretrain.conf", config_name="embed")
def _hydra_main(cfg: DictConfig) -> None:
    with command.job(), usage.usage_errors():
        settings: EmbedConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
        config.check_known(settings)
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        run(settings)


def run(cfg: EmbedConfig) -> list[Path]:
    """Embed what `cfg` names; goes on where an interrupted one stopped. Raises: ValueError for wrong use."""
    if cfg.images is None and cfg.texts is None:
        raise ValueError("neither images nor texts is given; expected images=<folder or tars>, texts=<file> or both")
    device = build.device_of(cfg.device)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    precision: PrecisionName = (
        cfg.precision.value if cfg.precision is not None else loaded.config["trainer"]["precision"]
    )
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with autocast(device, precision):
        if cfg.images is not None:
            images = _Images(cfg.images, loaded.preprocess)
            written += _write(
                folder / "images", images.keys, loaded, lambda start: _of_images(images, loaded, cfg, start)
            )
        if cfg.texts is not None:
            texts = [line for line in Path(cfg.texts).read_text(encoding="utf-8").splitlines() if line.strip()]
            written += _write(folder / "texts", texts, loaded, lambda start: _of_texts(texts, loaded, cfg, start))
    for path in written:
        Console().print(str(path), soft_wrap=True)
    return written


class _Images(Dataset[Tensor | None]):
    """The images of a folder, or of tars."""

    def __init__(self, source: str | Sequence[str], preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self._storage = LocalStorage()
        self._shards: Shards | None = None
        self._files: list[Path] = []
        if isinstance(source, str) and Path(source).is_dir() and not any(Path(source).glob("*.tar")):
            kinds = {f".{extension}" for extension in IMAGE_EXTENSIONS}
            self._files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in kinds)
            if not self._files:
                raise ValueError(f"images={source}: no image in it; expected {', '.join(sorted(kinds))}, or tars")
            self.keys = [str(path.relative_to(source)) for path in self._files]
        else:
            self._shards = Shards(expand_shards(source))
            self.keys = [self._shards.key(sample) for sample in range(self._shards.num_samples)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Tensor | None:
        try:
            if self._shards is None:
                return self._preprocess(self._files[i])
            return self._preprocess(read_member(self._shards, self._storage, i, IMAGE_EXTENSIONS))
        except BadSample as error:
            log.warning("refused %s: %s", self.keys[i], error)
            return None


def _of_images(images: _Images, loaded: Loaded, cfg: EmbedConfig, start: int) -> Iterator[Tensor]:
    """Embeddings [b, e] of the images from `start` on, batch by batch; not a number where one cannot be decoded."""
    loader = DataLoader(
        images,
        sampler=range(start, len(images)),
        batch_size=cfg.batch_size,
        collate_fn=list,
        num_workers=cfg.workers,
        multiprocessing_context="fork" if cfg.workers else None,
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        rows = torch.full((len(batch), loaded.model.embed_dim), torch.nan)
        kept = [i for i, image in enumerate(batch) if image is not None]
        if kept:
            rows[kept] = loaded.model.embed_images(torch.stack([batch[i] for i in kept])).float().cpu()
        yield rows


def _of_texts(texts: Sequence[str], loaded: Loaded, cfg: EmbedConfig, start: int) -> Iterator[Tensor]:
    """Embeddings [b, e] of the texts from `start` on, batch by batch."""
    for first in range(start, len(texts), cfg.batch_size):
        yield loaded.model.embed_texts(*loaded.tokenizer(texts[first : first + cfg.batch_size])).float().cpu()


def _write(path: Path, keys: Sequence[str], loaded: Loaded, rows_from: Callable[[int], Iterator[Tensor]]) -> list[Path]:
    """`PATH.npy`, float32 [n, e] of unit length, and `PATH.keys.txt`, a line for each row.

    Rows are written as they come, beside a note of how many there are, so that the same command goes on after a kill.
    """
    array, key_file = path.with_name(f"{path.name}.npy"), path.with_name(f"{path.name}.keys.txt")
    partial, note = path.with_name(f".partial-{path.name}.npy"), path.with_name(f".progress-{path.name}.json")
    work = {"checkpoint": str(loaded.path.resolve()), "digest": hashlib.sha256("\n".join(keys).encode()).hexdigest()}
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
            write_text(note, json.dumps({**work, "rows": start}))
            progress.update(task, completed=start)
    kept = np.isfinite(rows).all(axis=1)
    if kept.all():
        del rows
        partial.rename(array)
    else:
        np.save(array, rows[kept])
        partial.unlink()
    write_text(key_file, "".join(f"{key}\n" for key, is_kept in zip(keys, kept, strict=True) if is_kept))
    write_text(done, json.dumps(work) + "\n")
    note.unlink()
    return [array, key_file]


if __name__ == "__main__":
    main()
