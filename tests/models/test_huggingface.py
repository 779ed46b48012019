"""Models of Hugging Face from local folders: transformers' own embeddings, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmpretrain
from mmpretrain.checkpoints import untrusted
from mmpretrain.models.huggingface import HuggingFaceText
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.module_encoder import ModuleEncoder
from mmpretrain.objectives.causal_lm import CausalLM
from mmpretrain.objectives.mlm import MLM
from tests import runs

transformers = pytest.importorskip("transformers")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": {**SHAPE, "pad_token_id": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {**SHAPE, "num_key_value_heads": 1},
    "albert": {**SHAPE, "embedding_size": 16},
}
CAUSAL = {"gpt2": True, "llama": True}


def saved(folder: Path, kind: str, **fields: Any) -> Any:
    """A small model with random weights, saved where a downloaded one would lie."""
    torch.manual_seed(1)
    shape = {"vocab_size": 90, "max_position_embeddings": 24, **KINDS[kind], **fields}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **shape))
    model.save_pretrained(folder)
    return model.eval()


def texts() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([3, 9, 14])
    return torch.randint(3, 90, (3, 16)) * (torch.arange(16) < lengths[:, None]), lengths


@pytest.mark.parametrize(
    ("kind", "pool"),
    [("bert", "mean"), ("bert", "cls"), ("roberta", "mean"), ("roberta", "last"), ("gpt2", "last"), ("llama", "mean")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_are_transformers_own_of_each_text_alone(
    kind: str, pool: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = saved(tmp_path, kind).to(dtype)
    ours = HuggingFaceText(str(tmp_path), pretrained=True, context_length=20, pool=pool).to(dtype).eval()
    assert ours.causal is CAUSAL.get(kind, False)
    assert (ours.vocab_size, ours.width) == (90, 32)
    ids, lengths = texts()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        encoding = ours(ids, lengths)
        for row, length in enumerate(lengths.tolist()):
            # The text without any padding.
            (states,) = theirs(input_ids=ids[row : row + 1, :length]).last_hidden_state
            expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pool]
            torch.testing.assert_close(encoding.tokens[row, :length], states, rtol=0, atol=tolerance)
            torch.testing.assert_close(encoding.pooled[row], expected, rtol=0, atol=tolerance)


def test_weights_of_a_folder_are_loaded_in_float32_and_random_ones_are_drawn_from_the_generator(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "bert")
    theirs.half().save_pretrained(tmp_path)
    ours = HuggingFaceText(str(tmp_path), pretrained=True, context_length=24)
    expected = {f"transformer.{name}": tensor.float() for name, tensor in theirs.state_dict().items()}
    assert not any("pooler" in name for name in ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(HuggingFaceText(str(tmp_path), context_length=24).token_embeddings)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], ours.token_embeddings)
    assert (
        len(HuggingFaceText(str(tmp_path), context_length=24, args={"num_hidden_layers": 1}).transformer.encoder.layer)
        == 1
    )


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("bert", {"context_length": 25}, r"model\.text\.context_length is 25; expected a number at least 2 and at most 24"),
        ("roberta", {"context_length": 24}, r"expected a number at least 2 and at most 22"),
        ("gpt2", {"pool": "cls"}, r"model\.text\.pool is cls, but the gpt2 in .* is causal; expected last or mean"),
        ("gpt2", {"causal": False}, r"model\.text\.causal is false, but the gpt2 in .* is causal"),
        ("bert", {"args": {"auto_map": {}}}, r"args has 'auto_map', which cannot be replaced"),
        ("bert", {"args": {"num_attention_heads": 5}}, r"transformers cannot build the bert in .*\(.*heads"),
        ("bert", {"pretrained": True, "args": {"num_hidden_layers": 3}}, r"do not fit its bert: 16 are missing .*layer\.2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(
    kind: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as error:
        HuggingFaceText(str(tmp_path), **{"context_length": 20, **arguments})
    assert "\n" not in str(error.value)


def test_a_folder_without_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a local folder with a config\.json, as save_pretrained writes it"):
        HuggingFaceText("bert-base-uncased")
    saved(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"transformers cannot build the bert in .*model\.safetensors"):
        HuggingFaceText(str(tmp_path), pretrained=True, context_length=20)


def test_objectives_refuse_models_that_cannot_serve_them(tmp_path: Path) -> None:
    for kind in ("bert", "gpt2", "albert"):
        saved(tmp_path / kind, kind)
    bert, gpt2, albert = (
        ImageTextModel(None, HuggingFaceText(str(tmp_path / kind), context_length=20), 8)
        for kind in ("bert", "gpt2", "albert")
    )
    MLM(bert)
    CausalLM(gpt2)
    with pytest.raises(
        ValueError, match=r"objective\.mlm needs a bidirectional text encoder; .*choose another model\.text"
    ):
        MLM(gpt2)
    with pytest.raises(ValueError, match=r"objective\.causal_lm needs a causal text encoder"):
        CausalLM(bert)
    with pytest.raises(ValueError, match="whose width 16 is not that of the states, 32"):
        MLM(albert)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("vit", {**SHAPE, "image_size": 32, "patch_size": 8}),
        ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}),
    ],
)
def test_an_image_model(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    from mmpretrain.models.huggingface import huggingface_model

    theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **fields))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    ours = ModuleEncoder(huggingface_model(str(tmp_path), pretrained=True), 32).eval()
    assert ours.width == 32 and ours.has_batch_norm is (kind == "resnet")
    with torch.no_grad():
        encoding, expected = ours(images), theirs.eval()(images)
    torch.testing.assert_close(encoding.pooled, expected.pooler_output.flatten(1))
    states = expected.last_hidden_state
    torch.testing.assert_close(encoding.tokens, states if states.ndim == 3 else states.flatten(2).transpose(1, 2))


def with_tokenizer(folder: Path) -> Path:
    """A small BERT with the special tokens of BERT's tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    captions = ["a red circle number 0123456789 and more", "a green square", "a blue cross", "a grey star ring"]
    tokenizer.train_from_iterator(captions, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    saved(folder, "bert", vocab_size=len(tokenizer.get_vocab()))
    return folder


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_its_checkpoint_needs_no_folder(pairs: Path, tmp_path: Path) -> None:
    bert = with_tokenizer(tmp_path / "bert")
    common = [
        *(setting for setting in runs.TINY_RUN if "model" not in setting),
        "model=huggingface", f"model.text.path={bert}", "model.text.context_length=16", "model.embed_dim=16",
        "model.image.image_size=32", "+model.image.args={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
        f"data.root={pairs}", "objective=[infonce,mlm]", "schedule=constant", "trainer.micro_batch_size=8",
    ]  # fmt: skip
    for folder, durations in (("whole", [6]), ("parts", [3, 6])):
        (tmp_path / folder).mkdir()
        for steps in durations:
            arguments = [*common, f"trainer.duration={steps}steps"]
            finished = runs.run("mmpretrain.train", arguments, tmp_path / folder)
            assert finished.code == 0, finished.stderr
            assert "draw at random" not in finished.stderr, "dropout that does not draw by sample"
    outcomes = [runs.exact_outcome(tmp_path / folder / "run") for folder in ("whole", "parts")]
    assert all(outcomes[0][part] == outcomes[1][part] for part in ("model", "optimizer"))
    shutil.rmtree(bert)
    model, _, tokenizer = mmpretrain.load(tmp_path / "whole" / "run")
    assert isinstance(model.text, HuggingFaceText) and not model.text.causal
    trained = runs.weights(tmp_path / "whole" / "run", 6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"model.{name}"]), name
    assert model.embed_texts(*tokenizer(["a red circle", "a blue cross and more"])).shape == (2, 16)
    config = tmp_path / "whole" / "run" / "huggingface" / "text" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1000'))
    with pytest.raises(ValueError, match="has more weights than the checkpoint"):
        mmpretrain.load(tmp_path / "whole" / "run")


# ---------------------------------------------------------------------------------------------- of others


def node_of(folder: Path) -> dict[str, Any]:
    text = {"_target_": "mmpretrain.models.huggingface.HuggingFaceText", "path": "elsewhere"}
    kept = folder / untrusted.HUGGINGFACE_FOLDER / "text"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text(json.dumps({"model_type": "bert", **SHAPE}))
    return {"_target_": "mmpretrain.models.image_text.ImageTextModel", "image": None, "text": text}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "detr"}, r"model_type is 'detr', which may build more than layers; .*trust=\[detr\]"),
        ({"num_hidden_layers": 1 << 40}, r"config\.json: num_hidden_layers is 1099511627776; expected at most"),
        ({"nested": {"of": ["hub/name"]}}, r"config\.json: nested\.of\[0\] is 'hub/name', which leads elsewhere"),
        ({"hidden_act": "${oc.env:HOME}"}, r"an interpolation"),
        ({"model_type": 3}, r"has no model_type"),
    ],
)
def test_a_config_of_others_leads_nowhere(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    node = untrusted.with_own_configs(node_of(tmp_path), tmp_path)
    file = tmp_path / untrusted.HUGGINGFACE_FOLDER / "text" / "config.json"
    untrusted.check_model(node, 1000, (), tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        untrusted.check_model(node, 1000, (), tmp_path)


def test_a_path_without_a_copy_in_the_run_is_refused(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    for name in ("..", "a/b", "[0]"):
        nested = {"image": {name: dict(node["text"])}}
        with pytest.raises(ValueError, match=r"'elsewhere', which leads to files elsewhere; .*trust=\['elsewhere'\]"):
            untrusted.check_model(untrusted.with_own_configs(nested, tmp_path), 1000, (), tmp_path)
    with pytest.raises(ValueError, match="leads to files elsewhere"):
        untrusted.check_model(node["text"], 1000, (), tmp_path)


def test_arguments_that_read_weights_are_left_out() -> None:
    torchvision = {"_target_": "torchvision.models.get_model", "name": "resnet18", "weights": "DEFAULT"}
    node = {"image": {"module": torchvision, "weights": [1.0]}, "text": {"pretrained": True, "path": "x"}}
    module = {"_target_": "torchvision.models.get_model", "name": "resnet18"}
    expected = {"image": {"module": module, "weights": [1.0]}, "text": {"path": "x"}}
    assert untrusted.without_weights(node) == expected


def test_fields_that_name_code_kernels_or_files_are_left_out(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    file = tmp_path / "config.json"
    hostile = {
        "auto_map": {"AutoModel": "x.Y"},
        "_attn_implementation": "a/b",
        "attn_implementation": "a/b",
        "num_labels": 1e9,
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **hostile}))
    model = HuggingFaceText(str(tmp_path), context_length=20)
    assert model.transformer.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(model.transformer.config, "auto_map")


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_layers_follow_from_the_names_of_the_parameters(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    above = HuggingFaceText(str(tmp_path), context_length=20).layers_above()
    blocks = {name: number for name, number in above.items() if ".0." in name or ".1." in name}
    assert {number for name, number in blocks.items() if ".0." in name} == {2}
    assert {number for name, number in blocks.items() if ".1." in name} == {1}
    others = {name: number for name, number in above.items() if name not in blocks}
    norms = {name for name in others if name.startswith(("transformer.ln_f", "transformer.norm"))}
    assert {number for name, number in others.items() if name not in norms} == {3}
    assert all(others[name] == 1 for name in norms) and bool(norms) == (kind in CAUSAL)


def test_layers_without_blocks_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "albert")
    with pytest.raises(ValueError, match=r"AlbertModel has no blocks named layers, layer, blocks or h"):
        HuggingFaceText(str(tmp_path), context_length=20).layers_above()
