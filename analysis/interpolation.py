"""Scores along interpolated checkpoints: two data sets against each other, as figure 1 of WiSE-FT (Wortsman et al. 2022)."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from mmpretrain import files

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after choosing a backend that needs no display

SCORES = "scores.json"
_ALPHA = re.compile(r"alpha_([\d.e-]+)")


@dataclass(frozen=True)
class Point:
    """Scores of one share alpha of the second checkpoint, one for each folder."""

    alpha: float
    x: Sequence[float]
    y: Sequence[float]


def read_points(folders: Sequence[Path], x: str, y: str) -> list[Point]:
    """Return the scores of FOLDER/alpha_<share>/scores.json, which mmpretrain.evaluate wrote, in the order of the shares.

    Args:
        folders: outputs of mmpretrain.interpolate with the same shares, such as one for each seed.
        x, y: metrics.

    Raises: ValueError if a folder has no scores, other shares than the first, or lacks a metric.
    """
    found: dict[Path, dict[float, Mapping[str, float]]] = {}
    for folder in folders:
        paths = {float(match[1]): path for path in folder.glob("alpha_*") if (match := _ALPHA.fullmatch(path.name))}
        found[folder] = {alpha: _read(path / SCORES, (x, y)) for alpha, path in sorted(paths.items())}
        if not paths or found[folder].keys() != found[folders[0]].keys():
            given = ", ".join(f"{alpha:g}" for alpha in found[folder]) or "none"
            raise ValueError(
                f"{folder} has the shares {given}; expected alpha_<share> of mmpretrain.interpolate, the same in all folders"
            )
    return [
        Point(alpha, [found[folder][alpha][x] for folder in folders], [found[folder][alpha][y] for folder in folders])
        for alpha in found[folders[0]]
    ]


def _read(path: Path, metrics: Sequence[str]) -> Mapping[str, float]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; write it: python -m mmpretrain.evaluate checkpoint={path.parent} output={path}"
        )
    scores = files.read_json(path)
    for metric in metrics:
        if not isinstance(scores.get(metric), float | int):
            known = ", ".join(name for name in scores if "/" in name)
            raise ValueError(f"{path} has no {metric!r}; it has: {known or 'none'}")
    return scores


def draw(points: Sequence[Point], x: str, y: str, path: Path) -> None:
    """Plot y over x along the shares: the mean over folders as a line with the shares, and each folder as a thin line."""
    with matplotlib.rc_context({"text.parse_math": False}):  # names are not formulas
        figure, panel = plt.subplots(figsize=(5.5, 4.4), constrained_layout=True)
        for k in range(len(points[0].x)):
            panel.plot(
                [point.x[k] for point in points], [point.y[k] for point in points], "C0", alpha=0.3, linewidth=0.8
            )
        means = [(statistics.mean(point.x), statistics.mean(point.y)) for point in points]
        panel.plot(*zip(*means, strict=True), "C0-o", linewidth=2)
        for point, place in zip(points, means, strict=True):
            panel.annotate(f"{point.alpha:g}", place, xytext=(5, 5), textcoords="offset points")
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.set_title("share of the second checkpoint", fontsize=10)
        panel.grid(alpha=0.3)
        figure.savefig(path, dpi=80)
        plt.close(figure)
