"""open_clip's models behind our interface: the same embeddings, masks, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

import mmpretrain
from mmpretrain.checkpoints import open_clip as exporter
from mmpretrain.data.packing import packed
from mmpretrain.models.image_text import CLIP_MEAN, CLIP_STD, ImageTextModel
from mmpretrain.models.masking import PatchMask
from mmpretrain.models.open_clip import OpenClipText, OpenClipVision, open_clip_model
from tests import exports, runs
from tests.tokenizers import hugging_face_tokenizer

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


def texts(model: Any, lengths: list[int], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids sorted by length, with the largest id as the end token, and padding."""
    vocab_size = model.vocab_size if hasattr(model, "vocab_size") else model.text.vocab_size
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
    assert_same_embeddings(ours, theirs)
    ids, lengths = texts(theirs, [4, 7, 12])
    with torch.no_grad():
        text = ours.project_text(ours.encode_text(ids[:, :16], lengths, packed(lengths, 16)).pooled)
        torch.testing.assert_close(text, theirs.encode_text(ids, normalize=True), rtol=0, atol=1e-5)


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
    exporter.export(exports.unchanged(ours, scalars, node), tmp_path)
    loaded = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images = torch.rand(2, 3, ours.image.image_size, ours.image.image_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), theirs.encode_image(images), rtol=0, atol=0)


FULL_SIZE = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "vit_medium_patch16_gap_256", "convnext_base"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_model_is_open_clips_before_and_after_training(name: str, pairs: Path, tmp_path: Path) -> None:
    theirs = open_clip.create_model(name, pretrained_text=False).eval()
    file = tmp_path / "theirs.pt"
    torch.save(theirs.state_dict(), file)
    is_siglip = "SigLIP" in name
    overrides = [
        "model=open_clip", f"model.name={name}", f"init_from={file}", f"data.root={pairs}", "run.dir=run", "eval=[]",
        f"objective=[{'sigmoid' if is_siglip else 'infonce'}]", "trainer.batch_size=2", "trainer.duration=1steps",
        "trainer.precision=fp32", "trainer.device=cpu", "data.workers=0", "optimizer=torch", "optimizer.name=SGD",
    ]  # fmt: skip
    if is_siglip:
        tokenizer = hugging_face_tokenizer(tmp_path / "tokenizer")
        overrides.append(f"data.tokenizer.path={tokenizer}")
    finished = runs.run("mmpretrain.train", [*overrides, "optimizer.lr=0"], tmp_path)
    assert finished.code == 0, finished.stderr
    untrained, _, _ = mmpretrain.load(tmp_path / "run")
    assert not is_siglip or untrained.text.pad_id == 1, "the tokenizer's"
    assert_same_embeddings(untrained, theirs)
    back = exporter.to_open_clip(untrained, logit_scale=1.0, logit_bias=0.0 if is_siglip else None)
    expected = theirs.state_dict()
    assert set(back) == set(expected)
    assert all(torch.equal(back[key], expected[key]) for key in expected if not key.startswith("logit_"))

    shutil.rmtree(tmp_path / "run")
    assert runs.run("mmpretrain.train", [*overrides, "optimizer.lr=0.1"], tmp_path).code == 0
    arguments = [f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"]
    assert runs.run("mmpretrain.export", arguments, tmp_path).code == 0
    trained, _, _ = mmpretrain.load(tmp_path / "run")
    file = tmp_path / "out" / "open_clip_model.safetensors"
    assert_same_embeddings(trained, open_clip.create_model(name, pretrained=str(file)).eval())
    weights, before = trained.state_dict(), untrained.state_dict()
    assert any(not torch.equal(weights[key], before[key]) for key in weights), "the training moved nothing"
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep


def assert_same_embeddings(ours: ImageTextModel, theirs: Any) -> None:
    """Of random images and texts, to 1e-5."""
    images = torch.randint(0, 256, (2, 3, ours.image.image_size, ours.image.image_size), dtype=torch.uint8)
    assert ours.text is not None
    ids, lengths = texts(theirs, [4, 12], ours.text.pad_id or 0)
    with torch.no_grad():
        expected_image = theirs.encode_image(ours.normalize(images), normalize=True)
        expected_text = theirs.encode_text(ids, normalize=True)
        text = ours.embed_texts(ids[:, :16], lengths)
    torch.testing.assert_close(ours.embed_images(images), expected_image, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, expected_text, rtol=0, atol=1e-5)


def hugging_face_folder(folder: Path) -> Path:
    """A small BERT's configuration and weights, made on the spot."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=100, max_position_embeddings=24, **shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_last_hidden_state_pooler"])
def test_a_text_tower_of_hugging_face(pooler: str, tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    text = {"hf_model_name": str(folder), "hf_pooler_type": pooler, "hf_proj_type": "linear", "context_length": 24}
    arguments = {"vision": SMALL_VIT, "text": text}
    config = exporter.model_config("ViT-B-32", **arguments)
    towers = {"vision_cfg": config["vision_cfg"], "text_cfg": config["text_cfg"]}
    theirs = open_clip.create_model("ViT-B-32", pretrained_text=False, force_custom_text=True, **towers).eval()
    ours = ours_with_weights_of(theirs, "ViT-B-32", arguments)
    lengths = torch.tensor([3, 9, 14])
    ids = torch.randint(1, 100, (3, 24)) * (torch.arange(24) < lengths[:, None])  # BERT's padding is 0
    with torch.no_grad():
        expected = theirs.encode_text(ids, normalize=True)
        text_rows = ours.project_text(ours.encode_text(ids[:, :16], lengths, packed(lengths, 16)).pooled)
    torch.testing.assert_close(text_rows, expected, rtol=0, atol=1e-5)
    exported = exporter.to_open_clip(ours)
    assert set(exported) == set(theirs.state_dict())


def random_mask(b: int, num_patches: int, num_keep: int) -> PatchMask:
    order = torch.stack([torch.randperm(num_patches) for _ in range(b)])
    return PatchMask(order[:, :num_keep], None, order.argsort(1) >= num_keep)


def test_kept_patches_are_encoded_as_if_there_were_no_others() -> None:
    model = open_clip_model("ViT-B-32", vision=SMALL_VIT, text=SMALL_TEXT).eval().double()
    encoder = model.image
    assert isinstance(encoder, OpenClipVision) and encoder.num_patches == 16
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    everything = PatchMask(torch.arange(16).expand(2, 16), None, torch.zeros(2, 16, dtype=torch.bool))
    torch.testing.assert_close(encoder(images, everything).pooled, encoder(images).pooled)
    mask = random_mask(2, 16, 5)
    changed = images.clone()
    hidden = mask.hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed[hidden.expand_as(changed)] += 1.0
    torch.testing.assert_close(encoder(changed, mask).tokens, encoder(images, mask).tokens, rtol=0, atol=0)
    assert not torch.equal(encoder(changed).pooled, encoder(images).pooled)


def test_ragged_masks_never_see_filler() -> None:
    model = open_clip_model("ViT-B-32", vision=SMALL_VIT, text=SMALL_TEXT).eval().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ragged = random_mask(2, 16, 9)
    ragged = PatchMask(ragged.keep, torch.tensor([4, 9]), ragged.hidden)
    both = model.image(images, ragged)
    for row, kept in enumerate((4, 9)):
        alone = model.image(
            images[row : row + 1], PatchMask(ragged.keep[row : row + 1, :kept], None, ragged.hidden[:1])
        )
        torch.testing.assert_close(both.pooled[row], alone.pooled[0])
        torch.testing.assert_close(both.tokens[row, : 1 + kept], alone.tokens[0])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ViT-B-31", {}, r"^model\.name is 'ViT-B-31'; expected a model of open_clip, such as ViT-B-32"),
        ("coca_ViT-B-32", {}, r"^model\.name=coca_ViT-B-32 is a CoCa; expected a model of two towers"),
        ("ViT-B-32", {"vision": {"widht": 3}}, r"^open_clip refuses model\.name=ViT-B-32 with .*'widht'"),
        ("local-dir:/nowhere", {}, r"expected a model of open_clip, .*local-dir:<folder with open_clip_config\.json>"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_by_name_and_reason(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_clip_model(name, **arguments)


def test_a_resnet_refuses_masks_by_name() -> None:
    model = open_clip_model("RN50", **MODELS["RN50"]).eval()
    with pytest.raises(ValueError, match="open_clip's ModifiedResNet cannot drop patches; expected a ViT"):
        model.image(torch.zeros(1, 3, 64, 64), random_mask(1, 4, 2))


def test_a_model_in_a_folder(tmp_path: Path) -> None:
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": SMALL_VIT, "text_cfg": {**SMALL_TEXT, "vocab_size": 90}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip_model(f"local-dir:{tmp_path}", context_length=20)
    assert isinstance(model.text, OpenClipText)
    assert (model.embed_dim, model.text.vocab_size, model.text.context_length) == (24, 90, 20)


def test_pixels_are_normalised_and_cropped_as_open_clip_says() -> None:
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    siglip = open_clip_model("ViT-B-16-SigLIP", **MODELS["ViT-B-16-SigLIP"])
    assert siglip.squash
    torch.testing.assert_close(siglip.normalize(white), torch.ones(1, 3, 2, 2))
    clip = open_clip_model("ViT-B-32", vision=SMALL_VIT, text=SMALL_TEXT)
    assert not clip.squash
    expected = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(clip.normalize(white)[0, :, 0, 0], expected)
    own = open_clip_model(
        "ViT-B-32", vision=SMALL_VIT, text=SMALL_TEXT, image_mean=[0.0] * 3, image_std=[1.0] * 3, squash=True
    )
    assert own.squash
    torch.testing.assert_close(own.normalize(white), torch.ones(1, 3, 2, 2))
