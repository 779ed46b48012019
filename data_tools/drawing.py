"""Drawing of scenes of one or two shapes as RGB images. Sizes and positions are fractions of the image's side."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

Point = tuple[float, float]
Color = tuple[int, int, int]

SUPERSAMPLING = 4


@dataclass(frozen=True)
class DrawnObject:
    """Shape with centre (`x`, `y`) and nominal `radius`, as fractions of the side, and `rotation` in degrees."""

    shape: str
    color: Color
    x: float
    y: float
    radius: float
    rotation: float


def _polar(angles: list[float], radii: list[float]) -> list[Point]:
    return [(r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in zip(angles, radii)]


def _regular(corners: int, radius: float) -> list[Point]:
    return _polar([360 * i / corners for i in range(corners)], [radius] * corners)


def _star() -> list[Point]:
    return _polar([36.0 * i for i in range(10)], [1.12, 0.5] * 5)


def _heart() -> list[Point]:
    turns = [math.radians(5 * i) for i in range(72)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in turns
    ]


def _cross() -> list[Point]:
    a, b = 0.33, 1.0
    return [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]


def _crescent() -> list[Point]:
    """Return the disc of radius 1 minus the disc of radius 0.8 around (0.45, 0); they meet at cos(angle) = 0.625."""
    meet = math.acos(0.625)
    inner = math.atan2(math.sin(meet), 0.625 - 0.45)
    outer_arc = [meet + (2 * math.pi - 2 * meet) * i / 48 for i in range(49)]
    inner_arc = [2 * math.pi - inner - (2 * math.pi - 2 * inner) * i / 40 for i in range(41)]
    return [(math.cos(t), math.sin(t)) for t in outer_arc] + [
        (0.45 + 0.8 * math.cos(t), 0.8 * math.sin(t)) for t in inner_arc
    ]


# Outlines around (0, 0), with about equal areas instead of equal widths.
OUTLINES: dict[str, list[Point]] = {
    "circle": _regular(64, 0.88),
    "square": [(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)],
    "triangle": _regular(3, 1.12),
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
    "ring": _regular(64, 0.95),
    "crescent": _crescent(),
}
RING_HOLE = _regular(64, 0.5)
# Largest distance of an outline from its centre, in radii.
REACH = {shape: max(math.hypot(x, y) for x, y in outline) for shape, outline in OUTLINES.items()}


def draw_scene(objects: list[DrawnObject], background: Color, side: int) -> Image.Image:
    """Draw an RGB image with a side of `side` pixels, at four times the resolution, and average it down."""
    large = side * SUPERSAMPLING
    image = Image.new("RGB", (large, large), background)
    pen = ImageDraw.Draw(image)
    for thing in objects:
        pen.polygon(_placed(OUTLINES[thing.shape], thing, large), fill=thing.color)
        if thing.shape == "ring":
            pen.polygon(_placed(RING_HOLE, thing, large), fill=background)
    return image.reduce(SUPERSAMPLING)


def _placed(outline: list[Point], thing: DrawnObject, side: int) -> list[Point]:
    cos, sin = math.cos(math.radians(thing.rotation)), math.sin(math.radians(thing.rotation))
    return [
        (
            side * (thing.x + thing.radius * (x * cos - y * sin)),
            side * (thing.y + thing.radius * (x * sin + y * cos)),
        )
        for x, y in outline
    ]
