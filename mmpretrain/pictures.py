"""Pictures of data and predictions, uint8 [h, w, 3], for TensorBoard and the report."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmpretrain.objectives import Example

matplotlib.use("Agg")  # draws without a screen
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_RIGHT, _WRONG = (26, 140, 60), (200, 40, 40)


def pair_grid(images: Tensor, captions: Sequence[str], columns: int = 4, cell: int = 200) -> np.ndarray:
    """Training pairs as the model sees them: images uint8 [n, c, h, w], each above its caption -> uint8 [H, W, 3]."""
    num_lines, line_height, line_characters = 4, 20, 24
    font = ImageFont.load_default(size=16)
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
    """What an objective made of samples: a row for each, its pictures beside each other and its text -> uint8 [H, W, 3]."""
    num_images, text_width = max(len(example.images) for example in examples), 460
    has_text = any(example.text for example in examples)
    page = Image.new("RGB", (num_images * cell + has_text * text_width, len(examples) * cell), "white")
    canvas = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=16)
    for i, example in enumerate(examples):
        for j, image in enumerate(example.images):
            page.paste(_thumbnail(image, cell - 8), (j * cell + 4, i * cell + 4))
        lines = [part for line in example.text.splitlines() for part in textwrap.wrap(line, 52)]
        place = (num_images * cell + 8, i * cell + 6)
        canvas.multiline_text(place, "\n".join(lines[: cell // 20]), fill="black", font=font, spacing=3)
    return np.asarray(page)


@dataclass(frozen=True)
class Answers:
    """A query and what was found for it, best first."""

    text: str
    """The query, or beside an image query nothing."""
    image: Tensor | None
    """uint8 [3, h, w] where the query is an image."""
    images: Sequence[Tensor]
    """The answers, where they are images."""
    texts: Sequence[str]
    """The answers, where they are texts."""
    is_right: Sequence[bool]


def _thumbnail(image: Tensor, side: int) -> Image.Image:
    pixels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((side, side), Image.Resampling.NEAREST)


def gallery(queries: Sequence[Answers], side: int = 120) -> np.ndarray:
    """Queries with their answers, a row each: right ones in green, wrong ones in red."""
    font = ImageFont.load_default(size=15)
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


def confusion(matrix: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """How often each class (rows) is taken for each other (columns): counts [C, C], shown as parts of their row."""
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(4 + 0.16 * len(names), 18)
    figure, axes = plt.subplots(figsize=(side + 1, side), constrained_layout=True)
    shown = axes.imshow(parts, vmin=0, vmax=1, cmap="viridis")
    if len(names) <= 120:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(shown, shrink=0.6, label="part of the true class")
    return rendered(figure)


def heat_maps(images: Sequence[Tensor], maps: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Images beside their patches' similarity to their captions: uint8 [3, h, w] and float [rows, columns] each."""
    figure, axes = plt.subplots(len(images), 2, figsize=(7, 2.6 * len(images)), squeeze=False, constrained_layout=True)
    for (left, right), image, values, caption in zip(axes, images, maps, captions, strict=True):
        picture = np.asarray(_thumbnail(image, 224))
        left.imshow(picture)
        left.set_title(textwrap.shorten(caption, 44, placeholder=" …"), fontsize=8)
        right.imshow(picture, alpha=0.4)
        extent = (0, picture.shape[1], picture.shape[0], 0)
        right.imshow(values, cmap="inferno", alpha=0.6, extent=extent, interpolation="bilinear")
        right.set_title(f"similarity {values.min():.2f} to {values.max():.2f}", fontsize=8)
        for place in (left, right):
            place.axis("off")
    return rendered(figure)


def curves(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], columns: int = 3) -> np.ndarray:
    """Small plots of (name, samples seen, values), one each."""
    rows = math.ceil(len(lines) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False, constrained_layout=True
    )
    for place in axes.flat[len(lines) :]:
        place.axis("off")
    for place, (name, xs, ys) in zip(axes.flat, lines):
        place.plot(xs, ys, linewidth=1.2, marker="o" if len(xs) < 3 else None)
        place.set_title(name, fontsize=9)
        place.set_xlabel("samples seen", fontsize=8)
        place.grid(alpha=0.3)
    return rendered(figure)


def rendered(figure: Figure, dpi: int = 110) -> np.ndarray:
    """A figure's pixels; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))
