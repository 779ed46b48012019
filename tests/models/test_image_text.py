"""The joined model: its space, and the pixels that it sees."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

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


IMAGES, IDS, LENGTHS = (
    torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    torch.ones(2, 3, dtype=torch.int64),
    torch.tensor([3, 2]),
)


def test_a_model_without_a_text_encoder_encodes_images_and_refuses_texts() -> None:
    model = ImageTextModel(tiny.vit(), None, embed_dim=12)
    assert model.project_image(model.encode_image(IMAGES).pooled).shape == (2, 12)
    for refused in (lambda: model.encode_text(IDS, LENGTHS), lambda: model.text_encoder):
        with pytest.raises(ValueError, match=r"no text encoder \(model.text is null\)"):
            refused()


def test_a_model_without_an_image_encoder_encodes_texts_and_refuses_images() -> None:
    model = ImageTextModel(None, tiny.text(), embed_dim=12)
    assert model.image is None and not model.has_batch_norm
    assert model.project_text(model.encode_text(IDS, LENGTHS).pooled).shape == (2, 12)
    assert not any(name.startswith("image") for name in model.state_dict())
    for refused in (lambda: model.encode_image(IMAGES), lambda: model.image_encoder):
        with pytest.raises(ValueError, match=r"no image encoder \(model.image is null\)"):
            refused()


@torch.no_grad()
def test_embeddings_of_one_encoder_are_its_pooled_states_and_those_of_two_share_a_space() -> None:
    """No objective trains the projection of an encoder that is alone."""
    vit, text = tiny.vit(), tiny.text()
    both, images, texts = (ImageTextModel(*towers, embed_dim=12) for towers in ((vit, text), (vit, None), (None, text)))
    assert torch.equal(both.embed_images(IMAGES), both.project_image(both.encode_image(IMAGES).pooled))
    assert torch.equal(both.embed_texts(IDS, LENGTHS), both.project_text(both.encode_text(IDS, LENGTHS).pooled))
    assert (both.image_embed_dim, both.text_embed_dim) == (12, 12)
    assert torch.equal(images.embed_images(IMAGES), F.normalize(images.encode_image(IMAGES).pooled, dim=-1))
    assert torch.equal(texts.embed_texts(IDS, LENGTHS), F.normalize(texts.encode_text(IDS, LENGTHS).pooled, dim=-1))
    assert (images.image_embed_dim, images.text_embed_dim) == (tiny.WIDTH, 0)
    assert (texts.image_embed_dim, texts.text_embed_dim) == (0, tiny.WIDTH)


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
