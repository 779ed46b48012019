"""Runs' directories with one checkpoint, written without training."""

import json
from pathlib import Path
from typing import Any

import torch

from mmpretrain.checkpoints import store
from mmpretrain.config import config_yaml, instantiate
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.sigmoid import Sigmoid
from mmpretrain.training.task import Task

MODEL: dict[str, Any] = {
    "_target_": "mmpretrain.models.image_text.ImageTextModel",
    "embed_dim": 12,
    "image_mean": [0.1, 0.2, 0.3],
    "image": {
        "_target_": "mmpretrain.models.vit.TimmEncoder",
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "args": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    },
    "text": {
        "_target_": "mmpretrain.models.text.TextTransformer",
        "context_length": 16,
        "width": 24,
        "depth": 1,
        "num_heads": 2,
    },
}


SMALL: dict[str, Any] = {**MODEL, "text": {**MODEL["text"], "vocab_size": 40}}
"""`MODEL` with few words: its checkpoint takes kilobytes."""


def save_run(folder: Path, model: dict[str, Any] = MODEL, tokenizer: str = "ClipTokenizer", step: int = 5) -> Task:
    """A run's directory with one checkpoint, as the trainer leaves it; returns what was saved."""
    built: ImageTextModel = instantiate.instantiate(SMALL if model is SMALL else MODEL, 3, "model")
    objectives = {"sigmoid": Sigmoid(built, init_logit_scale=20), "infonce": InfoNCE(built, init_logit_scale=30)}
    task = Task(built, objectives).eval()
    plain: dict[str, Any] = {
        "run": {"seed": 0},
        "trainer": {"precision": "fp32"},
        "model": model,
        "data": {"tokenizer": {"_target_": f"mmpretrain.data.tokenizer.{tokenizer}", "context_length": 16}},
        "objective": {
            "sigmoid": {"_target_": "mmpretrain.objectives.sigmoid.Sigmoid"},
            "infonce": {"_target_": "mmpretrain.objectives.infonce.InfoNCE"},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config_yaml.to_yaml(plain))
    optimizer = {"model.image_projection.weight/step": torch.ones(())}
    parts = {"model": task.state_dict(), "optimizer": optimizer}
    store.save(folder / "checkpoints", step, parts, {"samples": 128 * step}, keep_last=0)
    return task


def save_whole_run(folder: Path) -> None:
    """`save_run` of `SMALL`, with all that report and comparisons read: every file is some kilobytes."""
    save_run(folder, SMALL)
    records = [{"step": step, "samples": 16 * step, "train/loss": 3 / step} for step in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "results.json").write_text(json.dumps({"eval-val/acc1": 0.5, "steps": 3, "pairs_per_second": 9.5}))
    refused = {"stream": "pairs", "shard": "a.tar", "key": "1", "reason": "no readable image"}
    (folder / "quarantine.jsonl").write_text(json.dumps(refused) + "\n")
