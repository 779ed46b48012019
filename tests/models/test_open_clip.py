"""open_clip's models behind our interface: the same embeddings, masks, and what is refused."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from mmpretrain.exporters import open_clip as exporter
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import open_clip_model

# The towers' kinds at small sizes: what differs between the five is kept, depth and width are not.
SMALL_VIT = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
SMALL_TEXT = {"width": 48, "heads": 3, "layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"vision": SMALL_VIT, "text": SMALL_TEXT},
    "ViT-B-32-quickgelu": {"vision": SMALL_VIT, "text": SMALL_TEXT},
    "ViT-B-16-SigLIP": {
        "vision": {"timm_model_name": "test_vit3", "image_size": 160},
        "text": {**SMALL_TEXT, "vocab_size": 500},
    },
    "EVA02-B-16": {"vision": {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224}, "text": SMALL_TEXT},
    "convnext_base": {"vision": {"timm_model_name": "test_convnext", "image_size": 64}, "text": SMALL_TEXT},
    "RN50": {"vision": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, "text": SMALL_TEXT},
}


def reference(name: str, arguments: dict[str, Any]) -> Any:
    """open_clip's own model of the same shape, its weights random but none of them zero."""
    config = exporter.model_config(name, **arguments)
    towers = {"vision_cfg": config["vision_cfg"], "text_cfg": config["text_cfg"]}
    model = open_clip.create_model(name, pretrained_text=False, **towers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def texts(model: Any, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids sorted by length, with the largest id as the end token, and padding of the model's."""
    vocab_size = model.vocab_size if hasattr(model, "vocab_size") else model.text.vocab_size
    pad_id = getattr(getattr(model, "text", None), "pad_id", 0)
    context_length = model.context_length
    ids = torch.full((len(lengths), context_length), pad_id)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(2, vocab_size - 1, (length,))
        row[length - 1] = vocab_size - 1
    return ids, torch.tensor(lengths)


def ours_with_weights_of(theirs: Any, name: str, arguments: dict[str, Any]) -> ImageTextModel:
    model = open_clip_model(name, **arguments).eval()
    tensors = {key: tensor for key, tensor in theirs.state_dict().items() if not key.startswith("logit_")}
    model.load_state_dict(exporter.from_open_clip(model, tensors))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_open_clips(name: str) -> None:
    theirs = reference(name, MODELS[name])
    ours = ours_with_weights_of(theirs, name, MODELS[name])
    images = torch.randint(0, 256, (3, 3, ours.image.image_size, ours.image.image_size), dtype=torch.uint8)
    ids, lengths = texts(theirs, [4, 7, 12])
    with torch.no_grad():
        expected_image = theirs.encode_image(ours.normalize(images), normalize=True)
        expected_text = theirs.encode_text(ids, normalize=True)
        text = ours.project_text(ours.encode_text(ids[:, :16], lengths, (8, 16)).pooled)
    torch.testing.assert_close(ours.embed_images(images), expected_image, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, expected_text, rtol=0, atol=1e-5)
    assert ours.embed_dim == expected_image.shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_over_one_to_one_and_back(name: str, tmp_path: Path) -> None:
    theirs = reference(name, MODELS[name])
    ours = ours_with_weights_of(theirs, name, MODELS[name])
    tensors = exporter.to_open_clip(ours, logit_scale=20.0, logit_bias=-9.0 if "SigLIP" in name else None)
    expected = theirs.state_dict()
    assert set(tensors) == set(expected)
    for key, tensor in expected.items():
        if not key.startswith("logit_"):
            assert torch.equal(tensors[key], tensor), key
    assert tensors["logit_scale"].exp().item() == pytest.approx(20.0)

    node = {"_target_": "mmpretrain.models.open_clip.open_clip_model", "name": name, **MODELS[name]}
    scalars = {"logit_scale": 20.0} | ({"logit_bias": -9.0} if "SigLIP" in name else {})
    exporter.export(ours, node, scalars, tmp_path)
    loaded = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.rand(2, 3, ours.image.image_size, ours.image.image_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), theirs.encode_image(images), rtol=0, atol=0)


def test_a_full_size_model_by_name_is_open_clips() -> None:
    theirs = open_clip.create_model("ViT-B-32").eval()
    ours = ours_with_weights_of(theirs, "ViT-B-32", {})
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    ids = open_clip.get_tokenizer("ViT-B-32")(["a cat", "two dogs on a sofa"])
    with torch.no_grad():
        expected_image = theirs.encode_image(ours.normalize(images), normalize=True)
        expected_text = theirs.encode_text(ids, normalize=True)
    torch.testing.assert_close(ours.embed_images(images), expected_image, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_texts(ids, torch.tensor([4, 7])), expected_text, rtol=0, atol=1e-5)
