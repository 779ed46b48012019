"""Any module as an image encoder: outputs of every form, and what is refused."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import PatchMask
from mmpretrain.models.module_encoder import ModuleEncoder


class Returns(nn.Module):
    """A convolution whose map [b, 6, 4, 4] a function turns into the output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.layers = nn.Conv2d(3, 6, 8, stride=8)
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output(self.layers(images))


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("output", "arguments", "tokens", "pooled"),
    [
        (lambda x: x.mean((2, 3)), {}, lambda x: x.mean((2, 3))[:, None], lambda x: x.mean((2, 3))),
        (lambda x: x, {}, tokens_of, lambda x: x.mean((2, 3))),
        (tokens_of, {}, tokens_of, lambda x: x.mean((2, 3))),
        (tokens_of, {"pool": "first"}, tokens_of, lambda x: x[:, :, 0, 0]),
        (lambda x: {"out": x, "aux": x[:0]}, {"output": "out"}, tokens_of, lambda x: x.mean((2, 3))),
        (
            lambda x: SimpleNamespace(last_hidden_state=tokens_of(x), pooler_output=x[:, :4, :1, :1]),
            {},
            tokens_of,
            lambda x: x[:, :4, 0, 0],
        ),
        (
            lambda x: SimpleNamespace(last_hidden_state=tokens_of(x), pooler_output=x[:, :4, 0, 0]),
            {"pool": "mean"},
            tokens_of,
            lambda x: x.mean((2, 3)),
        ),
    ],
)
def test_outputs_are_read_by_their_form(output: Any, arguments: dict[str, Any], tokens: Any, pooled: Any) -> None:
    module = Returns(output)
    encoder = ModuleEncoder(module, 32, **arguments)
    images = torch.randn(2, 3, 32, 32)
    encoding, map_ = encoder(images), module.layers(images)
    assert torch.equal(encoding.tokens, tokens(map_))
    torch.testing.assert_close(encoding.pooled, pooled(map_))
    assert encoder.width == encoding.pooled.shape[1]


def test_a_network_of_torchvision_without_its_classifier() -> None:
    network = torchvision.models.resnet18()
    network.bn1.eval()  # frozen by its owner
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.get_rng_state()
    encoder = ModuleEncoder(network, image_size=32, remove=["fc"])
    assert torch.equal(torch.get_rng_state(), generator)
    assert (encoder.width, encoder.has_batch_norm, encoder.is_vit) == (512, True, False)
    assert encoder.module.layer1.training and not encoder.module.bn1.training
    for name, tensor in encoder.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model = ImageTextModel(encoder, None, embed_dim=8).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    reference = torchvision.models.resnet18().eval()
    reference.load_state_dict(before)
    reference.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images).pooled, reference(model.normalize(images)))


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        (lambda x: (x, x), {}, r"returned a tuple; expected a floating-point tensor \[b, d\], .*model\.image\.output="),
        (lambda x: x.sum(), {}, r"returned a tensor \[\] of torch\.float32; expected a floating-point"),
        (lambda x: x.long(), {}, r"of torch\.int64; expected a floating-point tensor"),
        (lambda x: {"out": x}, {"output": "features"}, r"returned a dict for model\.image\.output=features; expected"),
        (lambda x: x, {"pool": "first"}, r"pool is first for a feature map \[1, 6, 4, 4\]; expected mean"),
        (lambda x: x, {"channels": 4}, r"cannot encode images \[1, 4, 32, 32\] \(.*channels"),
        (lambda x: x, {"image_size": 4}, r"cannot encode images \[1, 3, 4, 4\] "),
        (lambda x: x, {"image_size": 5000}, "image_size is 5000; expected a number at least 1 and at most 4096"),
        (lambda x: x, {"remove": ["head"]}, "remove has 'head'; expected submodules of the module, such as layers"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(output: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ModuleEncoder(Returns(output), **{"image_size": 32, **arguments})
    assert "\n" not in str(error.value)


def test_a_module_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters of torch\.bfloat16; expected torch\.float32, .*\.float\(\)"):
        ModuleEncoder(Returns(tokens_of).bfloat16(), image_size=32)


def test_a_mask_is_refused() -> None:
    encoder = ModuleEncoder(Returns(tokens_of), 32)
    mask = PatchMask(torch.zeros(1, 2, dtype=torch.int64), None, torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="Returns cannot drop patches; expected a plain ViT of timm"):
        encoder(torch.zeros(1, 3, 32, 32), mask)
    with pytest.raises(ValueError, match=r"model\.image\.module is a function; expected a torch\.nn\.Module"):
        ModuleEncoder(tokens_of)


def test_layers_are_the_modules_own_or_follow_from_its_blocks_names() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed, self.norm = nn.Conv2d(3, 4, 4), nn.LayerNorm(4)
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, images: Tensor) -> Tensor:
            states = self.patch_embed(images).flatten(2).transpose(1, 2)
            for block in self.blocks:
                states = block(states)
            return cast(Tensor, self.norm(states))

    class Own(Blocks):
        def layers_above(self) -> dict[str, int]:
            return {name: 7 for name, _ in self.named_parameters()}

    above = ModuleEncoder(Blocks(), 8).layers_above()
    assert above["module.patch_embed.weight"] == 3 and above["module.norm.weight"] == 1
    assert (above["module.blocks.0.weight"], above["module.blocks.1.bias"]) == (2, 1)
    assert set(ModuleEncoder(Own(), 8).layers_above().values()) == {7}
    with pytest.raises(ValueError, match="Conv2d has no blocks named layers, layer, blocks or h"):
        ModuleEncoder(nn.Conv2d(3, 4, 4), 8).layers_above()
