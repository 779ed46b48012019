"""Export to transformers: loaded there, the models give the same embeddings, and the tokenizers the same ids."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.transformer import TextTransformer
from PIL import Image
from timm.layers import SwiGLU
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from mmpretrain.checkpoints.hugging_face.export import export
from mmpretrain.checkpoints.hugging_face.inputs import preprocessor_config
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.data.tokenizer import ClipTokenizer, FileTokenizer, HuggingFaceTokenizer
from mmpretrain.models.huggingface import HuggingFaceText
from mmpretrain.models.image_text import CLIP_STD, ImageTextModel
from mmpretrain.models.module_encoder import ModuleEncoder
from mmpretrain.models.open_clip import OpenClipText, open_clip_model
from mmpretrain.models.vit import TimmEncoder
from tests import exports, tiny
from tests.tokenizers import hugging_face_tokenizer

SMALL_VISION = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
CLEAN_TEXTS = [" ".join(text.split()) for text in exports.TEXTS]
"""Texts as tokenizers of Hugging Face get them from us."""
SMALL_TEXT = {"width": 48, "heads": 3, "layers": 2, "context_length": exports.CONTEXT_LENGTH}


def opened(kind: str, folder: Path, **options: Any) -> Any:
    """A model as transformers loads it, no parameter of which may be random or left over."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def tokenized(folder: Path, texts: Sequence[str] = exports.TEXTS, **padding: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(list(texts), truncation=True, return_tensors="pt", **padding)


def assert_same_ids(theirs: Any, ours: tuple[Tensor, Tensor]) -> None:
    for row, (ids, length) in enumerate(zip(*ours, strict=True)):
        assert theirs["input_ids"][row][:length].tolist() == ids[:length].tolist()
        assert theirs["attention_mask"][row].sum() == length or theirs["input_ids"][row][length:].eq(1).all()


def embedded(loaded: Loaded, images: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded.model.embed_pooled_images(loaded.model.image_encoder(images).pooled)


def assert_close(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(nn.functional.normalize(theirs, dim=-1), ours, rtol=0, atol=1e-5)


CLIP_MODELS = {
    "ours": lambda: ImageTextModel(exports.clip_vit(), exports.clip_text(), embed_dim=12),
    "ours, QuickGELU": lambda: ImageTextModel(
        exports.clip_vit("vit_base_patch16_clip_quickgelu_224"), exports.clip_text(), embed_dim=12
    ),
    "open_clip's": lambda: open_clip_model("ViT-B-32", vision=SMALL_VISION, text=SMALL_TEXT),
    "open_clip's, QuickGELU": lambda: open_clip_model("ViT-B-32-quickgelu", vision=SMALL_VISION, text=SMALL_TEXT),
}
"""Functions, since a model takes a second to build."""


def slow(values: Sequence[Any], fast: int = 1) -> list[Any]:
    """The parameters of a test, of which all but the first ones make it slow."""
    return [*values[:fast], *(pytest.param(value, marks=pytest.mark.slow) for value in values[fast:])]


@pytest.mark.parametrize("name", slow(list(CLIP_MODELS)))
def test_a_clip_model(name: str, tmp_path: Path) -> None:
    loaded = exports.loaded(CLIP_MODELS[name]())
    export(loaded, tmp_path)
    theirs = opened("CLIPModel", tmp_path)
    ids, lengths = loaded.tokenizer(exports.TEXTS)
    texts = tokenized(tmp_path, padding=True)
    assert_same_ids(texts, (ids, lengths))
    images = exports.pixels(loaded)
    with torch.no_grad():
        outputs = theirs(pixel_values=images, **texts)
    image, text = embedded(loaded, images), loaded.model.embed_texts(ids, lengths)
    assert_close(outputs.image_embeds, image)
    assert_close(outputs.text_embeds, text)
    torch.testing.assert_close(outputs.logits_per_image, 20 * image @ text.T, rtol=1e-4, atol=1e-4)


def siglip(tmp_path: Path, **text: Any) -> Loaded:
    """A small model of SigLIP's shape, whose towers are those that open_clip builds."""
    tokenizer = HuggingFaceTokenizer(str(hugging_face_tokenizer(tmp_path / "tokenizer", exports.TEXTS)), 12)
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
    trunk = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **shape)
    own = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "output_dim": 24, **text}
    tower = TextTransformer(context_length=12, vocab_size=400, width=24, heads=2, layers=2, **own)
    image = TimmEncoder.around(trunk, 32, head=nn.Sequential())
    model = ImageTextModel(image, OpenClipText(tower), 24, CLIP_STD, CLIP_STD, squash=True)
    return exports.loaded(model, tokenizer, {"logit_scale": 9.0, "logit_bias": -3.0})


def test_a_siglip_model(tmp_path: Path) -> None:
    loaded = siglip(tmp_path)
    export(loaded, tmp_path)
    theirs = opened("SiglipModel", tmp_path)
    ids, lengths = loaded.tokenizer(exports.TEXTS)
    texts = tokenized(tmp_path, CLEAN_TEXTS, padding="max_length")
    assert_same_ids(texts, (ids, lengths))
    images = exports.pixels(loaded)
    with torch.no_grad():
        outputs = theirs(pixel_values=images, input_ids=texts["input_ids"])
    image, text = embedded(loaded, images), loaded.model.embed_texts(ids, lengths)
    assert_close(outputs.image_embeds, image)
    assert_close(outputs.text_embeds, text)
    torch.testing.assert_close(outputs.logits_per_image, 9 * image @ text.T - 3, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("args", [{}, {"qkv_bias": False}])
def test_an_image_tower(args: dict[str, Any], tmp_path: Path) -> None:
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    tower = TimmEncoder("vit_tiny_patch16_224", 32, {**shape, **args}, init="mae")
    positions = tower.trunk.pos_embed.clone()
    loaded = exports.loaded(ImageTextModel(tower, None, embed_dim=12))
    tower.trunk.pos_embed.copy_(positions)
    export(loaded, tmp_path)
    theirs = opened("ViTModel", tmp_path, add_pooling_layer=False)
    images = exports.pixels(loaded)
    with torch.no_grad():
        states = theirs(pixel_values=images).last_hidden_state
    torch.testing.assert_close(states, loaded.model.image(images).tokens, rtol=0, atol=1e-5)
    assert_close(states[:, 0], embedded(loaded, images))


def bert(tmp_path: Path) -> HuggingFaceText:
    fields = {
        "model_type": "bert", "vocab_size": 400, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 16,
    }  # fmt: skip
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(fields))
    return HuggingFaceText(str(tmp_path / "bert"), context_length=12)


def test_a_text_tower_of_hugging_face(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(str(hugging_face_tokenizer(tmp_path / "tokenizer", exports.TEXTS)), 12)
    loaded = exports.loaded(ImageTextModel(None, bert(tmp_path), embed_dim=12), tokenizer)
    exported = export(loaded, tmp_path)
    theirs = opened("BertModel", tmp_path, add_pooling_layer=False)
    texts = tokenized(tmp_path, CLEAN_TEXTS, padding=True)
    with torch.no_grad():
        states = theirs(**texts).last_hidden_state
    ids, lengths = loaded.tokenizer(exports.TEXTS)
    is_token = texts["attention_mask"][..., None]
    assert_close((states * is_token).sum(1) / is_token.sum(1), loaded.model.embed_texts(ids, lengths))
    assert "the mean over the tokens" in exported.usage


def own_tokenizer(path: Path, special: Sequence[str]) -> FileTokenizer:
    """A byte-level tokenizer whose special tokens have the first ids, in this order."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(special_tokens=list(special), initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([], trainer)
    end = backend.token_to_id("[EOS]")
    backend.post_processor = TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", end)])
    backend.save(str(path))
    return FileTokenizer(str(path), exports.CONTEXT_LENGTH)


def test_a_tokenizer_of_ones_own_is_copied(tmp_path: Path) -> None:
    tokenizer = own_tokenizer(tmp_path / "own.json", ["[PAD]", "[EOS]"])
    loaded = exports.loaded(ImageTextModel(exports.clip_vit(), exports.clip_text(vocab_size=400), 12), tokenizer)
    export(loaded, tmp_path)
    texts = tokenized(tmp_path, padding=True)
    ids, lengths = tokenizer(exports.TEXTS)
    assert torch.equal(texts["input_ids"], ids)
    with torch.no_grad():
        outputs = opened("CLIPModel", tmp_path).get_text_features(**texts)
    assert_close(outputs.pooler_output, loaded.model.embed_texts(ids, lengths))


def processed(loaded: Loaded, image: Image.Image, tmp_path: Path, **options: Any) -> Tensor:
    """An image as the exported processor returns it on Pillow, [3, h, w]."""
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(loaded.model)))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels: Tensor = processor(image, return_tensors="pt", **options)["pixel_values"][0]
    return pixels


@pytest.mark.parametrize(
    ("squash", "crop_pct", "interpolation"),
    [(False, 1.0, "bicubic"), (False, 0.875, "bilinear"), (True, 0.875, "bicubic"), (True, 1.0, "bilinear")],
)
def test_a_photographs_pixels_are_those_of_our_evaluation(
    squash: bool, crop_pct: float, interpolation: Any, tmp_path: Path
) -> None:
    options = {"squash": squash, "crop_pct": crop_pct, "interpolation": interpolation}
    loaded = exports.loaded(ImageTextModel(exports.clip_vit(), None, 12, **options))
    photograph = exports.photograph().crop((0, 0, 600, 427))
    assert loaded.preprocess is not None
    ours = loaded.preprocess(photograph)
    theirs = processed(loaded, photograph, tmp_path, do_normalize=False)
    assert torch.equal((theirs * 255).round().to(torch.uint8), ours)
    normalised = processed(loaded, photograph, tmp_path)
    torch.testing.assert_close(normalised, loaded.model.normalize(ours), rtol=0, atol=1e-5)


def test_an_odd_margin_shifts_the_crop_by_a_pixel(tmp_path: Path) -> None:
    loaded = exports.loaded(ImageTextModel(exports.clip_vit(), None, 12))
    assert loaded.preprocess is not None
    ours = loaded.preprocess(exports.photograph())  # 47 pixels wide before the crop to 32
    theirs = (processed(loaded, exports.photograph(), tmp_path, do_normalize=False) * 255).round().to(torch.uint8)
    assert torch.equal(theirs[..., 1:], ours[..., :-1])


class Named(ClipTokenizer):
    """A tokenizer of one's own, which may differ from its base."""


def clip_of(image: Any = None, text: Any = None, **args: Any) -> ImageTextModel:
    return ImageTextModel(image or exports.clip_vit(), text or exports.clip_text(), 12, **args)


REFUSED = {
    r"model\.image has no shape of CLIPModel: expected a norm before the blocks": lambda: clip_of(tiny.vit()),
    r"model\.image has no shape of CLIPModel: it has 0 class token and 0 register tokens": lambda: clip_of(
        exports.clip_vit(class_token=False, global_pool="avg", fc_norm=False)
    ),
    r"it has 1 class token and 2 register tokens; expected 1 class token": lambda: clip_of(
        exports.clip_vit(reg_tokens=2)
    ),
    r"its final norm comes after the pooling": lambda: clip_of(exports.clip_vit(global_pool="avg")),
    r"it pools by avg; expected global_pool token": lambda: clip_of(exports.clip_vit(global_pool="avg", fc_norm=False)),
    r"its activation is SiLU; expected GELU or QuickGELU": lambda: clip_of(exports.clip_vit(act_layer="silu")),
    r"model\.image\.trunk\.blocks\.0\.ls1\.gamma has no counterpart in CLIPModel": lambda: clip_of(
        exports.clip_vit(init_values=0.1)
    ),
    r"blocks\.0\.attn\.qkv\.weight has no bias; CLIPModel has one": lambda: clip_of(exports.clip_vit(qkv_bias=False)),
    r"its blocks have SwiGLU; expected": lambda: clip_of(exports.clip_vit(mlp_layer=SwiGLU)),
    r"model\.image has no shape of CLIPModel: ModuleEncoder is no plain ViT of timm": lambda: clip_of(
        ModuleEncoder(nn.Conv2d(3, 6, 8), 32)
    ),
    r"model\.text has no shape of CLIPModel: expected a causal tower .* got causal=false and pool=mean": lambda: (
        clip_of(text=exports.clip_text(causal=False, pool="mean"))
    ),
    r"the model takes images of 1 channels; expected 3": lambda: clip_of(
        exports.clip_vit(in_chans=1), image_mean=[0.5], image_std=[0.5]
    ),
    r"model\.image has no shape of ViTModel: it has a norm before the blocks": lambda: ImageTextModel(
        exports.clip_vit(), None, 12
    ),
    r"model\.text is a TextTransformer, which normalises before each branch .* BertModel neither": lambda: (
        ImageTextModel(None, exports.clip_text(), 12)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_class_does_not_have_is_named_in_one_line(message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        export(exports.loaded(REFUSED[message]()), tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_other_text_towers_and_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = own_tokenizer(tmp_path / "own.json", ["[PAD]", "[BOS]", "[EOS]"])
    small = clip_of(text=exports.clip_text(vocab_size=400))
    with pytest.raises(
        ValueError, match=r"the end token's id is 2, for which CLIPModel pools the token of the largest id"
    ):
        export(exports.loaded(small, tokenizer), tmp_path)
    with pytest.raises(ValueError, match=r"HuggingFaceText is none of its text towers"):
        export(exports.loaded(clip_of(text=bert(tmp_path)), tokenizer), tmp_path)
    with pytest.raises(ValueError, match=r"^data\.tokenizer is a Named; expected one of those of mmpretrain\.data"):
        export(exports.loaded(clip_of(), Named(exports.CONTEXT_LENGTH)), tmp_path)


def test_siglip_models_need_its_pooling_its_towers_and_a_bias(tmp_path: Path) -> None:
    loaded = siglip(tmp_path)
    with pytest.raises(ValueError, match=r"no objective has learnt a logit_bias, which SiglipModel has"):
        export(replace(loaded, scalars={"logit_scale": 9.0}), tmp_path)
    image = exports.clip_vit("vit_base_patch16_siglip_224")
    with pytest.raises(
        ValueError, match=r"model\.image has no shape of SiglipModel: it has a projection after the pooling"
    ):
        export(exports.loaded(clip_of(image)), tmp_path)
    causal = siglip(tmp_path, no_causal_mask=False, pool_type="argmax")
    with pytest.raises(ValueError, match=r"expected a bidirectional tower .* got causal=true and pool_type=argmax"):
        export(causal, tmp_path)


def test_a_bias_beside_the_scale_is_told(tmp_path: Path) -> None:
    loaded = exports.loaded(clip_of(), scalars={"logit_scale": 9.0, "logit_bias": -3.5})
    assert "a bias of -3.5 beside the scale" in export(loaded, tmp_path).usage
    assert opened("CLIPModel", tmp_path).config.logit_bias == -3.5
