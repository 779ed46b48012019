"""Forgetting: scores of runs that began with the weights of another run, beside that run's scores on the same data."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

from analysis.compare import cell
from analysis.runs import Run, read_run, repetitions
from mmpretrain.reporting.records import is_lower_better, read_intervals
from mmpretrain.scores import Interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after choosing a backend that needs no display

log = logging.getLogger(__name__)

COLUMNS = ("metric", "setting", "seeds", "before", "after", "difference", "95 % interval")
_PANEL_COLUMNS = 2


@dataclass(frozen=True)
class Pair:
    """A run, and the finished run whose weights it began with."""

    first: Run
    second: Run


@dataclass(frozen=True)
class Row:
    """One score of one setting before and after, over its seeds."""

    metric: str
    setting: str
    before: Sequence[float]
    """Scores of the first runs; empty if they were not evaluated on the data set."""
    after: Sequence[float]
    interval: Interval | None
    """95 % confidence interval of the difference over samples of the data set, mean of the seeds'; None if unknown."""

    @property
    def differences(self) -> list[float]:
        """after - before of each seed; empty without scores before."""
        return [after - before for before, after in zip(self.before, self.after, strict=False)]

    def cells(self) -> list[str]:
        """Return the texts of `COLUMNS`; scores are `mean ± sd` over seeds."""
        bounds = "-" if self.interval is None else f"[{self.interval[0]:+.4f}, {self.interval[1]:+.4f}]"
        differences = cell(self.differences, "+")
        return [
            self.metric,
            self.setting,
            f"{len(self.after)}",
            cell(self.before),
            cell(self.after),
            differences,
            bounds,
        ]


def pairs_of(runs: Sequence[Run]) -> list[Pair]:
    """Return the finished runs that began with another run's weights, with these runs. Others are left out.

    Raises: ValueError if there is none, or if a first run has no results.
    """
    pairs = []
    for run in runs:
        if not (source := run.settings.get("init_from")) or not run.results:
            continue
        path = Path(source)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path
        first = read_run(folder)
        if not first.results:
            raise ValueError(f"{folder}, with which {run.folder} began, has no results.json; expected a finished run")
        pairs.append(Pair(first, run))
    if not pairs:
        raise ValueError(
            "no run is finished and began with the weights of another run; expected runs with init_from=RUN"
        )
    return pairs


def settings_of(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Group pairs that differ only in the seeds of their runs, by the name that `repetitions` gives them."""
    by_folder = {pair.second.folder: pair for pair in pairs}

    def without_seed(run: Run) -> str:
        return repr(sorted((key, repr(value)) for key, value in run.settings.items() if key != "run.seed"))

    alike = [
        replace(pair.second, settings={**pair.second.settings, "init_from": without_seed(pair.first)}) for pair in pairs
    ]
    return {name: [by_folder[run.folder] for run in group] for name, group in repetitions(alike).items()}


def table(pairs: Sequence[Pair], metrics: Sequence[str] = ()) -> list[Row]:
    """Return a row for each score and setting, by metric, the setting that forgot least first.

    Args:
        pairs: runs and the runs that they began with.
        metrics: scores to show; empty: all.

    Raises: ValueError if no run has one of the metrics.
    """
    known = list(dict.fromkeys(key for pair in pairs for key in pair.second.results if "/" in key))
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"no run has {metric!r}; they have: {', '.join(known) or 'none'}")
    rows = [
        _row(metric, setting, group) for setting, group in settings_of(pairs).items() for metric in metrics or known
    ]
    order = {metric: place for place, metric in enumerate(metrics or known)}

    def place(row: Row) -> tuple[int, float]:
        sign = 1 if is_lower_better(row.metric) else -1
        return order[row.metric], sign * statistics.mean(row.after)

    return sorted((row for row in rows if row.after), key=place)


def _row(metric: str, setting: str, group: Sequence[Pair]) -> Row:
    scored = [pair for pair in group if pair.second.results.get(metric) is not None]
    with_both = [pair for pair in scored if pair.first.results.get(metric) is not None]
    intervals = [bounds for pair in with_both if (bounds := _interval(pair, metric)) is not None]
    return Row(
        metric,
        setting,
        before=_scores([pair.first for pair in with_both], metric),
        after=_scores([pair.second for pair in with_both or scored], metric),
        interval=(statistics.mean(low for low, _ in intervals), statistics.mean(high for _, high in intervals))
        if intervals
        else None,
    )


def _scores(runs: Sequence[Run], metric: str) -> list[float]:
    return [value for run in runs if (value := run.results[metric]) is not None]


def _interval(pair: Pair, metric: str) -> Interval | None:
    """Return the 95 % interval of a difference of two scores from the intervals of both, by sample.

    By the method of variance estimates recovery (Zou and Donner 2008, Statistics in Medicine 27, p. 1693), as if the scores
    were of different samples. They are of the same ones: where a sample that is hard for one is hard for the other, the
    interval is too wide.
    """
    bounds = [read_intervals(run.folder).get(metric, {}).get("sample") for run in (pair.first, pair.second)]
    before, after = (run.results[metric] for run in (pair.first, pair.second))
    if bounds[0] is None or bounds[1] is None or before is None or after is None:
        return None
    (low_before, high_before), (low_after, high_after) = bounds[0], bounds[1]
    difference = after - before
    return (
        difference - math.hypot(after - low_after, high_before - before),
        difference + math.hypot(high_after - after, before - low_before),
    )


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def draw_curves(pairs: Sequence[Pair], metrics: Sequence[str], path: Path) -> None:
    """Plot each metric over the samples that the second runs have seen, from the first runs' scores on.

    The mean over seeds is a line, and each seed a thin line.
    """
    groups = settings_of(pairs)
    num_rows = -(-len(metrics) // _PANEL_COLUMNS)
    with matplotlib.rc_context({"text.parse_math": False}):  # names are not formulas
        figure, axes = plt.subplots(
            num_rows, _PANEL_COLUMNS, figsize=(11, 3.4 * num_rows), squeeze=False, constrained_layout=True
        )
        for metric, panel in zip(metrics, axes.flat, strict=False):
            for i, (name, group) in enumerate(groups.items()):
                _draw(panel, [_curve(pair, metric) for pair in group], name, f"C{i % 10}")
            panel.set_xlabel("samples seen after init_from")
            panel.set_ylabel(metric)
            panel.grid(alpha=0.3)
        for empty in axes.flat[len(metrics) :]:
            empty.set_axis_off()
        axes.flat[0].legend(fontsize=8)
        figure.savefig(path, dpi=80)
        plt.close(figure)


def _curve(pair: Pair, metric: str) -> list[tuple[float, float]]:
    before = pair.first.results.get(metric)
    return [*([] if before is None else [(0.0, before)]), *pair.second.curve(metric, "samples")]


def _draw(panel: "plt.Axes", curves: Sequence[Sequence[tuple[float, float]]], name: str, colour: str) -> None:
    for curve in curves:
        panel.plot(*zip(*curve, strict=True), color=colour, alpha=0.3, linewidth=0.8)
    places: Mapping[float, list[float]] = {
        x: [y for curve in curves for place, y in curve if place == x]
        for x in sorted({x for c in curves for x, _ in c})
    }
    means = {x: statistics.mean(ys) for x, ys in places.items() if len(ys) == len(curves)}
    panel.plot(list(means), list(means.values()), color=colour, linewidth=2, label=f"{name} ({len(curves)})")
