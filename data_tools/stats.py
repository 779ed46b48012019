"""Command `stats`: sizes, formats, caption lengths and duplicates of the samples of tars, as a table and histograms."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.histograms import Histogram
from data_tools.measuring import Measured, Task, counting_tokenizer, measure_tar, open_tokenizer
from data_tools.pool import run_tasks
from data_tools.tars import expand_tars, open_table, open_tar, remote_row
from mmpretrain.data.fields import check_caption_field
from mmpretrain.data.remote import is_remote
from mmpretrain.data.shard_table import ShardTable

CAPTION_TOKENS = "caption (tokens)"
SAME_TEXT = "captions with the same text"


@dataclass(frozen=True)
class Stats:
    """Statistics of a set of tars.

    Attributes:
        num_tars, num_samples: size of the set.
        num_measured: number of samples that were read; fewer than `num_samples` if the figures are estimates.
        measured: measures of these samples.
        context_length: number of tokens to which the tokenizer's model cuts a caption.
        repeats: number of captions with each distinct text, int64 [d].
        most_repeated: place of the first caption with the most frequent text, `TAR: KEY`; None without a caption.
        problems: defects of the tars, each with its path.
    """

    num_tars: int
    num_samples: int
    num_measured: int
    measured: Measured
    context_length: int
    repeats: npt.NDArray[np.int64]
    most_repeated: str | None
    problems: Sequence[str]

    @property
    def is_estimate(self) -> bool:
        """Whether only some of the samples were read."""
        return self.num_measured < self.num_samples

    @property
    def title(self) -> str:
        """Heading of the figures, which says whether they are estimates."""
        return f"estimated from {self.num_measured:,} samples" if self.is_estimate else "of all samples"

    def distributions(self) -> dict[str, npt.NDArray[Any]]:
        """Return the values of each measure that some sample has, by its name with its unit."""
        images = self.measured
        named: dict[str, npt.NDArray[Any]] = {
            "image width (pixels)": images.widths,
            "image height (pixels)": images.heights,
            "aspect ratio (width / height)": images.widths / images.heights,
            "encoded image (bytes)": images.image_bytes,
            CAPTION_TOKENS: self.measured.tokens,
            SAME_TEXT: self.repeats,
        }
        return {name: values for name, values in named.items() if len(values)}


def measure_tars(
    tars: Sequence[str],
    index_dir: str | None,
    caption: str,
    tokenizer: str | None,
    max_samples: int,
    workers: int,
) -> Stats:
    """Measure the samples of tars, or evenly spaced ones of more than `max_samples`.

    Sizes of images come from their headers. The memory is some 40 bytes per measured sample.

    Args:
        tars: patterns of tars, all local or all remote.
        index_dir: folder or address of the indexes; None: beside the tars.
        caption: caption field, `txt` or `json.<path>`.
        tokenizer: see `open_tokenizer`.
        max_samples: maximum number of samples that are read.
        workers: number of processes.

    Raises: ValueError if a tar has no samples, or for a malformed caption field or an unknown tokenizer; OSError.
    """
    check_caption_field(caption, "--caption")
    context_length = open_tokenizer(tokenizer).context_length
    counting_tokenizer(tokenizer)  # before the processes are forked, which then share it
    paths = expand_tars(tars)
    table = open_table(paths, index_dir)
    num_samples = int(table.counts.sum())
    num_measured = min(num_samples, max_samples)
    ids = np.arange(num_measured, dtype=np.int64) * num_samples // num_measured
    measure = partial(measure_tar, index_dir=index_dir, caption=caption, tokenizer=tokenizer)
    measured = Measured.joined(run_tasks(measure, _tasks(table, ids), workers, "measuring"))
    _, first, repeats = np.unique(measured.hashes, return_index=True, return_counts=True)
    most_repeated = None
    if len(repeats):
        most_repeated = _place(table, int(measured.samples[first[np.argmax(repeats)]]), index_dir)
    return Stats(
        len(paths), num_samples, num_measured, measured, context_length, repeats, most_repeated, table.problems
    )


def _tasks(table: ShardTable, ids: npt.NDArray[np.int64]) -> list[Task]:
    tasks: list[Task] = []
    ends = np.cumsum(table.counts)
    for shard, path in enumerate(table.paths):
        first = int(ends[shard] - table.counts[shard])
        low, high = np.searchsorted(ids, [first, ends[shard]])
        if low < high:
            tasks.append((path, remote_row(table, shard) if is_remote(path) else None, first, ids[low:high]))
    return tasks


def _place(table: ShardTable, sample_id: int, index_dir: str | None) -> str:
    """Return the tar and the key of a sample."""
    shard = int(np.searchsorted(np.cumsum(table.counts), sample_id, side="right"))
    path, first = table.paths[shard], int(table.counts[:shard].sum())
    shards = open_tar(path, index_dir, remote_row(table, shard) if is_remote(path) else None)
    return f"{path}: {shards.key(sample_id - first)}"


def summary(stats: Stats) -> list[str]:
    """Return lines about a set: its size, and then formats, captions, duplicates and what could not be read."""
    measured, num_captions = stats.measured, len(stats.measured.tokens)
    size = f"{stats.num_samples:,} samples in {stats.num_tars:,} tars"
    if stats.is_estimate:
        size += f", estimated from {stats.num_measured:,} evenly spaced samples"
    lines = [size]
    formats = ", ".join(f"{name} {num:,}" for name, num in sorted(measured.formats.items(), key=lambda row: -row[1]))
    lines.append(f"images: {len(measured.widths):,}" + (f" ({formats})" if formats else ""))
    lines.append(f"captions: {num_captions:,}")
    if num_captions:
        num_cut = int((measured.tokens > stats.context_length).sum())
        num_repeated = num_captions - len(stats.repeats)
        lines[-1] += f", {_part(num_cut, num_captions)} longer than {stats.context_length} tokens"
        lines.append(f"duplicates: {_part(num_repeated, num_captions)} have the text of an earlier caption")
        if num_repeated:
            lines[-1] += f"; one text occurs {stats.repeats.max():,} times, first in {stats.most_repeated}"
    for what, num in sorted(measured.unreadable.items()):
        lines.append(f"unreadable {what}: {num:,}; python -m data_tools verify tells which and why")
    if len(stats.problems):
        lines.append(f"problems of tars: {len(stats.problems):,}, the first: {stats.problems[0]}")
    return lines


def _part(num: int, total: int) -> str:
    return f"{num:,} ({100 * num / total:.1f} %)"


def table_rows(stats: Stats) -> list[list[str]]:
    """Return a row for each measure: name, minimum, 5 %, median, mean, 95 % and maximum."""
    rows = []
    for name, values in stats.distributions().items():
        low, five, median, ninety_five, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist()
        figures = [low, five, median, float(np.mean(values)), ninety_five, high]
        rows.append([name, *map(_figure, figures)])
    return rows


def _figure(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def histograms_of(stats: Stats) -> list[Histogram]:
    """Return the histogram of each measure; that of the captions has a line where the model cuts them."""
    cut = (stats.context_length, f"{stats.context_length} tokens: cut here")
    counted = {CAPTION_TOKENS: "captions", SAME_TEXT: "distinct texts"}
    return [
        Histogram(name, counted.get(name, "images"), values, cut if name == CAPTION_TOKENS else None, name == SAME_TEXT)
        for name, values in stats.distributions().items()
    ]
