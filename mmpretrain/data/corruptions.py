"""The fifteen corruptions of ImageNet-C at five severities (Hendrycks & Dietterich 2019), made from a seed.

The constants are the published ones, which are meant for images of 224 pixels. For an image whose shorter side is s < 224:

- lengths, such as the radius of a blur, are multiplied by s / 224;
- snow, frost and fog are drawn at 224 pixels and shrunk;
- noise is drawn for each pixel, and JPEG's blocks have 8 pixels, as always.

Images larger than 224 have the published lengths in pixels. The photographs of frost, which ImageNet-C mixes in, are
replaced by a drawn texture of ice, so that scores under `frost` are not those of the published files.
"""

import io
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from mmpretrain import seeds
from mmpretrain.data.image_filters import blurred, correlated, sampled, scaled_kernel, zoomed

Pixels = npt.NDArray[np.floating[Any]]
"""Image with values in [0, 1], float32 or float64 [h, w, 3]."""
Rng = np.random.RandomState
"""NumPy never changes the streams of this class, unlike those of its newer generators."""

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224


def corrupt(image: npt.NDArray[np.uint8], name: str, severity: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return a corrupted image, uint8 [h, w, c], a pure function of its arguments.

    Args:
        image: image, uint8 [h, w, c]; c is 1 (grey), 3 (colour) or 4 (colour and alpha, which stays as it is).
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: seed of the sample; each corruption and severity draws from it independently.
    """
    mixed = seeds.hash64(seed, name, severity)
    rng = np.random.RandomState([mixed & 0xFFFFFFFF, mixed >> 32])
    colour = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]
    result = CORRUPTIONS[name](colour.astype(np.float32) / 255, severity - 1, rng)
    # Rounded down, as the published files are, except for the rounding error of a whole number.
    pixels = (np.clip(result, 0, 1) * 255 + 1e-3).astype(np.uint8)
    return np.concatenate([pixels, image[..., 3:]], axis=2) if image.shape[2] == 4 else pixels[..., : image.shape[2]]


def _scale(x: Pixels) -> float:
    """Return the factor of the published lengths."""
    return min(1.0, min(x.shape[:2]) / _SIDE)


# Noise


def _gaussian_noise(x: Pixels, level: int, rng: Rng) -> Pixels:
    return x + _normal(rng, x.shape, (0.08, 0.12, 0.18, 0.26, 0.38)[level])


def _shot_noise(x: Pixels, level: int, rng: Rng) -> Pixels:
    photons = (60, 25, 12, 5, 3)[level]
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def _impulse_noise(x: Pixels, level: int, rng: Rng) -> Pixels:
    is_replaced = rng.random_sample(x.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return np.where(is_replaced, rng.random_sample(x.shape) < 0.5, x).astype(np.float32)


def _normal(rng: Rng, shape: Sequence[int], deviation: float, mean: float = 0.0) -> Pixels:
    return rng.normal(mean, deviation, tuple(shape)).astype(np.float32)


# Blur


def _defocus_blur(x: Pixels, level: int, _: Rng) -> Pixels:
    radius, blur = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    return correlated(x, _disc(radius, blur, _scale(x)), "reflect")


@lru_cache
def _disc(radius: int, blur: float, scale: float) -> npt.NDArray[np.float64]:
    """Return the kernel of a lens: a disc, blurred by a Gaussian of 3 x 3 pixels, or of 5 x 5 for large radii."""
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    places = np.arange(-reach, reach + 1)
    disc = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    bell = np.exp(-np.square(np.arange(-half, half + 1)) / (2 * blur**2))
    smooth = correlated(disc[..., None], np.outer(bell, bell) / bell.sum() ** 2, "reflect")[..., 0]
    rows, columns = np.nonzero(smooth)
    return scaled_kernel(rows - reach, columns - reach, smooth[rows, columns], scale)


def _glass_blur(x: Pixels, level: int, rng: Rng) -> Pixels:
    sigma, reach, repeats = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    height, width = x.shape[:2]
    scale = _scale(x)
    limit = math.ceil(reach * scale)
    sources = list(range(height * width))
    rows, columns = np.arange(height - limit, limit, -1), np.arange(width - limit, limit, -1)
    places = (rows[:, None] * width + columns).ravel()
    for _ in range(repeats):
        moves = rng.randint(-reach, reach, (len(places), 2))  # columns and rows
        if scale < 1:  # rounded at random, so that a part of the pixels moves
            moves = np.minimum(np.floor(moves * scale + rng.random_sample(moves.shape)), limit - 1).astype(np.int64)
        # The published files exchange no pixels: each takes the value that another one has at that time.
        for place, source in zip(places.tolist(), (places + moves @ np.array([1, width])).tolist()):
            sources[place] = sources[source]
    smooth = blurred(x, sigma * scale, 4, "edge").reshape(-1, 3)
    return blurred(smooth[sources].reshape(x.shape), sigma * scale, 4, "edge")


def _motion_blur(x: Pixels, level: int, rng: Rng) -> Pixels:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return correlated(x, _trail(radius, sigma, rng.uniform(-45, 45), _scale(x)), "edge")


def _trail(radius: int, sigma: float, angle: float, scale: float) -> npt.NDArray[np.float64]:
    """Return ImageMagick's kernel of motion: one half of a Gaussian, on the pixels nearest to a line.

    Args:
        radius, sigma: length is 2 radius + 1, and the Gaussian's standard deviation, in pixels.
        angle: direction of the line, in degrees.
        scale: factor of the lengths.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-np.square(steps) / (2 * sigma**2))
    radians = math.radians(angle)
    rows, columns = (np.ceil(steps * part - 0.5) for part in (math.sin(radians), math.cos(radians)))
    return scaled_kernel(rows, columns, weights, scale)


def _zoom_blur(x: Pixels, level: int, _: Rng) -> Pixels:
    stop, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    factors = np.arange(1, stop, step)
    return (x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


# Weather


def _snow(x: Pixels, level: int, rng: Rng) -> Pixels:
    mean, deviation, zoom, threshold, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = zoomed(_normal(rng, (*_layer_size(x), 1), deviation, mean), zoom)
    flakes = np.where(flakes < threshold, 0, np.minimum(flakes, 1))
    flakes = _shrunk(correlated(flakes, _trail(radius, sigma, rng.uniform(-135, -45), 1.0), "edge"), x)
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    whitened = share * x + (1 - share) * np.maximum(x, grey[..., None] * 1.5 + 0.5)
    return whitened + flakes + np.rot90(flakes, 2)


def _frost(x: Pixels, level: int, rng: Rng) -> Pixels:
    of_image, of_ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return of_image * x + of_ice * _shrunk(_ice(_layer_size(x), rng), x)


def _ice(size: tuple[int, int], rng: Rng) -> Pixels:
    """Draw ice on a window, float32 [h, w, 3]: bright crystals along the ridges of fractal noise, in patches."""
    ridges = sum((1 - np.abs(2 * _plasma(size, 1.3, rng) - 1)) ** 8 for _ in range(2))
    patches = _plasma(size, 1.5, rng)
    ice = np.clip(0.1 + 0.5 * patches + 0.7 * ridges * patches, 0, 1)
    return (ice[..., None] * np.array([0.82, 0.92, 1.0])).astype(np.float32)


def _fog(x: Pixels, level: int, rng: Rng) -> Pixels:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    brightest = x.max()
    return (x + amount * _shrunk(_plasma(_layer_size(x), decay, rng)[..., None], x)) * brightest / (brightest + amount)


def _brightness(x: Pixels, level: int, _: Rng) -> Pixels:
    value = x.max(axis=2, keepdims=True)  # of hue, saturation and value
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.where(value > 0, x * (raised / np.maximum(value, np.finfo(np.float32).tiny)), raised)


# Digital


def _contrast(x: Pixels, level: int, _: Rng) -> Pixels:
    means = x.mean(axis=(0, 1))
    return (x - means) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + means


def _elastic_transform(x: Pixels, level: int, rng: Rng) -> Pixels:
    alpha, sigma, shift = (
        (488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88),
    )[level]  # fmt: skip
    height, width = x.shape[:2]
    scale = _scale(x)
    centre, third = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = centre + np.array([(third, third), (third, -third), (-third, -third)])  # columns and rows
    moved = corners + rng.uniform(-shift, shift, corners.shape) * scale
    to_source = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ to_source
    affine = sampled(x, places[..., 1], places[..., 0], "reflect")
    # The mean of noise over sigma pixels is inversely proportional to sigma: displacements scale with alpha / sigma.
    noise = rng.uniform(-1, 1, (height, width, 2))
    moves = blurred(noise, sigma * scale, 3, "symmetric") * alpha * scale**2
    return sampled(affine, rows + moves[..., 1], columns + moves[..., 0], "symmetric")


def _pixelate(x: Pixels, level: int, _: Rng) -> Pixels:
    part = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = x.shape[:2]
    small = _picture(x).resize((max(1, int(width * part)), max(1, int(height * part))), Image.Resampling.BOX)
    return _pixels(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(x: Pixels, level: int, _: Rng) -> Pixels:
    buffer = io.BytesIO()
    _picture(x).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return _pixels(Image.open(buffer, formats=["JPEG"]))


def _picture(x: Pixels) -> Image.Image:
    return Image.fromarray((x * 255).round().astype(np.uint8))


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture, np.float32) / 255


# Layers of weather


def _layer_size(x: Pixels) -> tuple[int, int]:
    """Return the size at which weather is drawn: that of the image, or that with a shorter side of 224 pixels."""
    return round(x.shape[0] / _scale(x)), round(x.shape[1] / _scale(x))


def _plasma(size: tuple[int, int], decay: float, rng: Rng) -> Pixels:
    """Draw fractal noise in [0, 1], float32 [h, w], by the diamond-square algorithm on a torus.

    Args:
        size: (h, w).
        decay: square root of the factor by which the noise of each finer level is smaller, as the published code has it.
        rng: source of the noise.
    """
    side = 1 << (max(size) - 1).bit_length()
    grid, amplitude, step = np.zeros((side, side)), 1.0, side

    def noisy_mean(corners: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return corners / 4 + amplitude * rng.uniform(-1, 1, corners.shape)

    while step >= 2:
        half = step // 2
        corners = grid[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        grid[half::step, half::step] = noisy_mean(pairs + np.roll(pairs, -1, 1))
        centres = grid[half::step, half::step]
        above, beside = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 0)
        grid[::step, half::step] = noisy_mean(above + centres + np.roll(centres, 1, 0))
        grid[half::step, ::step] = noisy_mean(beside + centres + np.roll(centres, 1, 1))
        step, amplitude = half, amplitude / decay**2
    grid -= grid.min()
    return (grid / max(grid.max(), np.finfo(np.float64).tiny)).astype(np.float32)[: size[0], : size[1]]


def _shrunk(layer: npt.NDArray[Any], x: Pixels) -> Pixels:
    """Resize a layer [H, W, c] to the size of an image by the mean over areas."""
    whole = torch.from_numpy(np.ascontiguousarray(layer, np.float32)).permute(2, 0, 1)[None]
    return F.interpolate(whole, x.shape[:2], mode="area")[0].permute(1, 2, 0).numpy()


CORRUPTIONS: dict[str, Callable[[Pixels, int, Rng], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""Functions of (image, severity - 1, source of randomness), by the published names in the published order."""
