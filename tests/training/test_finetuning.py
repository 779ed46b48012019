"""Experiments of fine-tuning, at a tiny size: exact over ranks and micro-batches, and resumed bit for bit."""

import signal
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmpretrain import files
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.models.lora import has_adapters
from tests import runs

pytest.importorskip("peft")

COLOURS = ("red", "green", "blue", "grey")
NUM_STEPS = 12
EXPERIMENTS = {
    "finetune_b16": ("init_from=null",),
    "finetune_tiny": (),
    "finetune_linear": (),
    "finetune_lora": ("trainer.lora.rank=2",),
    "finetune_gradual": (),
    "finetune_zero_shot": (),
    "finetune_flyp": (),
    "finetune_text": (),
    "prototypical_tiny": ("data.train.pairs.episodes={ways: 4, per_class: 4}", "objective.prototypical.shots=2"),
}
IMAGE = (
    "model.image.image_size=16",
    "model.image.args={patch_size: 8, embed_dim: 24, depth: 4, num_heads: 2}",
    "+model.image.args.drop_path_rate=0.1",
)
TEXT = ("model.text.width=24", "model.text.depth=1", "model.text.num_heads=2", "model.text.context_length=16")
COMMON = (
    "run.dir=run",
    "model.embed_dim=16",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.batch_size=16",
    "trainer.log_every=1steps",
    "data.workers=0",
)


def sizes_of(name: str) -> tuple[str, ...]:
    """The overrides that make the towers of an experiment tiny."""
    if name == "finetune_b16":
        return ("size=tiny",)
    image, text = name != "finetune_text", name in ("finetune_zero_shot", "finetune_flyp", "finetune_text")
    return (*(IMAGE if image else ()), *(TEXT if text else ()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of four colours with a class list, and a CLIP run on them to begin with."""
    root = runs.write_pairs(tmp_path_factory.mktemp("labelled"))
    rows = [f"{colour}\ta thing that is {colour}" for colour in COLOURS]
    (root / "train" / "classes.tsv").write_text("\n".join(["label\ttext", *rows]) + "\n")
    arguments = [*COMMON, *IMAGE, *TEXT, "model=clip_tiny", f"data.root={root}", "trainer.duration=4steps", "eval=[]"]
    finished = runs.run("mmpretrain.train", arguments, root)
    assert finished.code == 0, finished.stderr
    return root


def overrides_of(name: str, data: Path) -> list[str]:
    size = (*sizes_of(name), *EXPERIMENTS[name], f"trainer.duration={NUM_STEPS}steps", "checkpoint.every=2steps")
    return [f"experiment={name}", *COMMON, f"init_from={data}/run", *size, f"data.root={data}"]


def trained(name: str, data: Path, folder: Path, world_size: int = 1, *more: str) -> Path:
    folder.mkdir()
    environments = [{}] if world_size == 1 else runs.group(world_size)
    arguments = [*overrides_of(name, data), *more]
    for command in [runs.Command("mmpretrain.train", arguments, folder, each) for each in environments]:
        finished = command.wait()
        assert finished.code == 0, finished.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_exact_and_resumes_bit_for_bit(name: str, data: Path, tmp_path: Path) -> None:
    mixed = () if name in ("finetune_text", "finetune_flyp", "prototypical_tiny") else ("augmentation=mixup",)
    whole = trained(name, data, tmp_path / "whole", 1, *mixed)
    records = runs.records(whole)
    losses = [record["train/loss"] for record in records]
    assert len(losses) == NUM_STEPS and len(set(losses)) == NUM_STEPS
    assert any("acc1" in key for record in records for key in record)

    killed = tmp_path / "killed"
    killed.mkdir()
    command = runs.Command("mmpretrain.train", [*overrides_of(name, data), *mixed], killed)
    command.wait_for(lambda: runs.checkpoints(killed / "run"), "a checkpoint")
    command.send(signal.SIGKILL)
    command.wait()
    finished = runs.run("mmpretrain.train", [*overrides_of(name, data), *mixed], killed)
    assert finished.code == 0, finished.stderr
    assert runs.exact_outcome(killed / "run") == runs.exact_outcome(whole)

    for world_size in (2, 4):
        other = trained(name, data, tmp_path / f"{world_size}", world_size, *mixed, "trainer.micro_batch_size=2")
        theirs = [record["train/loss"] for record in runs.records(other)]
        # Layers that draw by micro-batch have other draws on other ranks; drop path draws by sample.
        assert theirs == pytest.approx(losses, rel=2e-4)
        found, expected = (runs.weights(each, NUM_STEPS) for each in (other, whole))
        # The biases of keys have no gradient but by rounding, which Adam enlarges.
        assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_a_lora_run_is_loaded_merged(data: Path, tmp_path: Path) -> None:
    run = trained("finetune_lora", data, tmp_path / "lora")
    saved = runs.weights(run, NUM_STEPS)
    assert any(has_adapters([name]) and bool(tensor.any()) for name, tensor in saved.items() if ".lora_B." in name)
    loaded = load_checkpoint(run)
    assert not has_adapters(loaded.model.state_dict())
    layer = "image.trunk.blocks.1.mlp.fc1"
    base, down, up = (
        saved[f"model.{layer}.{part}"]
        for part in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    )
    merged = loaded.model.state_dict()[f"{layer}.weight"]
    assert torch.allclose(merged, base + 16 / 2 * up @ down, atol=1e-6) and not torch.equal(merged, base)
    initial = runs.weights(data / "run", 4)[f"model.{layer}.weight"]
    assert torch.equal(base, initial)

    arguments = [f"checkpoint={run}", "format=card", "output=card"]
    assert runs.run("mmpretrain.export", arguments, tmp_path).code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    image = loaded.model.image
    assert image is not None
    assert f"; parameters: image {sum(each.numel() for each in image.parameters()):,}" in card
    assert "| LoRA | rank 2, alpha 16.0; the adapters are merged into the weights |" in card


def test_the_checkpoint_of_a_classifier_is_evaluated(data: Path, tmp_path: Path) -> None:
    run = trained("finetune_tiny", data, tmp_path / "tiny")
    finished = runs.run(
        "mmpretrain.evaluate", [f"checkpoint={run}", "eval=[classifier]", "output=scores.json"], tmp_path
    )
    assert finished.code == 0, finished.stderr
    scores = runs.results(run)
    name = "eval-val/classification_acc1"
    assert files.read_json(tmp_path / "scores.json")[name] == pytest.approx(scores[name])
