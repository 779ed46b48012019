"""Export of the towers to torch.export and ONNX: the same embeddings at other batch sizes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmpretrain.checkpoints import onnx_graphs, torch_programs
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.module_encoder import ModuleEncoder
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.models.timm_model import timm_model
from tests import exports, tiny

VISION = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
TEXT = {"width": 48, "heads": 3, "layers": 2, "context_length": exports.CONTEXT_LENGTH}
MODELS: dict[str, Callable[[], ImageTextModel]] = {
    "ours": lambda: ImageTextModel(exports.clip_vit(), exports.clip_text(), 12),
    "bidirectional": lambda: ImageTextModel(tiny.vit(), exports.clip_text(causal=False, pool="mean"), 12),
    "open_clip's": lambda: open_clip_model("ViT-B-32", vision=VISION, text=TEXT),
    "text padded": lambda: open_clip_model(
        "ViT-B-32", vision=VISION, text={**TEXT, "no_causal_mask": True, "pool_type": "last"}
    ),
    "convolutions": lambda: timm_model("test_convnext", 64),
}


def inputs(loaded: Loaded, count: int) -> dict[str, dict[str, Tensor]]:
    """A batch for each tower: noise, and texts padded on the right."""
    found: dict[str, dict[str, Tensor]] = {}
    size = loaded.model.image_encoder.image_size
    found["image"] = {"pixel_values": torch.randn(count, 3, size, size)}
    if loaded.model.text is not None:
        length = exports.CONTEXT_LENGTH
        ids, lengths = loaded.tokenizer(exports.TEXTS[:count])
        mask = torch.arange(length) < lengths[:, None]
        padded = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
        found["text"] = {"input_ids": padded, "attention_mask": mask.long()}
    return found


def expected(loaded: Loaded, tower: str, batch: dict[str, Tensor]) -> Tensor:
    if tower == "image":
        with torch.no_grad():
            return loaded.model.embed_pooled_images(loaded.model.image_encoder(batch["pixel_values"]).pooled)
    return loaded.model.embed_texts(batch["input_ids"], batch["attention_mask"].sum(1))


def assert_same(loaded: Loaded, towers: dict[str, Callable[[dict[str, Tensor]], Tensor]], atol: float) -> None:
    for count in (1, 3):
        for tower, batch in inputs(loaded, count).items():
            given = towers[tower](batch)
            torch.testing.assert_close(given, expected(loaded, tower, batch), rtol=0, atol=atol)
            torch.testing.assert_close(given.norm(dim=1), torch.ones(count), rtol=0, atol=1e-5)


def programs(folder: Path) -> dict[str, Any]:
    loaded = {file.stem: torch.export.load(file).module() for file in folder.glob("*.pt2")}
    return {name: lambda batch, module=module: module(**batch).detach() for name, module in loaded.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_program_embeds_as_we_do(name: str, tmp_path: Path) -> None:
    loaded = exports.loaded(MODELS[name]())
    torch_programs.export(loaded, tmp_path)
    assert_same(loaded, programs(tmp_path), 1e-5)


def test_one_tower(tmp_path: Path) -> None:
    loaded = exports.loaded(ImageTextModel(tiny.vit(), None, 12, image_mean=[0.5] * 3, squash=True))
    exported = torch_programs.export(loaded, tmp_path)
    assert_same(loaded, programs(tmp_path), 1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export.json", "image.pt2", "preprocessor_config.json"]
    described = json.loads((tmp_path / "export.json").read_text())
    image = described["towers"]["image"]
    assert image["inputs"] == {"pixel_values": {"dtype": "float32", "shape": ["b", 3, 32, 32]}}
    assert image["embed_dim"] == tiny.WIDTH and image["squash"] and image["mean"] == pytest.approx([0.5] * 3)
    assert described["logit_scale"] == 20.0
    assert "text.pt2" not in exported.usage and "may run code" in exported.usage


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_embeds_as_we_do(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    loaded = exports.loaded(MODELS[name]())
    onnx_graphs.export(loaded, tmp_path)
    sessions = {file.stem: onnxruntime.InferenceSession(file) for file in tmp_path.glob("*.onnx")}

    assert all(each.shape[0] == "batch" for session in sessions.values() for each in session.get_inputs())

    def run(session: Any, batch: dict[str, Tensor]) -> Tensor:
        arrays: dict[str, np.ndarray] = {key: tensor.numpy() for key, tensor in batch.items()}
        return torch.from_numpy(session.run(None, arrays)[0])

    towers = {name: lambda batch, session=session: run(session, batch) for name, session in sessions.items()}
    assert_same(loaded, towers, 1e-4)


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ValueError, match=r"^onnxscript is not installed, .* pip install 'multimodal-pretrain\[onnx\]'$"
    ):
        onnx_graphs.export(exports.loaded(ImageTextModel(tiny.vit(), None, 12)), tmp_path)


def test_a_tower_that_cannot_be_traced_is_told(tmp_path: Path) -> None:
    class Branching(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum().item() >= 0 else images.amax((2, 3))

    loaded = exports.loaded(ImageTextModel(ModuleEncoder(Branching(), 8), None, 3))
    with pytest.raises(ValueError, match=r"^torch\.export cannot trace model\.image: ") as error:
        torch_programs.export(loaded, tmp_path)
    assert len(str(error.value).splitlines()) == 1
