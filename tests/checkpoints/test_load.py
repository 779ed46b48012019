"""Checkpoints that are loaded from Python."""

import math
from pathlib import Path

import pytest
import torch

from mmpretrain.checkpoints.load import load_checkpoint
from tests.saved_runs import MODEL, save_run


@pytest.mark.parametrize("what", ["run", "run/checkpoints/step_00000005"])
def test_loaded_model_gives_the_embeddings_that_were_saved(tmp_path: Path, what: str) -> None:
    saved = save_run(tmp_path / "run").model
    loaded = load_checkpoint(tmp_path / what)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    ids, lengths = loaded.tokenizer(["a", "a cat and a dog"])
    embeddings = [
        (
            model.project_image(model.encode_image(images).pooled),
            model.project_text(model.encode_text(ids, lengths).pooled),
        )
        for model in (saved, loaded.model)
    ]
    assert torch.equal(embeddings[0][0], embeddings[1][0])
    assert torch.equal(embeddings[0][1], embeddings[1][1])
    assert not loaded.model.training
    assert loaded.preprocess.image_size == 32
    assert loaded.num_samples == 640
    assert loaded.folder == tmp_path / "run"


def test_a_run_is_loaded_at_its_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_run(tmp_path, step=step)
    (tmp_path / "checkpoints" / "step_00000015" / "model.safetensors").write_bytes(b"cut")
    assert load_checkpoint(tmp_path).num_samples == 1280
    with pytest.raises(ValueError, match=r"model.safetensors has 3 bytes"):
        load_checkpoint(tmp_path / "checkpoints" / "step_00000015")


def test_logit_scale_is_the_first_objectives_as_in_training(tmp_path: Path) -> None:
    task = save_run(tmp_path)
    logit_scale = load_checkpoint(tmp_path).scalars["logit_scale"]
    assert logit_scale == task.logit_scale
    assert logit_scale == pytest.approx(20) and not math.isclose(logit_scale, 30)


@pytest.mark.parametrize("folder", [".", "checkpoints", "absent"])
def test_a_folder_without_checkpoint_is_refused_in_one_line(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint; expected a run's directory") as error:
        load_checkpoint(tmp_path / folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "timm.create_model",
        "mmpretrain.data.storage.os.system",  # what one of our modules imports is not ours
        "mmpretrain.models.vit.timm.create_model",
        "mmpretrain.models.vit.nn.Identity",
        "mmpretrain.models.attention.choose_kernel",
        "mmpretrain.models.absent.Model",
        "mmpretrain.models.vit.absent",
        "mmpretrain.train.main",
    ],
)
def test_a_configuration_that_names_foreign_code_is_refused_and_not_run(tmp_path: Path, target: str) -> None:
    save_run(tmp_path, {**MODEL, "image": {"_target_": target, "command": f"touch {tmp_path}/ran"}})
    with pytest.raises(
        ValueError, match=r"^config.yaml: model.image._target_ is .* is no part of mmpretrain.*trust=\["
    ):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_model_of_ones_own_is_loaded_once_its_module_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_towers.py").write_text(
        "from mmpretrain.models.text import TextTransformer\n\n\nclass Mine(TextTransformer):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    save_run(tmp_path, {**MODEL, "text": {**MODEL["text"], "_target_": "own_towers.Mine"}})
    for trust in ((), ("own",), ("own_towers.Mine",)):
        with pytest.raises(ValueError, match=r"is 'own_towers.Mine'.* name its module: trust=\[own_towers\]"):
            load_checkpoint(tmp_path, trust=trust)
    assert type(load_checkpoint(tmp_path, trust=["own_towers"]).model.text).__name__ == "Mine"


def test_a_model_that_computes_numbers_while_it_is_built_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "computing_towers.py").write_text(
        "import torch\nfrom mmpretrain.models.text import TextTransformer\n\n\nclass Mine(TextTransformer):\n"
        "    def __init__(self, **sizes):\n        super().__init__(**sizes)\n"
        "        self.rate = torch.linspace(0, 1, 3)[1].item()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    save_run(tmp_path, {**MODEL, "text": {**MODEL["text"], "_target_": "computing_towers.Mine"}})
    assert load_checkpoint(tmp_path, trust=["computing_towers"]).model.text.rate == 0.5


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path, tokenizer="SimpleTokenizer")
    with pytest.raises(ValueError, match=r"^config.yaml: data.tokenizer._target_ is '.*\.SimpleTokenizer'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path"])
def test_loading_fetches_no_weights_from_elsewhere(tmp_path: Path, argument: str) -> None:
    args = {**MODEL["image"]["args"], argument: True if argument == "pretrained" else str(tmp_path / "absent.pth")}
    saved = save_run(tmp_path, {**MODEL, "image": {**MODEL["image"], "args": args}}).model
    weight = load_checkpoint(tmp_path).model.image_projection.weight
    assert torch.equal(weight, saved.image_projection.weight)
