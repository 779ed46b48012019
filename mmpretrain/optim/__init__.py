"""Optimisers: parameter groups, optimisers by name, guarded steps, and the state in checkpoints."""

from mmpretrain.optim.groups import TOWERS, parameter_groups, tower_of
from mmpretrain.optim.optimizers import adamw, muon, optimizer_by_name, timm_optimizer, torch_optimizer
from mmpretrain.optim.steps import (
    AveragingOptimizer,
    grad_norms,
    gradients,
    guarded_step,
    load_optimizer_state,
    optimizer_numbers,
    optimizer_tensors,
    set_lr,
    twins,
)

__all__ = [
    "TOWERS",
    "AveragingOptimizer",
    "adamw",
    "grad_norms",
    "gradients",
    "guarded_step",
    "load_optimizer_state",
    "muon",
    "optimizer_by_name",
    "optimizer_numbers",
    "optimizer_tensors",
    "parameter_groups",
    "set_lr",
    "timm_optimizer",
    "torch_optimizer",
    "tower_of",
    "twins",
]
