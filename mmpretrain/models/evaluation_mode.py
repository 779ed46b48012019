"""Evaluation mode of modules for a block of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation_mode(*modules: object) -> Iterator[None]:
    """Set modules to evaluation mode inside the block."""
    parts = [each for module in modules if isinstance(module, nn.Module) for each in module.modules()]
    were_training = [each.training for each in parts]
    try:
        for each in parts:
            each.training = False
        yield
    finally:
        for each, was_training in zip(parts, were_training, strict=True):
            each.training = was_training
