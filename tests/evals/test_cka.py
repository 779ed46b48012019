"""Similarity of layers: the formula in NumPy, the layers by hand, and models that differ in shape."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.cka import CKA, cka_matrix
from mmpretrain.evals.layer_states import image_layers, text_layers
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.layers import blocks_of
from mmpretrain.models.vit import TimmEncoder
from tests import tiny
from tests.evals.held_out import TOKENIZER, make_model, make_set
from tests.saved_runs import save_run


def by_kernels(x: Tensor, y: Tensor) -> float:
    """The Hilbert-Schmidt independence criterion of the kernels XX' and YY', normalised (equations 3 and 4)."""
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, l = (centring @ (z.double().numpy() @ z.double().numpy().T) @ centring for z in (x, y))
    return float(np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l)))


@pytest.mark.parametrize("n", [4, 50])  # fewer and more samples than features
def test_it_is_the_alignment_of_centred_kernels(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, width, generator=generator) + 3 for width in (5, 9)]
    ys = [xs[0][:, :3] + torch.randn(n, 3, generator=generator), torch.randn(n, 12, generator=generator)]
    expected = [[by_kernels(x, y) for y in ys] for x in xs]
    np.testing.assert_allclose(cka_matrix(xs, ys), expected, rtol=1e-6)


def test_it_does_not_see_rotations_scale_and_shift() -> None:
    x = torch.randn(30, 7, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    np.testing.assert_allclose(cka_matrix([x], [0.01 * x @ rotation + 5]), 1, rtol=1e-9)
    assert cka_matrix([x], [x @ torch.diag(torch.arange(1.0, 8.0).double() ** 3)])[0, 0] < 0.9


def test_a_constant_layer_is_similar_to_nothing() -> None:
    rounded = torch.full((40, 5), 0.1) * (1 + 1e-7 * torch.randn(40, 5))
    assert cka_matrix([rounded, torch.zeros(40, 2)], [torch.randn(40, 3), rounded]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_layer_of_a_diverged_model_has_no_similarity(value: float) -> None:
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    x[3, 2] = value
    found = cka_matrix([x, y], [y, torch.ones(40, 2)])
    assert np.isnan(found[0]).all() and found[1].tolist() == [pytest.approx(1), 0]


def test_image_layers_are_the_blocks_of_timm() -> None:
    model = make_model()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    trunk = cast(TimmEncoder, model.image).trunk
    blocks = trunk.forward_intermediates(
        model.normalize(images), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    found = image_layers(model, images)
    assert len(found) == 3
    for layer, (patches, prefix) in zip(found, blocks):
        torch.testing.assert_close(layer, torch.cat([prefix, patches], dim=1).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-1], model.encode_image(images).pooled, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_text_s_layers_do_not_depend_on_its_padding() -> None:
    model = make_model()
    ids, lengths = TOKENIZER(["a cat", "a much longer text of many words"])
    both = text_layers(model, ids, lengths)
    alone = text_layers(model, ids[:1, : lengths[0]], lengths[:1])
    assert len(both) == 3
    for of_both, of_one in zip(both, alone):
        torch.testing.assert_close(of_both[:1], of_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "blocks", "width"),
    [
        ("resnet18", {}, [f"trunk.layer{i}.{j}" for i in range(1, 5) for j in range(2)], 64),
        (
            "convnext_atto",
            {"depths": (1, 2, 1, 1), "dims": (8, 8, 8, 8)},
            ["0", "1.blocks.0", "1.blocks.1", "2", "3"],  # a stage of one block is that block
            8,
        ),
    ],
)
def test_the_blocks_of_convolutional_networks_are_found(
    name: str, args: dict[str, object], blocks: list[str], width: int
) -> None:
    encoder = TimmEncoder(name, 32, args)
    found = blocks_of(encoder, "model.image")
    assert [each.removeprefix("trunk.stages.") for each in found] == blocks
    model = ImageTextModel(encoder, None).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    outputs: list[Tensor] = []
    handle = next(iter(found.values())).register_forward_hook(lambda *call: outputs.append(call[2]))
    layers = image_layers(model, images)
    handle.remove()
    assert layers[0].shape == (2, width)
    torch.testing.assert_close(layers[0], outputs[0].mean((2, 3)))


def test_an_encoder_that_does_not_tell_its_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^model.image is a Linear, which does not tell its layers; expected a method"
    ):
        blocks_of(nn.Linear(2, 2), "model.image")


def compared(
    folder: Path, change: Callable[[Context], Context] = lambda context: context
) -> tuple[dict[str, float], Context]:
    save_run(folder / "run")
    loaded = load_checkpoint(folder / "run")
    context = change(Context(loaded.model, loaded.tokenizer, {"val": make_set(folder)}, None, batch_size=4, workers=0))
    return dict(evaluate({"cka": CKA(str(folder / "run"), max_samples=15)}, context)), context


def filled(value: float) -> Callable[[Context], Context]:
    """Replace the model by one whose parameters all have a value."""

    def change(context: Context) -> Context:
        model = make_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        return replace(context, model=model, tokenizer=TOKENIZER)

    return change


def test_a_model_is_like_itself(tmp_path: Path) -> None:
    scores, context = compared(tmp_path)
    assert scores.keys() == {f"eval-val/cka_{name}" for name in ("image", "image_final", "text", "text_final")}
    for score in scores.values():
        assert score == pytest.approx(1, abs=1e-6)
    assert context.shown.pictures.keys() == {"eval-val/cka_image", "eval-val/cka_text"}
    assert context.shown.pictures["eval-val/cka_image"].std() > 0


def test_models_of_other_shape_are_compared_by_their_own_preprocessing(tmp_path: Path) -> None:
    def change(context: Context) -> Context:
        torch.manual_seed(0)
        model = ImageTextModel(tiny.vit(image_size=64), None, embed_dim=12).eval()
        data = make_set(tmp_path)
        data = replace(data, preprocess=type(data.preprocess)(64))  # type: ignore[misc]
        return replace(context, model=model, sets={"val": data})

    scores, context = compared(tmp_path, change)
    assert scores.keys() == {"eval-val/cka_image_final"}, "it has two blocks and no text encoder, the other one has one"
    samples = context.embedded("val").samples
    rows = torch.linspace(0, len(samples) - 1, 15).round().long()
    small = make_set(tmp_path)
    assert small.preprocess is not None
    states = []
    for model, data in ((context.model, context.sets["val"]), (load_checkpoint(tmp_path / "run").model, small)):
        images = torch.stack([data.preprocess(data.shards.read(int(i), ("png",))) for i in samples[rows]])  # type: ignore[misc]
        states.append(model.encode_image(images).pooled)
    assert scores["eval-val/cka_image_final"] == pytest.approx(
        by_kernels(*(each.detach() for each in states)), rel=1e-4
    )


def test_a_collapsed_model_is_like_nothing(tmp_path: Path) -> None:
    assert set(compared(tmp_path, filled(0.0))[0].values()) == {0}


def test_a_diverged_model_has_no_similarity(tmp_path: Path) -> None:
    scores, context = compared(tmp_path, filled(np.nan))
    assert scores and all(np.isnan(score) for score in scores.values())
    assert context.shown.pictures.keys() == {"eval-val/cka_image", "eval-val/cka_text"}


def test_the_other_checkpoint_has_to_be_given_and_to_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^other is null; expected a checkpoint to compare with: eval.cka.other=RUN$"):
        CKA(None)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        CKA(str(tmp_path))
