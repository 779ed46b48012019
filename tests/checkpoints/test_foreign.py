"""Models of open_clip and timm as checkpoints: the embeddings of their own code, and files that do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmpretrain.checkpoints.load import load_checkpoint
from tests import runs
from tests.data.test_preprocess import photograph

VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
IMAGES = [photograph(61, 47), photograph(40, 90)]
TEXTS = ["a photo of a cat", "two dogs"]


def write_open_clip(folder: Path, preprocess: dict[str, Any]) -> open_clip.CLIP:
    """A small model of open_clip in a folder, as its own `local-dir:` schema reads it."""
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    assert isinstance(model, open_clip.CLIP)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    return model


@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    ],
)
def test_a_folder_of_open_clip_gives_open_clips_embeddings(preprocess: dict[str, Any], tmp_path: Path) -> None:
    write_open_clip(tmp_path / "clip", preprocess)
    name = f"local-dir:{tmp_path / 'clip'}"
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    ours = load_checkpoint(f"open_clip:{name}")
    assert ours.preprocess is not None
    with torch.no_grad():
        theirs.eval()
        pixels = torch.stack([transform(image) for image in IMAGES])  # type: ignore[operator]
        images = F.normalize(theirs.encode_image(pixels), dim=-1)
        texts = F.normalize(theirs.encode_text(tokenizer(TEXTS)), dim=-1)
    found = ours.model.embed_images(torch.stack([ours.preprocess(image) for image in IMAGES]))
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.model.embed_texts(*ours.tokenizer(TEXTS)), texts, atol=1e-5, rtol=0)
    assert ours.scalars["logit_scale"] == pytest.approx(np.exp(3.0))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
@pytest.mark.parametrize("form", ["state_dict", "model", "safetensors"])
def test_a_file_of_timm_gives_timms_features(name: str, form: str, tmp_path: Path) -> None:
    theirs = timm.create_model(name).eval()
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(theirs.state_dict(), file)
    else:
        torch.save({form: theirs.state_dict()}, file)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    ours = load_checkpoint(f"timm:{name}@{file}")
    assert ours.preprocess is not None and ours.model.text is None
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in IMAGES])  # type: ignore[operator]
        expected = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        found = ours.model.encode_image(torch.stack([ours.preprocess(image) for image in IMAGES])).pooled
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_model_of_open_clip_by_its_name_takes_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = open_clip.create_model("RN50", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert "initialized randomly" in caplog.text
    caplog.clear()
    ours = load_checkpoint(f"open_clip:RN50@{tmp_path / 'w.pt'}")
    assert "initialized randomly" not in caplog.text
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        theirs = model.eval().encode_image(ours.model.normalize(pixels), normalize=True)  # type: ignore[operator]
    torch.testing.assert_close(ours.model.embed_images(pixels), theirs, atol=1e-5, rtol=0)


def test_the_fingerprint_is_that_of_weights_and_pixels(tmp_path: Path) -> None:
    write_open_clip(tmp_path / "clip", {})
    name = f"open_clip:local-dir:{tmp_path / 'clip'}"
    first, second = load_checkpoint(name), load_checkpoint(name)
    assert first.fingerprint == second.fingerprint
    other = replace(first, config={**first.config, "model": {"name": "of another activation"}})
    assert first.fingerprint != other.fingerprint
    other = load_checkpoint(name)
    other.model.pixel_mean += 0.1
    assert first.fingerprint != other.fingerprint
    with torch.no_grad():
        next(second.model.parameters()).flatten()[0] += 1
    assert first.fingerprint != second.fingerprint


class Pickled:
    def __reduce__(self) -> Any:
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("open_clip:ViT-B-32@nowhere.pt", "there is no file nowhere.pt"),
        ("open_clip:ViT-B-33@w.pth", "model.name is 'ViT-B-33'; expected a model of open_clip, such as"),
        ("open_clip:RN50", "no weights are named; expected open_clip:RN50@<file> or open_clip:RN50/<tag>"),
        ("open_clip:RN50/nothing", "open_clip does not know it; RN50 has the tags openai"),
        ("open_clip:local-dir:{folder}", "open_clip_config.json"),
        ("timm:resnet19@w.pth", "model.name is 'resnet19'; expected a model of timm, such as resnet"),
        (
            "timm:vit_tiny_patch16_224@w.pth",
            "w.pth does not fit the model: .* are missing, such as image.trunk.cls_token",
        ),
        ("timm:resnet18@cut.pth", "its weights cannot be read"),
        ("timm:resnet18@pickled.pth", "its weights cannot be read"),
        ("timm:resnet18@text.safetensors", "its weights cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_executed(
    checkpoint: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("resnet18").state_dict(), "w.pth")
    Path("cut.pth").write_bytes(Path("w.pth").read_bytes()[:100_000])
    Path("text.safetensors").write_text("no tensors")
    torch.save({"a": Pickled()}, "pickled.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(checkpoint.format(folder=tmp_path))
    assert "\n" not in str(error.value) and str(error.value).startswith("checkpoint=")
    assert not Path("executed").exists()


def test_a_foreign_model_has_no_average(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no averaged weights; leave out ema"):
        load_checkpoint("timm:resnet18", ema=True)


@pytest.mark.slow
def test_the_commands_evaluate_and_embed_a_foreign_model(pairs: Path, tmp_path: Path) -> None:
    write_open_clip(tmp_path / "clip", {})
    settings = ("checkpoint=open_clip:local-dir:clip", "device=cpu")
    data = (f"data.root={pairs}", "+data.val.mine.shards=val", "+data.val.mine.caption=txt", "data.workers=0")
    found = runs.run("mmpretrain.evaluate", [*settings, *data, "eval=[retrieval]", "output=scores.json"], tmp_path)
    assert found.code == 0, found.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0 <= scores["eval-mine/image_retrieval_recall@1"] <= 1
    assert set(scores["intervals"]["eval-mine/image_retrieval_recall@1"]) == {"sample"}
    (tmp_path / "images").mkdir()
    IMAGES[0].save(tmp_path / "images" / "a.png")
    found = runs.run("mmpretrain.embed", [*settings, "images=images", "output=out", "workers=0"], tmp_path)
    assert found.code == 0, found.stderr
    assert np.load(tmp_path / "out" / "images.npy").shape == (1, 24)
