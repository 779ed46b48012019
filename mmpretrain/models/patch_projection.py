"""Patch projection as a matrix product, where that is faster than the convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.models.patches import patchify


class PatchProjection(nn.Conv2d):
    """Convolution with non-overlapping windows (kernel size = stride), computed as a matrix product on the CPU in autocast.

    It has the parameters of `nn.Conv2d` and returns the same values up to rounding. In bf16 on the CPU the product takes .6
    to .8 of the convolution's time, in float32 .95 to 1.2 (`analysis/benchmarks/patch_projection.py`). On CUDA it has not
    been measured.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Project images [b, c, h, w] to patch embeddings [b, d, rows, columns]."""
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return self.product(images)
        return super().forward(images)

    def product(self, images: Tensor) -> Tensor:
        """Compute `forward` by a matrix product."""
        height, width = self.kernel_size
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # the pixel order of patchify
        patches = F.linear(patchify(images, (height, width)), weight, self.bias)
        return patches.unflatten(1, (images.shape[2] // height, images.shape[3] // width)).permute(0, 3, 1, 2)


def side_by_side(convolution: nn.Module) -> nn.Module:
    """Return a `PatchProjection` with the parameters of a convolution whose windows do not overlap; any other unchanged."""
    if (
        type(convolution) is not nn.Conv2d
        or convolution.kernel_size != convolution.stride
        or convolution.padding != (0, 0)
        or convolution.dilation != (1, 1)
        or convolution.groups != 1
    ):
        return convolution
    # On the meta device the new parameters take no memory and draw nothing from the generator of the initial weights.
    projection = PatchProjection(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        stride=convolution.stride,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
        device="meta",
    )
    projection.weight, projection.bias = convolution.weight, convolution.bias
    return projection
