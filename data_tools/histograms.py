"""Drawing of histograms as a PNG."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

_COLUMNS = 3
_MAX_BINS = 60
_WIDE = 30  # ratio of the largest and the smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Histogram:
    """One histogram.

    Attributes:
        name: label of the values, with their unit.
        counted: label of what is counted, such as `images`.
        values: at least one value, all positive.
        mark: (value, label) of a vertical line; None: no line.
        has_log_counts: whether the counts are on a logarithmic axis, as for values most of which are the same.
    """

    name: str
    counted: str
    values: npt.NDArray[Any]
    mark: tuple[float, str] | None = None
    has_log_counts: bool = False


def draw_histograms(histograms: Sequence[Histogram], title: str, path: Path) -> None:
    """Draw histograms to a PNG, three in a row. The file is replaced at once."""
    columns = min(_COLUMNS, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for place, histogram in zip(places, histograms, strict=False):
        _draw(place, histogram)
    for place in list(places):  # those that are left
        place.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)


def _draw(place: Axes, histogram: Histogram) -> None:
    values = histogram.values
    place.hist(values, bins=bin_edges(values).tolist(), log=histogram.has_log_counts)
    is_wide = _is_wide(values)
    if is_wide:
        place.set_xscale("log")
        place.xaxis.set_minor_formatter(NullFormatter())
    else:
        place.xaxis.set_major_locator(MaxNLocator(6, integer=np.issubdtype(values.dtype, np.integer)))
    if histogram.mark is not None and histogram.mark[0] <= values.max():
        place.axvline(histogram.mark[0], color="C3", linewidth=1.2, label=histogram.mark[1])
        place.legend(fontsize=8)
    whole = np.issubdtype(values.dtype, np.integer)
    if whole and len(np.unique(values)) == 1:
        place.set_xticks([int(values[0])])  # other ticks would be fractions
    place.xaxis.set_major_formatter(EngFormatter(sep="") if whole else StrMethodFormatter("{x:g}"))
    if histogram.has_log_counts:
        place.set_ylim(bottom=0.7)  # below a count of one
        place.yaxis.set_minor_formatter(NullFormatter())
    else:
        place.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    place.yaxis.set_major_formatter(EngFormatter(sep=""))
    place.set_xlabel(histogram.name, fontsize=9)
    place.set_ylabel(histogram.counted, fontsize=9)
    place.tick_params(labelsize=8)
    place.grid(alpha=0.3)
    place.set_axisbelow(True)


def _is_wide(values: npt.NDArray[Any]) -> bool:
    return bool(values.max() > _WIDE * values.min())


def bin_edges(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the edges of the bins: of equal widths, or of equal ratios if the values are wide apart.

    Bins of integers have whole widths, and edges between integers. Otherwise, some bins would hold more integers than
    others, and the histogram would show combs.
    """
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer):
        if not _is_wide(values):
            width = math.ceil((high - low + 1) / _MAX_BINS)
            return np.arange(low, high + width + 1, width, dtype=np.float64) - 0.5
        return np.unique(np.floor(np.geomspace(low, high + 1, _MAX_BINS + 1))) - 0.5
    if low == high:
        return np.array([low * 0.95, low * 1.05])
    return np.geomspace(low, high, _MAX_BINS + 1) if _is_wide(values) else np.linspace(low, high, _MAX_BINS + 1)
