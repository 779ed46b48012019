"""Picture of a matrix of similarities from 0 to 1, with its values in the cells."""

from collections.abc import Sequence

import numpy as np

_MOST_WRITTEN = 26


def heat_matrix(
    values: np.ndarray, rows: Sequence[object], columns: Sequence[object], rows_title: str, columns_title: str
) -> np.ndarray:
    """Draw values [R, C] from 0 (dark) to 1 (light), uint8 [H, W, 3]. Large matrices have colours alone.

    Args:
        values: the matrix.
        rows, columns: names of the R rows and C columns, from the top and from the left.
        rows_title, columns_title: titles of the axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it takes half a second
    from matplotlib.figure import Figure

    cell = 0.45
    width, height = max(2.2, cell * len(columns)), max(2.2, cell * len(rows))
    page = (width + 1.8, height + 1.2)
    figure = Figure(figsize=page, dpi=110)
    axes = figure.add_axes((1.0 / page[0], 0.8 / page[1], width / page[0], height / page[1]))
    picture = axes.imshow(values, cmap="inferno", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), labels=[str(each) for each in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), labels=[str(each) for each in rows], fontsize=8)
    axes.set_xlabel(columns_title, fontsize=9)
    axes.set_ylabel(rows_title, fontsize=9)
    if max(values.shape) <= _MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    bar = figure.add_axes(((1.15 + width) / page[0], 0.8 / page[1], 0.12 / page[0], height / page[1]))
    figure.colorbar(picture, cax=bar).ax.tick_params(labelsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
