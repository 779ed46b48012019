"""Masked autoencoding against a decoder written out sample by sample."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpretrain.batch import Batch
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.objectives.mae import MAE
from mmpretrain.schedules import TrainingProgress
from mmpretrain.training.task import Encodings
from tests import tiny

DECODER: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}


def published_positions(width: int, rows: int, columns: int) -> np.ndarray:
    """MAE's util/pos_embed.py, get_2d_sincos_pos_embed, for a grid that need not be square."""

    def of_axis(dim: int, places: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
        out = np.einsum("m,d->md", places.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(columns, dtype=np.float64), np.arange(rows, dtype=np.float64)))
    return np.concatenate([of_axis(width // 2, grid[0]), of_axis(width // 2, grid[1])], axis=1)


def test_positions_are_the_published_ones() -> None:
    model = tiny.image_text(patch_size=(4, 8))
    mae = MAE(model, **DECODER)
    assert mae.positions.shape == (1, 8 * 4, 16)
    np.testing.assert_allclose(mae.positions[0].numpy(), published_positions(16, 8, 4), atol=1e-7)
    assert "positions" not in mae.state_dict()


def test_heads_start_as_published() -> None:
    mae = MAE(tiny.image_text(), decoder_width=128, decoder_depth=1, decoder_heads=4)
    bound = (6 / (128 + 4 * 128)) ** 0.5  # xavier
    weight = mae.blocks[0].mlp.fc1.weight.detach()
    assert 0.98 * bound < weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert mae.norm.eps == mae.blocks[0].norm1.eps == mae.blocks[0].norm2.eps == 1e-6
    assert not mae.decoder_embed.bias.any() and not mae.predict.bias.any()
    assert float(mae.mask_token.detach().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("ratio", "num_hidden"), [(0.75, 12), (0.6, 10), (0.1, 2)])
def test_count_of_a_constant_ratio_is_that_many_patches_of_each_sample(ratio: float, num_hidden: int) -> None:
    batch = tiny.batch([3, 4, 5])
    assert MAE(tiny.image_text(), mask_ratio=ratio, **DECODER).count(batch).item() == 3 * num_hidden


def test_count_of_a_range_is_the_hidden_patches_of_the_masks_that_are_drawn() -> None:
    batch = tiny.batch([3] * 40)
    model = tiny.image_text()
    mae = MAE(model, mask_ratio=[0.25, 0.75], **DECODER)
    hidden = Encodings(model, batch).patch_mask("pairs", mae.mask(TrainingProgress())).hidden.sum(1)
    assert mae.count(batch) == hidden.sum()
    assert set(hidden.tolist()) == set(range(4, 13))


def loss_by_sample(model: ImageTextModel, mae: MAE, batch: Batch) -> Tensor:
    """The sum of the loss, each sample on its own: only tokens that stay, put back one by one."""
    samples = batch.streams["pairs"]
    assert samples.images is not None
    pixels = model.normalize(samples.images)
    mask = Encodings(model, batch).patch_mask("pairs", mae.mask(TrainingProgress()))
    trunk, prefix = model.image.trunk, model.image.num_prefix_tokens
    rows, columns = model.image.grid_size
    positions = torch.from_numpy(published_positions(16, rows, columns).astype(np.float32)).double()
    height, width = model.image.patch_size
    total = torch.zeros((), dtype=torch.float64)
    for image, hidden in zip(pixels, mask.hidden, strict=True):
        kept = (~hidden).nonzero()[:, 0].tolist()
        tokens = trunk._pos_embed(trunk.patch_embed(image[None]))[:, [*range(prefix), *(prefix + i for i in kept)]]
        encoded = mae.decoder_embed(trunk.norm(trunk.blocks(trunk.norm_pre(tokens))))[0]
        sequence = list(encoded[:prefix])
        for place in range(rows * columns):
            token = encoded[prefix + kept.index(place)] if place in kept else mae.mask_token[0, 0]
            sequence.append(token + positions[place])
        x = torch.stack(sequence)[None]
        for block in mae.blocks:
            x = block(x)
        predicted = mae.predict(mae.norm(x))[0, prefix:]
        for place in hidden.nonzero()[:, 0].tolist():
            top, left = place // columns * height, place % columns * width
            target = image[:, top : top + height, left : left + width].permute(1, 2, 0).flatten()
            if mae.norm_pix:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            total = total + ((predicted[place] - target) ** 2).mean()
    return total


@pytest.mark.parametrize("ratio", [0.6, (0.2, 0.9)])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("vit", [{}, {"patch_size": (4, 16), "reg_tokens": 2}])
def test_loss_and_gradients_equal_a_decoder_written_out_sample_by_sample(
    ratio: float | Sequence[float], norm_pix: bool, vit: dict[str, Any]
) -> None:
    model = tiny.image_text(**vit).double()
    mae = tiny.randomize(MAE(model, mask_ratio=ratio, norm_pix=norm_pix, **DECODER)).double()
    batch = tiny.batch([3] * 5)
    ours, theirs = mae.loss(Encodings(model, batch)), loss_by_sample(model, mae, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    parameters = [*mae.parameters(), *model.image.trunk.blocks.parameters(), model.image.trunk.pos_embed]
    for mine, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.75, (0.3, 0.9)])
def test_what_hidden_patches_show_changes_the_target_and_not_the_prediction(ratio: float | Sequence[float]) -> None:
    model = tiny.image_text()
    mae = tiny.randomize(MAE(model, mask_ratio=ratio, norm_pix=False, **DECODER))
    batch, other = tiny.batch([3] * 4), tiny.batch([3] * 4)
    hidden = Encodings(model, batch).patch_mask("pairs", mae.mask(TrainingProgress())).hidden
    images = other.streams["pairs"].images
    assert images is not None
    images[hidden.reshape(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images)] = 255
    predictions: list[Tensor] = []
    mae.predict.register_forward_hook(lambda module, inputs, output: predictions.append(output))
    losses = [mae.loss(Encodings(model, each)) for each in (batch, other)]
    assert torch.equal(*predictions)
    assert losses[0] != losses[1]


def test_masks_belong_to_samples_and_not_to_their_batch() -> None:
    model = tiny.image_text()
    mae = MAE(model, mask_ratio=(0.2, 0.9), **DECODER)
    whole = tiny.batch([3] * 4)
    samples = whole.streams["pairs"]
    hidden = Encodings(model, whole).patch_mask("pairs", mae.mask(TrainingProgress())).hidden
    assert samples.images is not None
    third = [tensor[2:3] for tensor in (samples.positions, samples.ids, samples.seeds, samples.images)]
    alone = Batch({"pairs": type(samples)(*third)})
    assert torch.equal(Encodings(model, alone).patch_mask("pairs", mae.mask(TrainingProgress())).hidden, hidden[2:3])


def test_error_is_taken_in_float32_under_bf16() -> None:
    model = tiny.image_text()
    with torch.autocast("cpu", torch.bfloat16):
        loss = MAE(model, **DECODER).loss(Encodings(model, tiny.batch([3, 4])))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0, -0.1, (0.8, 0.2), (0.0, 0.5), (0.5, 1.0), (0.5,), (0.1, 0.2, 0.3)])
def test_bad_ratios_are_refused_in_one_line(ratio: float | Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"^objective.mae.mask_ratio is .*; expected (a number|\[smallest)"):
        MAE(tiny.image_text(), mask_ratio=ratio, **DECODER)


@pytest.mark.parametrize(("width", "heads"), [(18, 2), (16, 3)])
def test_decoder_widths_that_do_not_divide_are_refused_in_one_line(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=rf"decoder_width is {width}; expected a multiple of 4 and of .* = {heads}$"):
        MAE(tiny.image_text(), decoder_width=width, decoder_heads=heads)


@pytest.mark.parametrize("name", ["decoder_width", "decoder_heads"])
def test_a_decoder_of_nothing_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective\.mae\.{name} is 0; expected a number at least 1"):
        MAE(tiny.image_text(), **{**DECODER, name: 0})


def test_an_encoder_that_cannot_drop_patches_is_refused_in_one_line() -> None:
    model = ImageTextModel(TimmEncoder("test_resnet", 32), None)
    with pytest.raises(ValueError, match=r"^objective.mae needs a plain ViT of timm"):
        MAE(model)
