"""Conversion between images and patches, and the reconstruction loss of MAE: pure tensor functions."""

from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images [b, c, h, w] into patches [b, N, p_h p_w c].

    The pixels of a patch are in row-major order, with the channels of a pixel adjacent (MAE's layout). A border narrower
    than a patch is dropped, as in a ViT's patch embedding.
    """
    b, c, height, width = images.shape
    rows, columns = height // patch_size[0], width // patch_size[1]
    images = images[:, :, : rows * patch_size[0], : columns * patch_size[1]]
    x = images.reshape(b, c, rows, patch_size[0], columns, patch_size[1])
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch_size[0] * patch_size[1] * c)


def unpatchify(patches: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Assemble patches [b, N, p_h p_w c] of a grid of (rows, columns) into images [b, c, h, w]; inverts `patchify`."""
    rows, columns = grid_size
    x = patches.unflatten(2, (patch_size[0], patch_size[1], -1)).unflatten(1, (rows, columns))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the square root of (unbiased variance + 1e-6) of each patch, [b, N, 1] each.

    MAE normalises its targets with them.
    """
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def masked_reconstruction(prediction: Tensor, patches: Tensor, hidden: Tensor, norm_pix: bool) -> Tensor:
    """Sum the mean squared pixel error over hidden patches (MAE, He et al. 2022, section 3).

    Args:
        prediction: predicted patches, [b, N, p_h p_w c].
        patches: target patches, [b, N, p_h p_w c].
        hidden: bool [b, N], True where a patch is hidden.
        norm_pix: normalise each target patch by its own mean and deviation (see `patch_statistics`).

    Returns: a scalar, to be divided by the number of hidden patches in the whole batch.
    """
    if norm_pix:
        mean, deviation = patch_statistics(patches)
        patches = (patches - mean) / deviation
    return ((prediction - patches).square().mean(dim=-1) * hidden).sum()
