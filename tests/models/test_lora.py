"""LoRA: adapters against equation 3, merging against peft's own, and what a run makes of them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmpretrain.errors import UsageError
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import add_adapters, has_adapters, merge_adapters, plain_name
from tests import tiny

pytest.importorskip("peft")


def adapted(**arguments: Any) -> tuple[ImageTextModel, ImageTextModel]:
    """A model, and a copy with adapters that are not zero."""
    plain = tiny.image_text(**arguments).double()
    model = copy.deepcopy(plain)
    add_adapters(model, rank=3, alpha=6.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if has_adapters([name]):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return plain, model.double().eval()


def embeddings(model: ImageTextModel) -> tuple[Tensor, Tensor]:
    batch = tiny.batch([4, 7])
    text, lengths = batch.texts("pairs")
    return model.embed_images(batch.images("pairs")), model.embed_texts(text, lengths)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_merged_weights_give_the_same_embeddings(pool: str) -> None:
    """The class token alone is computed otherwise in the last block, which must see the adapters, too."""
    plain, model = adapted(global_pool=pool, fc_norm=False)
    assert not torch.allclose(embeddings(model)[0], embeddings(plain)[0], atol=1e-3)
    plain.load_state_dict(merge_adapters(model.state_dict(), alpha=6.0))
    for ours, theirs in zip(embeddings(plain), embeddings(model), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_merging_is_pefts() -> None:
    _, model = adapted()
    merged = merge_adapters(model.state_dict(), alpha=6.0)
    for name, module in list(model.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            assert torch.allclose(merged[f"{name}.weight"], module.base_layer.weight, atol=1e-14), name


def test_adapters_begin_with_zero_and_leave_the_base_alone() -> None:
    plain = tiny.image_text().double()
    model = copy.deepcopy(plain)
    add_adapters(model, rank=2, alpha=4.0, targets=["image.*.mlp.*"])
    for ours, theirs in zip(embeddings(model), embeddings(plain), strict=True):
        assert torch.equal(ours, theirs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_encoders = {name for name in trained if name.startswith("image.")}
    assert of_encoders and all(".mlp." in name and has_adapters([name]) for name in of_encoders)
    assert "image_projection.weight" in trained
    assert not any(name.startswith("text.") for name in trained), "its layers match no target"
    assert {plain_name(name) for name in model.state_dict() if not has_adapters([name])} == set(plain.state_dict())


def test_a_target_is_a_whole_name() -> None:
    model = tiny.image_text()
    assert model.image is not None
    model.image.proj = nn.Linear(4, 4)  # type: ignore[assignment]  # other layers' names end alike
    add_adapters(model, rank=2, alpha=4.0, targets=["image.proj"])
    adapters = [name for name in model.state_dict() if has_adapters([name])]
    assert adapters and all(name.startswith("image.proj.") for name in adapters)


def test_layers_whose_weights_others_read_get_none() -> None:
    model = tiny.image_text()
    assert model.text is not None
    model.text.extra = nn.MultiheadAttention(4, 2)  # type: ignore[attr-defined]
    add_adapters(model, rank=2, alpha=4.0)
    assert not any("extra" in name for name in model.state_dict() if has_adapters([name]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"trainer\.lora\.rank is 0"),
        ({"alpha": 0.0}, r"trainer\.lora\.alpha is 0\.0"),
        ({"targets": ["image.*.nothing"]}, r"trainer\.lora\.targets is \['image\.\*\.nothing'\]; expected patterns"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        add_adapters(tiny.image_text(), **{"rank": 2, "alpha": 4.0, **arguments})


def test_half_an_adapter_is_refused() -> None:
    _, model = adapted()
    tensors = dict(model.state_dict())
    del tensors[next(name for name in tensors if ".lora_B." in name)]
    with pytest.raises(ValueError, match=r"the adapter of .* does not fit its layer"):
        merge_adapters(tensors, alpha=6.0)
