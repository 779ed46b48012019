"""Crops: inside the image, named by the seed alone, and distributed as torchvision's are."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from mmpretrain.data.decode import Crop
from mmpretrain.data.transforms import CenterCrop, RandomResizedCrop
from mmpretrain.seeds import draw


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [(10, 20, Crop(0, 5, 10, 10)), (21, 10, Crop(5, 0, 10, 10)), (7, 7, Crop(0, 0, 7, 7)), (1, 9, Crop(0, 4, 1, 1))],
)
def test_center_crop_is_the_largest_centred_square(height: int, width: int, crop: Crop) -> None:
    assert CenterCrop()(height, width) == crop == CenterCrop()(height, width, seed=99)


def boxes(transform: RandomResizedCrop, height: int, width: int, num: int) -> list[Crop]:
    return [transform(height, width, draw(123, i)) for i in range(num)]


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between two empirical distribution functions."""
    values = np.concatenate([a, b])
    cdf_a, cdf_b = (np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b))
    return float(np.abs(cdf_a - cdf_b).max())


@pytest.mark.parametrize(
    ("scale", "ratio", "height", "width"),
    [
        ((0.08, 1.0), (3 / 4, 4 / 3), 240, 320),
        ((0.8, 1.0), (3 / 4, 4 / 3), 300, 200),
        ((0.3, 0.9), (0.5, 3.0), 100, 100),
    ],
)
def test_random_resized_crop_is_distributed_as_torchvisions(
    scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> None:
    num = 3000
    ours = np.array(
        [(c.top, c.left, c.height, c.width) for c in boxes(RandomResizedCrop(scale, ratio), height, width, num)]
    )
    image = torch.empty(3, height, width)
    theirs = np.array([TorchvisionCrop.get_params(image, list(scale), list(ratio)) for _ in range(num)])
    bound = 1.95 * np.sqrt(2 / num)  # two samples of one distribution are further apart once in a thousand times
    for quantity in (
        lambda top, left, h, w: top,
        lambda top, left, h, w: left,
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: (top + 1) / (height - h + 1),
    ):
        assert ks_distance(quantity(*ours.T), quantity(*theirs.T)) < bound


@pytest.mark.parametrize(("height", "width"), [(1000, 10), (10, 1000), (1, 1), (3, 2), (50, 2), (100, 133)])
def test_crops_lie_inside_the_image(height: int, width: int) -> None:
    for crop in boxes(RandomResizedCrop((0.05, 1.0)), height, width, 300):
        assert crop.height > 0 and crop.width > 0 and crop.top >= 0 and crop.left >= 0
        assert crop.top + crop.height <= height and crop.left + crop.width <= width


@pytest.mark.parametrize(("height", "width"), [(1000, 10), (10, 1000), (997, 333), (30, 5)])
def test_where_no_draw_fits_the_central_crop_is_torchvisions(height: int, width: int) -> None:
    """Full area at a ratio that the image does not have."""
    expected = TorchvisionCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    for crop in boxes(RandomResizedCrop((1.0, 1.0)), height, width, 5):
        assert (crop.top, crop.left, crop.height, crop.width) == expected


def test_every_place_can_be_drawn_both_ends_included() -> None:
    crops = boxes(RandomResizedCrop((0.25, 0.25), (1.0, 1.0)), 8, 8, 500)
    assert {crop.top for crop in crops} == {crop.left for crop in crops} == set(range(5))


def test_a_crop_is_a_function_of_its_seed() -> None:
    first, second = (
        RandomResizedCrop((0.1, 1.0), horizontal_flip=0.5),
        RandomResizedCrop((0.1, 1.0), horizontal_flip=0.5),
    )
    crops = boxes(first, 64, 64, 50)
    assert crops == boxes(second, 64, 64, 50)[:50] and len(set(crops)) == 50
    assert [first(64, 64, draw(123, i)) for i in reversed(range(50))] == crops[::-1]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_mirrored_with_the_probability_asked_for_wherever_the_box_lies(probability: float) -> None:
    num = 4000
    crops = boxes(RandomResizedCrop((0.2, 1.0), horizontal_flip=probability), 64, 64, num)
    flips = np.array([crop.flip for crop in crops])
    assert abs(flips.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / num)
    if 0 < probability < 1:
        assert abs(np.corrcoef(flips, [crop.top for crop in crops])[0, 1]) < 4 / np.sqrt(num)


def test_flipping_moves_no_box() -> None:
    plain, flipped = (boxes(RandomResizedCrop((0.2, 1.0), horizontal_flip=p), 50, 60, 20) for p in (0.0, 1.0))
    assert [(c.top, c.left, c.height, c.width) for c in plain] == [(c.top, c.left, c.height, c.width) for c in flipped]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale is \[0\.0, 1\.0\]; expected two numbers with 0 < smallest <= largest <= 1"),
        ({"scale": (0.9, 0.8)}, r"scale is \[0\.9, 0\.8\]"),
        ({"scale": (0.5, 1.5)}, r"scale is \[0\.5, 1\.5\]"),
        ({"ratio": (0.0, 1.0)}, r"ratio is \[0\.0, 1\.0\]"),
        ({"ratio": (2.0, 1.0)}, r"ratio is \[2\.0, 1\.0\]"),
        ({"horizontal_flip": 1.5}, r"horizontal_flip is 1\.5; expected a probability"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(**arguments)  # type: ignore[arg-type]
