"""Layers of the towers, which layer-wise learning rates and Muon ask for."""

import pytest
from torch import nn

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.layers import layers_above
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.models.vit import TimmEncoder
from tests import tiny


def by_layer(model: ImageTextModel, tower: str) -> dict[int, set[str]]:
    """Names in the tower of the parameters below each number of layers."""
    found: dict[int, set[str]] = {}
    for name, number in layers_above(model, tower).items():
        found.setdefault(number, set()).add(name.removeprefix(f"model.{tower}."))
    assert set(layers_above(model, tower)) == {
        f"model.{tower}.{name}" for name, _ in getattr(model, tower).named_parameters()
    }
    return found


def test_layers_of_our_text_tower_and_of_open_clips() -> None:
    ours = by_layer(tiny.image_text(), "text")
    assert sorted(ours) == [1, 2, 3]
    assert ours[3] == {"token_embedding.weight", "positional_embedding"}
    assert all(name.startswith("transformer.resblocks.0.") for name in ours[2])
    assert {"ln_final.weight", "transformer.resblocks.1.ln_1.weight"} < ours[1]
    small = {"width": 32, "layers": 2}
    model = open_clip_model("ViT-B-32", vision={**small, "head_width": 16}, text={**small, "heads": 2})
    image, text = by_layer(model, "image"), by_layer(model, "text")
    assert sorted(image) == sorted(text) == [0, 1, 2, 3]
    assert image[0] == {"visual.proj"} and text[0] == {"text.text_projection"}
    assert {"visual.conv1.weight", "visual.class_embedding", "visual.ln_pre.bias"} < image[3]
    assert all(name.startswith("visual.transformer.resblocks.0.") for name in image[2])
    assert {"visual.ln_post.weight", "visual.transformer.resblocks.1.mlp.c_fc.weight"} < image[1]


@pytest.mark.parametrize(
    ("name", "head", "stem"), [("resnet18", 0, "trunk.conv1.weight"), ("convnext_atto", 2, "trunk.stem.0.weight")]
)
def test_layers_of_a_convolutional_tower_are_timms(name: str, head: int, stem: str) -> None:
    above = TimmEncoder(name, 32).layers_above()
    assert sum(number == 0 for number in above.values()) == head  # the norm of the head
    assert above[stem] == max(above.values()) > 5


def test_an_encoder_that_leaves_out_a_parameter_is_told() -> None:
    class Half(nn.Linear):
        def layers_above(self) -> dict[str, int]:
            return {"weight": 0}

    model = tiny.image_text()
    model.image = Half(2, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Half.layers_above\(\) leaves out bias; expected every parameter"):
        layers_above(model, "image")
