"""Images as patches, and the loss of reconstructing them: pure tensor functions."""

from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images [b, c, h, w] -> patches [b, N, p_h p_w c], pixels row by row with their channels together (MAE's layout).

    A border that fills no patch is left out, as a ViT's patch embedding leaves it out.
    """
    b, c, height, width = images.shape
    rows, columns = height // patch_size[0], width // patch_size[1]
    images = images[:, :, : rows * patch_size[0], : columns * patch_size[1]]
    x = images.reshape(b, c, rows, patch_size[0], columns, patch_size[1])
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, patch_size[0] * patch_size[1] * c)


def unpatchify(patches: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: patches [b, N, p_h p_w c] of a grid of (rows, columns) -> [b, c, h, w]."""
    rows, columns = grid_size
    x = patches.unflatten(2, (patch_size[0], patch_size[1], -1)).unflatten(1, (rows, columns))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch's mean and deviation [b, N, 1] (unbiased variance + 1e-6), which MAE's targets are normalised with."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def masked_reconstruction(prediction: Tensor, patches: Tensor, hidden: Tensor, norm_pix: bool) -> Tensor:
    """The sum over hidden patches of the mean squared error of their pixels (MAE, He et al. 2022, section 3).

    Args:
        prediction, patches: [b, N, p_h p_w c].
        hidden: bool [b, N].
        norm_pix: the target is each patch with its own mean taken away and divided by its own deviation
            (unbiased variance + 1e-6).

    Returns: a scalar, to be divided by the number of hidden patches of the whole batch.
    """
    if norm_pix:
        mean, deviation = patch_statistics(patches)
        patches = (patches - mean) / deviation
    return ((prediction - patches).square().mean(dim=-1) * hidden).sum()
