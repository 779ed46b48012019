"""A task with two objectives, its AdamW, and steps on random gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain import optim
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.training.task import Task
from tests import tiny

DEFAULTS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "towers": {}}


def make_task() -> Task:
    model = tiny.image_text(reg_tokens=1)
    mae = MAE(model, decoder_width=8, decoder_depth=1, decoder_heads=2)
    return tiny.randomize(Task(model, {"infonce": InfoNCE(model), "mae": mae}))


def adamw(task: nn.Module, **arguments: Any) -> torch.optim.AdamW:
    return optim.adamw(task.named_parameters(), **{**DEFAULTS, **arguments})


def fill_gradients(task: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in task.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def step(optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> Tensor:
    return optim.guarded_step(optimizer, optim.grad_norms(optimizer)["all"], max_norm)
