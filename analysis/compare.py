"""Comparison of runs: mean and standard deviation over seeds, best first, and curves."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from analysis.runs import Run, repetitions
from mmpretrain.reporting.records import is_lower_better

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after choosing a backend that needs no display

_LENGTHS = ("steps", "samples", "wall_seconds", "pairs_per_second")


@dataclass(frozen=True)
class Row:
    """Scores of one setting over its seeds."""

    name: str
    values: Mapping[str, Sequence[float]]
    num_seeds: int
    num_unfinished: int

    def mean(self, metric: str) -> float | None:
        """Return the mean over finished seeds, or None without one."""
        return statistics.mean(self.values[metric]) if self.values.get(metric) else None

    def deviation(self, metric: str) -> float | None:
        """Return the sample standard deviation (n - 1); None for a single seed."""
        return statistics.stdev(self.values[metric]) if len(self.values.get(metric, ())) > 1 else None

    def cell(self, metric: str) -> str:
        """Return `mean ± sd`, or `-` without a value."""
        return cell(self.values.get(metric, ()))


def cell(values: Sequence[float], sign: str = "") -> str:
    """Return `mean ± sd` of the scores of several seeds, or `-` without one. With `sign` "+" positive means have a sign."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def table(runs: Sequence[Run], metric: str | None) -> tuple[str, list[str], list[Row]]:
    """Return (metric to sort by, metrics to show, one row per setting, best first).

    Args:
        runs: at least one run.
        metric: metric to sort by; None: the first score of the first evaluation.

    Raises: ValueError if no run has the metric.
    """
    rows = []
    for name, group in repetitions(runs).items():
        finished = [run for run in group if run.results]
        metrics = dict.fromkeys(key for run in finished for key in run.results)
        values = {key: [value for run in finished if (value := run.results.get(key)) is not None] for key in metrics}
        rows.append(Row(name, values, len(finished), len(group) - len(finished)))
    known = dict.fromkeys(key for row in rows for key in row.values)
    scores = [key for key in known if key not in _LENGTHS]
    if metric is None:
        if not scores:
            raise ValueError("no finished run has a score; expected one with results.json")
        metric = scores[0]
    if metric not in known:
        raise ValueError(f"no run has {metric!r}; they have: {', '.join(known) or 'none'}")
    sign = 1 if is_lower_better(metric) else -1

    def place(row: Row) -> tuple[bool, float]:
        mean = row.mean(metric)
        return mean is None, 0.0 if mean is None else sign * mean

    return (
        metric,
        [metric, *(key for key in [*scores, "pairs_per_second"] if key != metric and key in known)],
        sorted(rows, key=place),
    )


def draw_curves(runs: Sequence[Run], metrics: Sequence[str], path: Path) -> None:
    """Plot each metric over samples seen and wall time: the mean over seeds as a line, and each seed as a thin line."""
    groups = repetitions(runs)
    shown = [metric for metric in metrics if any(run.curve(metric, "samples") for run in runs)]
    with matplotlib.rc_context({"text.parse_math": False}):  # names are not formulas
        _draw_curves(runs, shown, groups, path)


def _draw_curves(runs: Sequence[Run], shown: Sequence[str], groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    figure, axes = plt.subplots(len(shown), 2, figsize=(13, 3.6 * len(shown)), squeeze=False, constrained_layout=True)
    for metric, (left, right) in zip(shown, axes, strict=True):
        for place, axis, label in ((left, "samples", "samples seen"), (right, "wall_seconds", "wall time, minutes")):
            for i, (name, group) in enumerate(groups.items()):
                colour = f"C{i % 10}"
                curves = [curve for run in group if (curve := run.curve(metric, axis))]
                unit = 60.0 if axis == "wall_seconds" else 1.0
                for curve in curves:
                    place.plot(
                        [x / unit for x, _ in curve], [y for _, y in curve], color=colour, alpha=0.3, linewidth=0.8
                    )
                if curves:
                    length = min(map(len, curves))
                    xs = [statistics.mean(curve[k][0] for curve in curves) / unit for k in range(length)]
                    ys = [statistics.mean(curve[k][1] for curve in curves) for k in range(length)]
                    place.plot(xs, ys, color=colour, linewidth=2, label=f"{name} ({len(curves)})")
            place.set_xlabel(label)
            place.set_ylabel(metric)
            place.grid(alpha=0.3)
        left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
