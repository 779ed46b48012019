"""Corruptions of images: what is published of each, scaling to small images, and randomness by the seed alone."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from mmpretrain.data import corruptions
from mmpretrain.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mmpretrain.data.image_filters import blurred

WITHOUT_NOISE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def photograph(side: int = 64) -> np.ndarray:
    """A smooth image with edges, uint8 [side, side, 3]."""
    rows, columns = np.mgrid[:side, :side] / side
    waves = [np.sin(7 * rows + 3 * columns), np.cos(9 * columns), np.where(rows > columns, 0.4, -0.5)]
    return (np.stack(waves, axis=2) * 90 + 125).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_its_arguments_alone(name: str) -> None:
    image = photograph()
    before, is_same = image.copy(), []
    for severity in SEVERITIES:
        first = corrupt(image, name, severity, 1)
        assert first.dtype == np.uint8 and first.shape == image.shape
        assert np.array_equal(first, corrupt(image, name, severity, 1))
        is_same.append(np.array_equal(first, corrupt(image, name, severity, 2)))
        assert 0.5 < np.abs(first.astype(float) - image).mean() < 120
    assert np.array_equal(image, before)
    assert all(is_same) == (name in WITHOUT_NOISE)


@pytest.mark.parametrize("side", [32, 64, 224])
def test_the_highest_severity_changes_more_than_the_lowest(side: int) -> None:
    image = photograph(side)
    for name in CORRUPTIONS:
        low, high = (np.square(corrupt(image, name, severity, 3) - image.astype(float)).mean() for severity in (1, 5))
        assert name == "elastic_transform" or low < high, (
            name
        )  # its severities differ in kind: first shifts, then ripples


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "elastic_transform"]
)
def test_a_small_image_is_changed_as_the_large_one_is(name: str) -> None:
    """The corrupted image of 224 pixels, shrunk, is nearer to the corrupted small one than the small one is itself."""

    def shrunk(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BOX))

    large, distances, changes = photograph(224), [], []
    for seed in range(3):
        small = corrupt(shrunk(large), name, 5, seed).astype(float)
        expected = shrunk(corrupt(large, name, 5, seed))
        distances.append(np.abs(small - expected)[6:-6, 6:-6].mean())
        changes.append(np.abs(expected.astype(float) - shrunk(large))[6:-6, 6:-6].mean())
    if name == "elastic_transform":  # the draws differ in number; the sizes of the changes agree
        small_change = np.abs(small - shrunk(large))[6:-6, 6:-6].mean()
        assert 0.4 < small_change / np.mean(changes) < 2.5
    else:
        assert np.mean(distances) < 0.35 * np.mean(changes)


def test_noise_has_the_published_strength() -> None:
    grey = np.full((224, 224, 3), 128, np.uint8)
    for severity, deviation in ((1, 0.08), (2, 0.12), (3, 0.18)):
        noisy = corrupt(grey, "gaussian_noise", severity, 0) / 255
        assert noisy.std() == pytest.approx(deviation, rel=0.02) and noisy.mean() == pytest.approx(0.5, abs=0.01)
    for severity, photons in ((1, 60), (3, 12)):
        noisy = corrupt(grey // 2, "shot_noise", severity, 0) / 255
        assert noisy.var() == pytest.approx(64 / 255 / photons, rel=0.04)
    for severity, amount in zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27)):
        noisy = corrupt(grey, "impulse_noise", severity, 0)
        assert (noisy != 128).mean() == pytest.approx(amount, rel=0.05)
        assert (noisy == 255).sum() == pytest.approx((noisy == 0).sum(), rel=0.1)


def test_brightness_raises_the_value_of_hue_saturation_and_value() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image[0, 0] = 0
    result = corrupt(image, "brightness", 3, 0).astype(int)
    for row, column in np.ndindex(6, 7):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[row, column] / 255))
        expected = np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))) * 255
        assert np.abs(result[row, column] - expected).max() <= 1


def test_contrast_pixelate_and_jpeg_are_the_published_operations() -> None:
    image = photograph(224)
    means = image.mean((0, 1))
    assert np.abs(corrupt(image, "contrast", 2, 0) - ((image - means) * 0.3 + means)).max() <= 1
    small = Image.fromarray(image).resize((112, 112), Image.Resampling.BOX)
    assert np.array_equal(corrupt(image, "pixelate", 2, 0), np.asarray(small.resize((224, 224), Image.Resampling.BOX)))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=10)
    assert np.array_equal(corrupt(image, "jpeg_compression", 4, 0), np.asarray(Image.open(buffer)))


def test_glass_takes_the_pixels_of_neighbours_one_after_the_other() -> None:
    x = photograph(224).astype(np.float32) / 255
    result = CORRUPTIONS["glass_blur"](x, 3, np.random.RandomState(5))  # reach 3, two rounds, sigma 1.1
    rng, pixels = np.random.RandomState(5), blurred(x, 1.1, 4, "edge")
    for _ in range(2):
        moves = iter(rng.randint(-3, 3, (218 * 218, 2)))
        for row in range(221, 3, -1):
            for column in range(221, 3, -1):
                right, down = next(moves)
                pixels[row, column] = pixels[row + down, column + right]
    np.testing.assert_allclose(result, blurred(pixels, 1.1, 4, "edge"), atol=1e-5)


def test_motion_is_one_sided_along_a_line() -> None:
    kernel = corruptions._trail(10, 3, 0.0, 1.0)
    row, column = len(kernel) // 2, kernel.shape[1] // 2
    assert kernel[row, column:].sum() == pytest.approx(1), "to the right alone"
    assert kernel[row, column + 3] / kernel[row, column] == pytest.approx(np.exp(-0.5))
    assert corruptions._trail(10, 3, 90.0, 1.0)[row:, column].sum() == pytest.approx(1)


def test_a_lens_spreads_a_point_over_a_disc() -> None:
    point = np.zeros((41, 41, 3), np.float32)
    point[20, 20] = 1
    kernel = corruptions._disc(6, 0.5, 1.0)
    spread = corruptions.correlated(point, kernel, "reflect")[..., 0]
    rows, columns = np.mgrid[-20:21, -20:21]
    inner, outer = rows**2 + columns**2 < 4.5**2, rows**2 + columns**2 > 7.6**2
    assert spread.sum() == pytest.approx(1, rel=1e-5)
    assert spread[inner].min() == pytest.approx(spread[inner].max(), rel=1e-4) and np.abs(spread[outer]).max() < 1e-6


def test_fractal_noise_is_rougher_with_less_decay() -> None:
    smooth, rough = (corruptions._plasma((200, 224), decay, np.random.RandomState(0)) for decay in (2, 1.4))
    for noise in (smooth, rough):
        assert noise.shape == (200, 224) and 0 <= noise.min() < 0.2 and 0.8 < noise.max() <= 1
    assert np.abs(np.diff(rough)).mean() > 3 * np.abs(np.diff(smooth)).mean()


def test_grey_images_stay_grey_and_alpha_stays_as_it_is() -> None:
    image = photograph(32)
    for name in CORRUPTIONS:
        grey = corrupt(image[..., :1], name, 2, 0)
        assert grey.shape == (32, 32, 1)
        coloured = corrupt(np.concatenate([image, image[..., :1]], axis=2), name, 2, 0)
        assert np.array_equal(coloured[..., :3], corrupt(image, name, 2, 0))
        assert np.array_equal(coloured[..., 3], image[..., 0])
