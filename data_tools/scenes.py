"""Scenes and captions: shape × colour × size × position × relation to a second, smaller object."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from data_tools.drawing import OUTLINES, REACH, Color, DrawnObject
from mmpretrain.seeds import uniform

Item = TypeVar("Item")

SHAPES = tuple(OUTLINES)
COLORS: dict[str, Color] = {
    "red": (214, 40, 40),
    "orange": (242, 133, 0),
    "yellow": (245, 216, 40),
    "green": (40, 158, 60),
    "cyan": (40, 200, 215),
    "blue": (40, 80, 214),
    "purple": (128, 48, 176),
    "pink": (246, 130, 190),
}
# All pairs of colour and shape; the index in this tuple is the class.
CLASSES = tuple((color, shape) for color in COLORS for shape in SHAPES)
# Held-out pairs, the same for every seed: one per shape and per colour, since 3 and 8 have no common factor.
HELD_OUT = frozenset((tuple(COLORS)[(3 * i + 1) % 8], shape) for i, shape in enumerate(SHAPES))
TRAINED = tuple(pair for pair in CLASSES if pair not in HELD_OUT)

SIZES = {"small": (0.17, 0.18), "medium": (0.23, 0.24), "large": (0.29, 0.30)}  # radii
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
POSITIONS = {
    (-1, -1): "in the upper left",
    (0, -1): "at the top",
    (1, -1): "in the upper right",
    (-1, 0): "on the left",
    (0, 0): "in the center",
    (1, 0): "on the right",
    (-1, 1): "in the lower left",
    (0, 1): "at the bottom",
    (1, 1): "in the lower right",
}
# Direction from the main object to the second -> relation of the main object to the second.
RELATIONS = {(1, 0): "to the left of", (-1, 0): "to the right of", (0, 1): "above", (0, -1): "below"}

MARGIN = 0.02
SECOND_RADIUS = 0.08  # minimum: a diameter of ten pixels in an image of 64
SECOND_RATIO = (0.45, 0.6)  # fraction of the main object's radius


@dataclass(frozen=True)
class Scene:
    """Content of an image; `relation` and `second` are None if there is only the main object."""

    color: str
    shape: str
    size: str
    position: str
    relation: str | None
    second: tuple[str, str] | None
    objects: list[DrawnObject]
    background: Color
    caption: str


class Draws:
    """Sequence of random draws from one sample's seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.counter = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        self.counter += 1
        return low + (high - low) * uniform(self.seed, self.counter - 1)

    def choice(self, items: Sequence[Item]) -> Item:
        return items[int(self.uniform(0, len(items)))]


def make_scene(seed: int, pair: tuple[str, str]) -> Scene:
    """Draw the scene of a sample's seed, with `pair` (colour, shape) as its main object.

    The second object is never a held-out pair, so held-out pairs occur only in their own split.
    """
    draws = Draws(seed)
    color, shape = pair
    size = draws.choice(tuple(SIZES))
    cell = draws.choice(tuple(POSITIONS))
    radius = draws.uniform(*SIZES[size])
    reach = radius * REACH[shape]
    x, y = (_coordinate(draws, third, reach) for third in cell)
    main = DrawnObject(shape, _jitter(draws, COLORS[color]), x, y, radius, _rotation(draws))

    second_pair = draws.choice([other for other in TRAINED if other != pair])
    beside = _second_object(draws, main, second_pair) if draws.uniform() < 0.5 else None
    relation = beside[0] if beside else None
    level = draws.uniform(195, 245)
    return Scene(
        color=color,
        shape=shape,
        size=size,
        position=POSITIONS[cell],
        relation=relation,
        second=second_pair if beside else None,
        objects=[main, beside[1]] if beside else [main],
        background=_jitter(draws, (int(level), int(level), int(level)), 8),
        caption=_caption(draws, pair, size, POSITIONS[cell], relation, second_pair if beside else None),
    )


def _coordinate(draws: Draws, third: int, reach: float) -> float:
    """Draw a coordinate of the centre in one of three separate ranges that keep the whole object inside the image."""
    low, high = {-1: (reach + MARGIN, 0.38), 0: (0.46, 0.54), 1: (0.62, 1 - reach - MARGIN)}[third]
    return draws.uniform(low, high)


def _second_object(draws: Draws, main: DrawnObject, pair: tuple[str, str]) -> tuple[str, DrawnObject] | None:
    """Return the relation and a second object beside the main one; None if there is no room."""
    color, shape = pair
    main_reach = main.radius * REACH[main.shape]
    room = {
        (1, 0): 1 - main.x - main_reach,
        (-1, 0): main.x - main_reach,
        (0, 1): 1 - main.y - main_reach,
        (0, -1): main.y - main_reach,
    }
    needed = 2 * SECOND_RADIUS * REACH[shape] + 2 * MARGIN
    sides = [side for side in RELATIONS if room[side] >= needed]
    if not sides:  # around some large objects in the center
        return None
    side = draws.choice(sides)
    largest = (room[side] - 2 * MARGIN) / 2 / REACH[shape]
    radius = min(max(draws.uniform(*SECOND_RATIO) * main.radius, SECOND_RADIUS), largest)
    reach = radius * REACH[shape]
    along = main_reach + reach + MARGIN + draws.uniform(0, 0.5) * (room[side] - 2 * reach - 2 * MARGIN)
    # The sideways offset is below half the distance, so that exactly one relation holds.
    low, high = reach + MARGIN, 1 - reach - MARGIN
    across = draws.uniform(-0.4, 0.4) * along
    x = main.x + side[0] * along if side[0] else min(max(main.x + across, low), high)
    y = main.y + side[1] * along if side[1] else min(max(main.y + across, low), high)
    return RELATIONS[side], DrawnObject(shape, _jitter(draws, COLORS[color]), x, y, radius, _rotation(draws))


def _rotation(draws: Draws) -> float:
    """Draw a rotation in degrees; the range is small so that a small model learns the shapes in minutes."""
    return draws.uniform(-15, 15)


def _jitter(draws: Draws, color: Color, by: int = 14) -> Color:
    red, green, blue = (min(max(round(level + draws.uniform(-by, by)), 0), 255) for level in color)
    return red, green, blue


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _caption(
    draws: Draws,
    pair: tuple[str, str],
    size: str,
    position: str,
    relation: str | None,
    second: tuple[str, str] | None,
) -> str:
    """Return a caption that begins with the main object.

    More than half of the captions leave out its size, its position or the second object.
    """
    bare = _article(" ".join(pair))
    sized = _article(f"{draws.choice(SIZE_WORDS[size])} {' '.join(pair)}")
    if relation is None or second is None:
        forms = [f"{sized} {position}"] * 4 + [f"there is {sized} {position}", sized, f"{bare} {position}"]
    else:
        other = _article(" ".join(second))
        forms = [f"{sized} {position}, {relation} {other}"] * 4
        forms += [f"{sized} {position}; it is {relation} {other}", f"{sized} {relation} {other}"]
        forms += [f"{bare} {relation} {other}", f"{sized} {position} and {other}"]
    return bare if draws.uniform() < 0.5 else draws.choice(forms)
