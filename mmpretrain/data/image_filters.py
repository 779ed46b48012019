"""Filters and interpolation of images in NumPy arrays, float [h, w, c], with a choice of what lies beyond the border."""

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Border = Literal["edge", "reflect", "symmetric"]
"""Values beyond the border, as `np.pad` names them."""


def scaled_kernel(rows: Any, columns: Any, weights: Any, scale: float) -> npt.NDArray[np.float64]:
    """Return a kernel of sum 1, [2 r + 1, 2 r + 1], of weights at offsets that are scaled.

    A scaled offset lies between pixels: its weight is divided among the four nearest ones, bilinearly.
    """
    places = np.stack([rows, columns]) * scale
    lower = np.floor(places).astype(np.int64)
    parts = places - lower
    reach = int(np.abs(lower).max()) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for down in (0, 1):
        for right in (0, 1):
            share = np.abs(1 - down - parts[0]) * np.abs(1 - right - parts[1])
            np.add.at(kernel, (lower[0] + down + reach, lower[1] + right + reach), weights * share)
    return kernel / kernel.sum()


def correlated(x: npt.NDArray[Any], kernel: npt.NDArray[np.float64], border: Border) -> npt.NDArray[Any]:
    """Correlate each channel of x [h, w, c] with a kernel of odd sides."""
    down, right = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = torch.from_numpy(np.pad(x, ((down, down), (right, right), (0, 0)), border)).permute(2, 0, 1)
    size = list(padded.shape[1:])
    # Correlation is a product of spectra. It wraps around beyond the first h rows and w columns alone.
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(torch.from_numpy(kernel).to(padded.dtype), size).conj()
    return torch.fft.irfft2(spectrum, size)[:, : x.shape[0], : x.shape[1]].permute(1, 2, 0).numpy()


@lru_cache(maxsize=64)
def _blur_matrix(size: int, sigma: float, truncate: float, border: Border) -> npt.NDArray[np.float64]:
    """Return the matrix [size, size] that blurs a column by a Gaussian, cut off at `truncate` standard deviations."""
    reach = int(truncate * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    bell = np.exp(-np.square(offsets) / (2 * sigma**2))
    matrix = np.zeros((size, size))
    places = np.arange(size)[:, None]
    np.add.at(matrix, (places, _inside(places + offsets, size, border)), bell / bell.sum())
    return matrix


def blurred(x: npt.NDArray[Any], sigma: float, truncate: float, border: Border) -> npt.NDArray[Any]:
    """Blur [h, w, c] by a Gaussian."""
    rows, columns = (_blur_matrix(size, sigma, truncate, border).astype(x.dtype) for size in x.shape[:2])
    return np.einsum("ij,jkc->ikc", rows, np.einsum("lk,jkc->jlc", columns, x, optimize=True), optimize=True)


def _inside(places: npt.NDArray[np.int64], size: int, border: Border) -> npt.NDArray[np.int64]:
    """Return the indices in range(size) whose values stand at indices beyond the border."""
    if border == "edge":
        return places.clip(0, size - 1)
    period = 2 * size if border == "symmetric" else max(2 * size - 2, 1)
    places = places % period
    return np.minimum(places, period - places - (border == "symmetric"))


def sampled(x: npt.NDArray[Any], rows: Any, columns: Any, border: Border) -> npt.NDArray[Any]:
    """Return the values of x [h, w, c] at places [h, w] between its pixels, interpolated bilinearly."""
    result = np.zeros((*rows.shape, x.shape[2]))
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    for down in (0, 1):
        for right in (0, 1):
            share = np.abs(1 - down - (rows - top)) * np.abs(1 - right - (columns - left))
            values = x[_inside(top + down, x.shape[0], border), _inside(left + right, x.shape[1], border)]
            result += share[..., None] * values
    return result.astype(np.float32)


def zoomed(x: npt.NDArray[Any], factor: float) -> npt.NDArray[Any]:
    """Magnify the centre of x [h, w, c] bilinearly to the size of x."""
    height, width = x.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    part = torch.from_numpy(x[top : top + rows, left : left + columns]).permute(2, 0, 1)[None]
    size = [round(rows * factor), round(columns * factor)]
    large = F.interpolate(part, size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[top : top + height, left : left + width]
