"""The projection of patches, which models write as a convolution, as one matrix product where that is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.models.patches import patchify


class PatchProjection(nn.Conv2d):
    """A convolution whose windows lie side by side; the same parameters, and the same values to rounding.

    In bf16 on the CPU the product takes .6 to .8 of the convolution's time, in float32 .95 to 1.2
    (`analysis/benchmarks/patch_projection.py`); on CUDA it has not been measured.
    """

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, d, rows, columns]."""
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return self.product(images)
        return super().forward(images)

    def product(self, images: Tensor) -> Tensor:
        """The same by a matrix product."""
        height, width = self.kernel_size
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # as patchify lays pixels
        patches = F.linear(patchify(images, (height, width)), weight, self.bias)
        return patches.unflatten(1, (images.shape[2] // height, images.shape[3] // width)).permute(0, 3, 1, 2)


def project_side_by_side(convolution: nn.Module) -> None:
    """Make a convolution a `PatchProjection`, in place, if its windows lie side by side; leave any other as it is."""
    if (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    ):
        convolution.__class__ = PatchProjection
