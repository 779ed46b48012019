"""Embed images or texts: python -m mmpretrain.embed checkpoint=RUN_DIR images=DIR_OR_TARS texts=FILE output=DIR."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mmpretrain import build, build_data, distributed, errors, files
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.config import command_line
from mmpretrain.config.schema import EmbedConfig, Precision
from mmpretrain.data.image_batches import split
from mmpretrain.data.source import Fingerprint, SampleSource
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.evals.embeddings import embed_batches
from mmpretrain.training.precision import autocast

log = logging.getLogger(__name__)


@command_line.command("embed")
def main(cfg: EmbedConfig) -> None:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with errors.usage_errors():
        run(cfg)


def run(cfg: EmbedConfig) -> list[Path]:
    """Embed images, texts or both. An interrupted command is resumed. A collective: the ranks share the work.

    Returns: paths of the files with embeddings and keys.
    Raises: ValueError for a usage error.
    """
    if cfg.images is None and cfg.texts is None:
        raise ValueError("neither images nor texts is given; expected images=<folder or tars>, texts=<file> or both")
    device = build.device_of(cfg.device)
    distributed.setup(device)
    loaded = load_checkpoint(cfg.checkpoint, device, cfg.trust, cfg.ema)
    precision = cfg.precision or Precision(loaded.setting("trainer.precision", Precision))
    errors.check_number("batch_size", cfg.batch_size, at_least=1)
    errors.check_number("workers", cfg.workers, at_least=0)
    for tower, encoder, given in (
        ("image", loaded.model.image, cfg.images),
        ("text", loaded.model.text, cfg.texts),
    ):
        if given is not None and encoder is None:
            raise ValueError(f"{tower}s is {given!r}, but the model has no {tower} encoder; leave {tower}s out")
    folder = Path(cfg.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {cfg.output!r}, a file; expected a folder, new or an earlier one's")
    folder.mkdir(parents=True, exist_ok=True)
    # Inputs that the embeddings depend on. If any of them changed, earlier output is not reused.
    work = {
        "weights": loaded.fingerprint,
        "precision": precision,
    }
    written = []
    with autocast(device, precision):
        if cfg.images is not None:
            assert loaded.preprocess is not None
            images = build_data.build_images(cfg.images, cfg.storage)
            keys = [images.key(sample) for sample in range(images.num_samples)]
            fingerprint = images.fingerprint
            content = fingerprint.hash if isinstance(fingerprint, Fingerprint) else fingerprint
            output = _Output(
                folder / "images", keys, loaded.model.image_embed_dim, cfg.batch_size, {**work, "images": content}
            )
            written += output.write(partial(_of_images, images, loaded, cfg.workers), device)
        if cfg.texts is not None:
            texts = _texts(Path(cfg.texts))
            output = _Output(folder / "texts", texts, loaded.model.text_embed_dim, cfg.batch_size, work)
            written += output.write(partial(_of_texts, texts, loaded), device)
    for path in written if distributed.is_main() else ():
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


def _of_images(
    images: SampleSource, loaded: Loaded, workers: int, batches: Sequence[range]
) -> Generator[Tensor, None, None]:
    """Yield embeddings [b, e] of each batch of images. Rows of images that cannot be decoded are NaN."""
    preprocess = loaded.preprocess
    assert preprocess is not None

    def read(sample: int, out: Tensor) -> None:
        preprocess(images.read(sample, IMAGE_EXTENSIONS), out)

    for (batch, embedded, _), numbers in zip(
        embed_batches(loaded.model, read, batches, preprocess, workers), batches, strict=True
    ):
        for number, reason in batch.refused:
            log.warning("refused %s: %s", images.key(number), reason)
        rows = embedded.new_full((len(numbers), embedded.shape[1]), torch.nan)
        rows[[number - numbers.start for number in batch.samples]] = embedded
        yield rows


def _of_texts(texts: Sequence[str], loaded: Loaded, batches: Sequence[range]) -> Generator[Tensor, None, None]:
    """Yield embeddings [b, e] of each batch of texts."""
    for numbers in batches:
        yield loaded.model.embed_texts(*loaded.tokenizer(texts[numbers.start : numbers.stop])).float()


def _key_line(key: str) -> bytes:
    """Return the bytes of a key as in the file system or tar, with line breaks escaped."""
    return key.encode("utf-8", "surrogateescape").replace(b"\r", b"\\r").replace(b"\n", b"\\n")


class _Output:
    """Embeddings in `PATH.npy`, float32 [n, e] of unit length, and keys in `PATH.keys.txt`, one line per row.

    Keys are written as bytes with line breaks escaped as `\\n` and `\\r`. Rows and keys of images that could not be
    decoded are left out. `PATH.json` records the inputs of the embeddings. Batches are written to a partial file together
    with the number of finished rows, so that the same command resumes after a kill, also on another number of ranks.

    Args:
        path: path of the output files without extension.
        keys: key of each row.
        embed_dim: e, the width of the embeddings.
        batch_size: number of rows that a rank embeds at once. The last bits of embeddings depend on it.
        inputs: inputs that the embeddings depend on.
    """

    def __init__(
        self, path: Path, keys: Sequence[str], embed_dim: int, batch_size: int, inputs: Mapping[str, Any]
    ) -> None:
        self.array, self.key_file = path.with_name(f"{path.name}.npy"), path.with_name(f"{path.name}.keys.txt")
        self._partial = path.with_name(f".partial-{path.name}.npy")
        self._note, self._done = path.with_name(f".progress-{path.name}.json"), path.with_name(f"{path.name}.json")
        self._shape, self._batch_size = (len(keys), embed_dim), batch_size
        self._lines = [_key_line(key) for key in keys]
        self._work = {**inputs, "keys": hashlib.sha256(b"\n".join(self._lines)).hexdigest()}

    def write(
        self, rows_of: Callable[[Sequence[range]], Generator[Tensor, None, None]], device: torch.device
    ) -> list[Path]:
        """Embed and write the rows that are missing. A collective.

        In each round every rank embeds one batch, and rank 0 writes them. The files are the same for any number of ranks.

        Args:
            rows_of: function that yields the embeddings [b, e] of each of the given batches.
            device: device of the embeddings.

        Returns: paths of the array and the keys.
        """
        count, embed_dim = self._shape
        start = distributed.from_main(self._open)
        if start is None:
            return [self.array, self.key_file]
        batches = split(range(start, count), self._batch_size)
        mine = batches[distributed.rank() :: distributed.world_size()]
        is_shown = distributed.is_main() and sys.stderr.isatty()
        with (
            closing(rows_of(mine)) as embedded,
            Progress(console=Console(stderr=True), disable=not is_shown) as progress,
        ):
            task = progress.add_task(self.array.stem, total=count, completed=start)
            for _ in range(0, len(batches), distributed.world_size()):
                # In the last round there may be fewer batches than ranks.
                rows = distributed.gather_ragged_rows(next(embedded, torch.zeros(0, embed_dim, device=device)))
                if distributed.is_main():
                    self._add(rows)
                progress.update(task, advance=len(rows))
        if distributed.is_main():
            self._close()
        return [self.array, self.key_file]

    def _open(self) -> int | None:
        """Open the partial file. Returns: the number of its rows; None if the final files are there already."""
        if self._done.exists() and json.loads(self._done.read_text()) == self._work:
            log.info("%s is there already", self.array)
            return None
        self._num_rows = 0
        if self._note.exists() and self._partial.exists():
            state = json.loads(self._note.read_text())
            if state == self._state(state["rows"]):
                self._num_rows = state["rows"]
                log.info("going on at %d of %d", self._num_rows, len(self._lines))
        mode: Literal["r+", "w+"] = "r+" if self._num_rows else "w+"
        self._rows = open_memmap(self._partial, mode=mode, dtype=np.float32, shape=self._shape)
        return self._num_rows

    def _state(self, num_rows: int) -> dict[str, Any]:
        return {**self._work, "batch_size": self._batch_size, "rows": num_rows}

    def _add(self, rows: Tensor) -> None:
        end = self._num_rows + len(rows)
        self._rows[self._num_rows : end] = rows.cpu().numpy()
        self._rows.flush()
        files.write_text(self._note, json.dumps(self._state(end)))
        self._num_rows = end

    def _close(self) -> None:
        """Replace the partial file by the final ones, without the rows that are NaN."""
        kept = np.isfinite(self._rows).all(axis=1)
        if kept.all():
            del self._rows
            self._partial.rename(self.array)
        else:
            np.save(self.array, self._rows[kept])
            self._partial.unlink()
        lines = [line + b"\n" for line, is_kept in zip(self._lines, kept, strict=True) if is_kept]
        files.write_bytes(self.key_file, b"".join(lines))
        files.write_text(self._done, json.dumps(self._work) + "\n")
        self._note.unlink()


if __name__ == "__main__":
    main()
