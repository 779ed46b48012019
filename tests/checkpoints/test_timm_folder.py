"""Export to timm: loaded there, the image tower gives the same pooled states and the same preprocessing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from mmpretrain.checkpoints.timm_folder import export
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.models.timm_model import timm_model
from mmpretrain.models.vit import TimmEncoder
from tests import exports, tiny

SMALL_TEXT = {"width": 48, "heads": 3, "layers": 1, "context_length": 12}
MODELS: dict[str, Callable[[], ImageTextModel]] = {
    "two towers": lambda: ImageTextModel(exports.clip_vit(), exports.clip_text(), 12),
    "mean pooling": lambda: ImageTextModel(tiny.vit(global_pool="avg", class_token=False), None, squash=True),
    "mae": lambda: ImageTextModel(TimmEncoder("test_vit", 32, {"patch_size": 8}, init="mae"), None, crop_pct=0.9),
    "convolutions": lambda: timm_model("test_convnext.r160_in1k", 64),
    "open_clip's": lambda: open_clip_model(
        "convnext_base", vision={"timm_model_name": "test_convnext", "image_size": 64}, text=SMALL_TEXT
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_and_pixels_are_ours(name: str, tmp_path: Path) -> None:
    loaded = exports.loaded(MODELS[name]())
    export(loaded, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = exports.pixels(loaded)
    with torch.no_grad():
        pooled = loaded.model.image_encoder(pixels).pooled
        torch.testing.assert_close(theirs(pixels), pooled, rtol=0, atol=1e-5)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    torch.testing.assert_close(transform(exports.photograph())[None], pixels, rtol=0, atol=1e-5)


def test_the_weights_alone_fit_timms_model(tmp_path: Path) -> None:
    loaded = exports.loaded(ImageTextModel(TimmEncoder("test_vit", 160), None))
    export(loaded, tmp_path)
    theirs = timm.create_model("test_vit", num_classes=0, checkpoint_path=tmp_path / "model.safetensors").eval()
    pixels = exports.pixels(loaded)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels), loaded.model.image_encoder(pixels).pooled, rtol=0, atol=1e-5)


def test_other_towers_are_refused(tmp_path: Path) -> None:
    vision = {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8}
    own = exports.loaded(open_clip_model("ViT-B-32", vision=vision, text=SMALL_TEXT))
    with pytest.raises(ValueError, match=r"^model\.image is a OpenClipVision; expected a model of timm"):
        export(own, tmp_path)
    with pytest.raises(ValueError, match=r"^model\.image is null; expected a model of timm"):
        export(exports.loaded(ImageTextModel(None, exports.clip_text(), 12)), tmp_path)
    changed = exports.loaded(ImageTextModel(exports.clip_vit(), None, 12))
    changed.model.image.args["depth"] = 3
    with pytest.raises(
        ValueError, match=r"^model\.image cannot be built by timm from its name vit_base_patch16_clip_224"
    ):
        export(changed, tmp_path)
