"""Filters and interpolation, against scipy."""

import numpy as np
import pytest
import scipy.ndimage

from mmpretrain.data.image_filters import Border, blurred, correlated, sampled, scaled_kernel, zoomed

IMAGE = np.random.default_rng(0).random((13, 17, 2))
_OF_SCIPY = {"edge": "nearest", "reflect": "mirror", "symmetric": "reflect"}


@pytest.mark.parametrize("border", ["edge", "reflect", "symmetric"])
def test_a_blur_is_that_of_scipy(border: Border) -> None:
    for sigma in (0.2, 1.3, 9.0):  # the last one is wider than the image
        expected = scipy.ndimage.gaussian_filter(IMAGE, (sigma, sigma, 0), mode=_OF_SCIPY[border], truncate=3)
        np.testing.assert_allclose(blurred(IMAGE, sigma, 3, border), expected, atol=1e-12)


@pytest.mark.parametrize("border", ["edge", "reflect"])
def test_a_correlation_is_that_of_scipy(border: Border) -> None:
    kernel = np.random.default_rng(1).random((5, 9))
    expected = scipy.ndimage.correlate(IMAGE, kernel[..., None], mode=_OF_SCIPY[border])
    np.testing.assert_allclose(correlated(IMAGE, kernel, border), expected, atol=1e-12)


@pytest.mark.parametrize("border", ["edge", "reflect", "symmetric"])
def test_values_between_pixels_are_those_of_scipy(border: Border) -> None:
    rows, columns = np.random.default_rng(2).uniform(-20, 30, (2, 6, 5))
    expected = scipy.ndimage.map_coordinates(IMAGE[..., 1], [rows, columns], order=1, mode=_OF_SCIPY[border])
    np.testing.assert_allclose(sampled(IMAGE, rows, columns, border)[..., 1], expected, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1.06, 1.5, 3.0])
def test_a_zoom_is_the_centre_of_that_of_scipy(factor: float) -> None:
    height, width = IMAGE.shape[:2]
    rows, columns = int(np.ceil(height / factor)), int(np.ceil(width / factor))
    top, left = (height - rows) // 2, (width - columns) // 2
    large = scipy.ndimage.zoom(IMAGE[top : top + rows, left : left + columns], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    np.testing.assert_allclose(zoomed(IMAGE, factor), large[top : top + height, left : left + width], atol=1e-12)


def test_a_kernel_keeps_its_sum_and_its_centre_when_it_is_scaled() -> None:
    rows, columns, weights = np.array([0, 4, -6]), np.array([2, -5, 3]), np.array([0.2, 0.3, 0.5])
    whole = scaled_kernel(rows, columns, weights, 1.0)
    reach = len(whole) // 2
    np.testing.assert_allclose(whole[rows + reach, columns + reach], weights)
    scaled = scaled_kernel(rows, columns, weights, 0.3)
    places = np.arange(len(scaled)) - len(scaled) // 2
    assert scaled.sum() == pytest.approx(1)
    assert scaled.sum(1) @ places == pytest.approx(0.3 * weights @ rows)
    assert scaled.sum(0) @ places == pytest.approx(0.3 * weights @ columns)
