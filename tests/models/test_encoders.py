"""Encoders of one's own: defaults of what they leave out, and errors for what is missing or misspelt."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpretrain.models.encoding import Encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.training.probe import reached_parameters
from mmpretrain.training.task import Task
from tests import tiny


class Image(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 8), nn.BatchNorm2d(6))
        for name, value in {"image_size": 8, "width": 6, **attributes}.items():
            if value is not None:
                setattr(self, name, value)

    def forward(self, images: Tensor, mask: Any = None) -> Encoding:
        tokens = self.layers(images).flatten(2).transpose(1, 2)
        return Encoding(lambda: tokens, lambda _: tokens.mean(1))


class Projects(Image):
    def project(self, pooled: Tensor) -> Tensor:
        return pooled


class NoMask(Image):
    def forward(self, images: Tensor) -> Encoding:  # type: ignore[override]
        return super().forward(images)


class Plain(Image):
    def forward(self, images: Tensor, mask: Any = None) -> Any:
        return super().forward(images).pooled


class Text(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        own = {"vocab_size": 9, "context_length": 8, "width": 6, "causal": False, "token_embeddings": torch.zeros(9, 6)}
        for name, value in {**own, **attributes}.items():
            if value is not None:
                setattr(self, name, value)


def test_what_an_encoder_leaves_out_has_defaults() -> None:
    image, text = Image(), Text()
    model = ImageTextModel(image, text, embed_dim=4).eval()
    assert (model.image.projects, model.image.is_vit, model.image.has_batch_norm) == (False, False, True)
    assert (model.text.projects, model.text.pad_id, model.text.end_id, model.text.adopts_padding) == (
        False,
        None,
        None,
        False,
    )
    assert model.embed_images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 4)
    assert not ImageTextModel(Image(has_batch_norm=False), None).image.has_batch_norm


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (Image(width=None), None, r"^model\.image: Image has no attribute width; expected the width of .*ModuleEncoder"),
        (Image(width=None, widht=6), None, r"^model\.image: Image\.widht is no attribute .*; did you mean width\?"),
        (Image(has_batchnorm=True), None, r"Image\.has_batchnorm is no attribute .*; did you mean has_batch_norm\?"),
        (Image(is_vit=True), None, r"Image has no attribute num_prefix_tokens; expected the number of class and register"),
        (Projects(), None, r"Projects has a method project, which is never called; set Projects\.projects = True"),
        (nn.Linear(2, 2), None, r"^model\.image: Linear has no attribute image_size"),
        (Image(image_size="8"), None, r"^model\.image: Image\.image_size is '8'; expected a whole number"),
        (NoMask(), None, r"^model\.image: NoMask\.forward\(images: .* expected forward\(images, mask=None\)"),
        (dict, None, r"^model\.image is a type; expected a torch\.nn\.Module"),
        (tiny.vit(), Text(causal=None, is_causal=True), r"^model\.text: Text\.is_causal .* did you mean causal\?"),
        (tiny.vit(), Text(token_embeddings=None), r"^model\.text: Text has no attribute token_embeddings"),
    ],
)  # fmt: skip
def test_what_is_missing_or_misspelt_is_told(image: Any, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTextModel(image, text, embed_dim=4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Plain(image_size=tiny.IMAGE_SIZE),
            r"^model\.image: forward returned a Tensor; expected .*Encoding, or a module that",
        ),
        (
            Image(image_size=tiny.IMAGE_SIZE, width=7),
            r"^model\.image: pooled states of 2 samples are \[2, 6\]; expected \[2, 7\], as width says$",
        ),
    ],
)
def test_outputs_that_are_no_encoding_are_refused(image: nn.Module, message: str) -> None:
    model = ImageTextModel(image, tiny.text(), embed_dim=4)
    with pytest.raises(ValueError, match=message):
        reached_parameters(Task(model, {"infonce": InfoNCE(model)}), tiny.batch([5, 7]))
