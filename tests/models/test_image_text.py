"""The joined model: its space, and the pixels that it sees."""

import gc
import weakref

import pytest
import torch

from mmpretrain.models.image_text import CLIP_MEAN, CLIP_STD, ImageTextModel
from tests import tiny


def test_normalisation_is_that_of_open_clip() -> None:
    model = tiny.image_text().double()
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(model.normalize(images)[:, channel], expected, rtol=1e-6, atol=1e-6)


def test_embeddings_have_unit_length_in_float32_under_bf16() -> None:
    model = tiny.image_text()
    samples = tiny.batch([3, 8, 9]).streams["pairs"]
    assert samples.images is not None and samples.text is not None and samples.lengths is not None
    with torch.autocast("cpu", torch.bfloat16):
        image = model.project_image(model.encode_image(samples.images).pooled)
        text = model.project_text(model.encode_text(samples.text, samples.lengths, samples.packing).pooled)
    for rows in (image, text):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)


def test_a_model_without_a_text_encoder_encodes_images_and_refuses_texts() -> None:
    model = ImageTextModel(tiny.vit(), None, embed_dim=12)
    assert model.project_image(model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).pooled).shape == (2, 12)
    with pytest.raises(ValueError, match=r"no text encoder \(model.text is null\)"):
        model.encode_text(torch.ones(1, 3, dtype=torch.int64), torch.tensor([3]))


def test_an_encoding_is_freed_with_its_last_reference() -> None:
    """A cycle would keep a micro-batch's activations until the garbage collector runs."""
    model, samples = tiny.image_text(), tiny.batch([4, 8]).streams["pairs"]
    words = samples.text, samples.lengths, samples.packing
    gc.disable()
    try:
        for encoding in [model.encode_image(samples.images)], [model.encode_text(*words)]:
            held = [weakref.ref(encoding[0].pooled), weakref.ref(encoding[0].tokens)]
            encoding.clear()
            assert [each() for each in held] == [None, None]
    finally:
        gc.enable()
