"""Patches projected by a convolution and by a matrix product."""

import pytest
import torch
from torch import nn

from mmpretrain.models.patch_projection import PatchProjection, side_by_side


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_product_is_the_convolution(has_bias: bool, channels_last: bool) -> None:
    """Of patches that are not square, in images with a border that fills none."""
    projection = PatchProjection(3, 10, (4, 8), stride=(4, 8), bias=has_bias).double()
    images = torch.randn(2, 3, 18, 33, dtype=torch.float64)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    found = []
    for way in (projection.forward, projection.product):
        projection.zero_grad()
        patches = way(images)
        assert patches.shape == (2, 10, 4, 4)
        patches.square().sum().backward()
        found.append([patches.detach(), *(parameter.grad for parameter in projection.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_it_is_taken_where_it_was_measured_to_be_faster() -> None:
    projection = PatchProjection(3, 10, 4, stride=4)
    images = torch.rand(2, 3, 8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as plain:
        expected = projection(images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as narrow, torch.autocast("cpu"):
        found = projection(images)
    called = [{event.key for event in each.key_averages()} for each in (plain, narrow)]
    assert ["aten::convolution" in names for names in called] == [True, False]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("other", [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}])
def test_other_convolutions_stay_what_they_are(other: dict[str, int]) -> None:
    convolution = nn.Conv2d(3, 6, 4, **{"stride": 4, **other})  # type: ignore[arg-type]
    assert side_by_side(convolution) is convolution


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_replaced_convolution_keeps_its_parameters_and_draws_no_numbers(has_bias: bool) -> None:
    convolution = nn.Conv2d(3, 6, (4, 8), stride=(4, 8), bias=has_bias)
    generator = torch.get_rng_state()
    projection = side_by_side(convolution)
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(projection) is PatchProjection
    assert [(name, id(p)) for name, p in projection.named_parameters()] == [
        (name, id(p)) for name, p in convolution.named_parameters()
    ]
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(projection(images), convolution(images))
