"""Pictures of data and predictions, uint8 [h, w, 3], for TensorBoard and the report."""

import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmpretrain.objectives.base import Example

_RIGHT, _WRONG = (26, 140, 60), (200, 40, 40)
_LINES = (224, 224, 224)
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MOST_NAMED, _MOST_PIXELS, _LONGEST_NAME = 120, 1000, 40


def _ramp(colours: Sequence[tuple[int, int, int]], length: int) -> np.ndarray:
    """Interpolate linearly between evenly spaced colours, uint8 [length, 3]."""
    places = np.linspace(0, len(colours) - 1, length)
    channels = [np.interp(places, range(len(colours)), channel) for channel in zip(*colours)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


# The lightness of both colour maps is monotonic, so that they can be read without colour vision.
_BLUES = _ramp([(199, 233, 180), (127, 205, 187), (65, 182, 196), (29, 145, 192), (34, 94, 168), (8, 29, 88)], 255)
_PARTS = np.concatenate([np.full((1, 3), 255, np.uint8), _BLUES])  # white means zero
_INFERNO = _ramp([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], 256)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font DejaVu Sans from matplotlib, since Pillow's own font lacks letters such as ô, Ж and λ."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def pair_grid(images: Tensor, captions: Sequence[str], columns: int = 4, cell: int = 200) -> np.ndarray:
    """Draw training pairs as a grid uint8 [H, W, 3]: images uint8 [n, c, h, w], each above its caption."""
    num_lines, line_height, line_characters = 4, 20, 24
    font = _font(14)
    row_height = cell + num_lines * line_height
    grid = Image.new("RGB", (columns * cell, math.ceil(len(images) / columns) * row_height), "white")
    canvas = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = (i % columns) * cell, (i // columns) * row_height
        grid.paste(_thumbnail(image, cell - 8), (left + 4, top + 4))
        lines = textwrap.wrap(caption, line_characters, max_lines=num_lines, placeholder=" …")
        canvas.multiline_text((left + 4, top + cell - 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return np.asarray(grid)


def example_page(examples: Sequence[Example], cell: int = 160) -> np.ndarray:
    """Draw an objective's examples on a page uint8 [H, W, 3]: one row per sample with its pictures and its text."""
    num_images, text_width = max(len(example.images) for example in examples), 460
    has_text = any(example.text for example in examples)
    page = Image.new("RGB", (num_images * cell + has_text * text_width, len(examples) * cell), "white")
    canvas = ImageDraw.Draw(page)
    font = _font(14)
    for i, example in enumerate(examples):
        for j, image in enumerate(example.images):
            page.paste(_thumbnail(image, cell - 8), (j * cell + 4, i * cell + 4))
        lines = [part for line in example.text.splitlines() for part in textwrap.wrap(line, 52)]
        place = (num_images * cell + 8, i * cell + 6)
        canvas.multiline_text(place, "\n".join(lines[: cell // 20]), fill="black", font=font, spacing=3)
    return np.asarray(page)


@dataclass(frozen=True)
class Answers:
    """A retrieval query with its answers, best first."""

    text: str
    """Text of the query; empty if the query is an image."""
    image: Tensor | None
    """Image of the query, uint8 [c, h, w]; None if the query is a text."""
    images: Sequence[Tensor]
    """Answers to a text query."""
    texts: Sequence[str]
    """Answers to an image query."""
    is_right: Sequence[bool]
    """True for each correct answer."""


def _thumbnail(image: Tensor, side: int) -> Image.Image:
    pixels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((side, side), Image.Resampling.NEAREST)


def enlarged(image: Tensor, side: int) -> np.ndarray:
    """Draw a square image uint8 [c, h, h] with its pixels as they are, uint8 [side, side, 3]."""
    return np.asarray(_thumbnail(image, side))


def gallery(queries: Sequence[Answers], side: int = 120) -> np.ndarray:
    """Draw one row per query with its answers: correct ones in green, wrong ones in red."""
    font = _font(13)
    num_answers = max(len(query.is_right) for query in queries)
    left, row_height = 280, side + 12
    answer_width = side + 12 if queries[0].images else 230
    page = Image.new("RGB", (left + num_answers * answer_width, len(queries) * row_height), "white")
    canvas = ImageDraw.Draw(page)
    for i, query in enumerate(queries):
        top = i * row_height + 6
        if query.image is not None:
            page.paste(_thumbnail(query.image, side), (6, top))
        else:
            lines = "\n".join(textwrap.wrap(query.text, 34, max_lines=6, placeholder=" …"))
            canvas.multiline_text((6, top), lines, fill="black", font=font, spacing=3)
        for k, right in enumerate(query.is_right):
            colour, x = _RIGHT if right else _WRONG, left + k * answer_width
            if query.images:
                page.paste(_thumbnail(query.images[k], side), (x, top))
                canvas.rectangle((x - 3, top - 3, x + side + 2, top + side + 2), outline=colour, width=3)
            else:
                lines = "\n".join(textwrap.wrap(query.texts[k], 27, max_lines=6, placeholder=" …"))
                canvas.multiline_text((x + 8, top), lines, fill=colour, font=font, spacing=3)
    return np.asarray(page)


def confusion(matrix: np.ndarray, names: Sequence[str], numbers: Sequence[int] | None = None) -> np.ndarray:
    """Draw a confusion matrix: counts [C, C] of true classes (rows) and predictions (columns), as fractions of each row.

    White is exactly zero: any larger fraction has a colour. More than 120 classes are labelled by number. With more than
    1000 classes each pixel shows the largest fraction of the cells that it covers, so that no confusion is hidden.

    Args:
        matrix: counts [C, C].
        names: names of the classes [C].
        numbers: numbers of the classes [C]; None: 0 to C - 1.
    """
    is_named = len(names) <= _MOST_NAMED
    side = min(max(720 // len(names), 12), 120) if is_named else max(_MOST_PIXELS // len(names), 1)
    cells = _cells(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), side, has_lines=is_named)
    length, size = len(cells), min(side - 2, 13) if is_named else 13
    if is_named:
        labels = {i: _shortened(name) for i, name in enumerate(names)}
    else:
        labels = {i: str(i if numbers is None else numbers[i]) for i in _evenly_spaced(len(names))}
    rows = _beside({(i + 0.5) * length / len(names): label for i, label in labels.items()}, length, size)
    columns = rows.transpose(Image.Transpose.ROTATE_90)

    font, legend, gap = _font(13), _legend("part of the true class"), 10
    left, top = 2 * gap + max(rows.width, math.ceil(font.getlength("predicted"))), legend.height + 2 * gap
    width = left + max(length, legend.width) + gap
    page = Image.new("RGB", (width, top + length + columns.height + 2 * gap), "white")
    page.paste(legend, (left, gap))
    page.paste(rows, (left - gap // 2 - rows.width, top - size))
    page.paste(columns, (left - size, top + length + gap // 2))
    page.paste(Image.fromarray(cells), (left, top))
    canvas = ImageDraw.Draw(page)
    canvas.rectangle((left - 1, top - 1, left + length, top + length), outline=_LINES)
    canvas.text((left - gap, top - gap), "true", fill="black", font=font, anchor="rd")
    canvas.text((left - gap, top + length + gap), "predicted", fill="black", font=font, anchor="ra")
    return np.asarray(page)


def _cells(parts: np.ndarray, side: int, has_lines: bool) -> np.ndarray:
    """Draw fractions [C, C] as coloured squares, uint8 [h, h, 3]; with many classes each pixel is the maximum of a block."""
    shown = min(len(parts), _MOST_PIXELS)
    starts = np.arange(shown) * len(parts) // shown
    largest = np.maximum.reduceat(np.maximum.reduceat(parts, starts, axis=0), starts, axis=1)
    shades = np.ceil(largest * (len(_PARTS) - 1)).astype(np.uint8)  # rounded up, so that only zero is white
    cells = _PARTS[shades.repeat(side, axis=0).repeat(side, axis=1)]
    if has_lines:
        cells[side::side] = cells[:, side::side] = _LINES
    return cells


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _evenly_spaced(count: int) -> range:
    """Return at most ten evenly spaced round numbers below `count`."""
    steps = (digit * 10**zeros for zeros in itertools.count() for digit in (1, 2, 5))
    return range(0, count, next(step for step in steps if 10 * step >= count))


def _beside(labels: Mapping[float, str], length: int, size: int) -> Image.Image:
    """Draw right-aligned labels at the given heights, on a strip that extends `length` by `size` pixels at both ends."""
    font = _font(size)
    width = math.ceil(max(font.getlength(label) for label in labels.values()))
    strip = Image.new("RGB", (width, length + 2 * size), "white")
    canvas = ImageDraw.Draw(strip)
    for height, label in labels.items():
        canvas.text((width, size + height), label, fill="black", font=font, anchor="rm")
    return strip


def _legend(text: str) -> Image.Image:
    """Draw the colour scale from 0 to 1 with tick labels and a title."""
    font, width, thickness, margin = _font(13), len(_PARTS), 12, 16
    strip = Image.new("RGB", (margin + width + math.ceil(font.getlength(text)), 2 * thickness + 6), "white")
    canvas = ImageDraw.Draw(strip)
    strip.paste(_scale(_PARTS, width, thickness), (0, 0))
    canvas.text((width + margin, thickness // 2), text, fill="black", font=font, anchor="lm")
    for part in (0, 0.25, 0.5, 0.75, 1):
        anchor = "la" if part == 0 else "ma"
        canvas.text((part * width, thickness + 3), f"{part:g}", fill="black", font=_font(11), anchor=anchor)
    return strip


def _scale(colours: np.ndarray, width: int, height: int) -> Image.Image:
    """Draw colours uint8 [n, 3] from left to right."""
    return Image.fromarray(colours[None]).resize((width, height), Image.Resampling.NEAREST)


def heat_maps(
    images: Sequence[Tensor], maps: Sequence[np.ndarray], captions: Sequence[str], side: int = 288
) -> np.ndarray:
    """Draw images uint8 [c, h, w] next to their heat maps, float [rows, columns], of patch similarity to the captions."""
    font, margin, title = _font(12), 8, 24
    page = Image.new("RGB", (2 * side + 3 * margin, len(images) * (side + title) + margin), "white")
    canvas = ImageDraw.Draw(page)
    left, right = margin, 2 * margin + side
    for i, (image, values, caption) in enumerate(zip(images, maps, captions, strict=True)):
        top = i * (side + title) + title
        picture = _thumbnail(image, side)
        page.paste(picture, (left, top))
        page.paste(_overlaid(picture, values), (right, top))
        middle = top - title // 2
        canvas.text((left, middle), textwrap.shorten(caption, 44, placeholder=" …"), "black", font, anchor="lm")
        canvas.text((right, middle), f"similarity {values.min():.2f}", "black", font, anchor="lm")
        page.paste(_scale(_INFERNO, 100, 10), (right + 112, middle - 5))
        canvas.text((right + 220, middle), f"{values.max():.2f}", "black", font, anchor="lm")
    return np.asarray(page)


def heat_map(image: Tensor, values: np.ndarray, side: int = 288) -> np.ndarray:
    """Draw an image uint8 [c, h, w] below its heat map, float [rows, columns], as uint8 [side, side, 3]."""
    return np.asarray(_overlaid(_thumbnail(image, side), values))


def _overlaid(picture: Image.Image, values: np.ndarray) -> Image.Image:
    faded = Image.blend(Image.new("RGB", picture.size, "white"), picture, 0.4)
    return Image.blend(faded, _heat(values, picture.width), 0.6)


def _heat(values: np.ndarray, side: int) -> Image.Image:
    """Draw values [rows, columns] from the lowest (dark) to the highest (light), interpolated bilinearly."""
    scaled = (values - values.min()) / max(np.ptp(values), np.finfo(np.float32).tiny)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return Image.fromarray(_INFERNO[np.rint(np.asarray(smooth) * (len(_INFERNO) - 1)).astype(np.uint8)])


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return short labels of an axis, such as `2.5k`, `10M` and `5e-4`.

    They have 3 digits, or as many as tell the values apart, but at most 6.
    """
    largest = max(map(abs, values), default=0.0)
    unit, letter = next(((unit, letter) for unit, letter in _UNITS if largest >= unit), (1.0, ""))
    for digits in range(3, 7):
        if 0 < largest < 0.01:
            labels = [re.sub(r"\.?0*e-0*", "e-", f"{value:.{digits - 1}e}") if value else "0" for value in values]
        else:
            labels = [f"{value / unit:.{digits}g}" for value in values]
        if len(set(labels)) == len(values):
            break
    return [label if label == "0" else label + letter for label in labels]


def curves(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], columns: int = 3) -> np.ndarray:
    """Draw one small plot for each (name, samples seen, values)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it takes half a second
    from matplotlib.figure import Figure

    rows = math.ceil(len(lines) / columns)
    width, height = 4 * columns, 2.6 * rows
    figure = Figure(figsize=(width, height), dpi=110)
    # Fixed positions of axes and titles, since computing them takes longer than drawing.
    inches = {"left": 0.6 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**inches, "wspace": 0.25, "hspace": 0.45})
    for place in axes.flat[len(lines) :]:
        place.remove()
    for place, (name, xs, ys) in zip(axes.flat, lines):
        place.plot(xs, ys, linewidth=1.2, marker="o" if len(xs) < 3 else None)
        place.set_title(textwrap.shorten(name, 80), fontsize=9, y=1.0, parse_math=False)
        place.set_xlabel("samples seen", fontsize=8)
        place.grid(alpha=0.3)
        place.locator_params(nbins=5)
        place.tick_params(labelsize=8)
        for axis, (low, high) in ((place.xaxis, place.get_xlim()), (place.yaxis, place.get_ylim())):
            ticks = [float(tick) for tick in axis.get_ticklocs() if low <= tick <= high]
            axis.set_ticks(ticks, labels=tick_labels(ticks))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
