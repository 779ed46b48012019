"""A step off the logging step asks nothing of the device that the host would have to wait for.

Where there is no GPU fake tensors stand for it: they have shapes and no values, so that whatever needs a value raises.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmpretrain.batch import Batch
from mmpretrain.distributed import LateFlags
from mmpretrain.optim import adamw, grad_norms, gradients, guarded_step
from mmpretrain.schedules import ScheduledValue
from mmpretrain.training.ema import EMA
from mmpretrain.training.precision import LossScale, autocast
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task
from tests.distributed.steps import RANDOM, make_batches, make_task

MIXES = [
    ("infonce", "multi_positive", "sigmoid", "mae", "simclr", "causal_lm", "captioning"),
    ("coca", "cappa", "simclr_layer", "flip", "flip_block"),
    ("infonce", "mae_fixed", "mae_images", "mlm", "mlm_words", "mlm_texts"),
]


class Steps:
    """What the trainer computes in every step, on micro-batches that were counted on the host."""

    def __init__(self, task: Task, batches: list[Batch], device: torch.device) -> None:
        self.task, self.batches, self.device = task, batches, device
        self.optimizer = adamw(
            task.named_parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, towers={}
        )
        self.average = EMA(task, ScheduledValue(0.99, "x"))
        self.loss_scale, self.flags = LossScale("fp16", device, None, 0), LateFlags()

    def step(self) -> None:
        weights = dict.fromkeys(self.task.objectives, 0.5)
        passes = autocast(self.device, "bf16")
        forward_backward(self.task, self.task, self.batches, weights, passes, self.loss_scale.scale)
        self.loss_scale.unscale(gradients(self.optimizer))
        skipped = guarded_step(self.optimizer, grad_norms(self.optimizer)["all"], 1.0)
        self.task.after_step(self.batches[0].progress, skipped)
        self.loss_scale.update(skipped)
        self.average.update(self.batches[0].progress, skipped)
        self.flags.post({"skipped": skipped, "stop": torch.full((), False, device=self.device)})


def without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def forget_values(task: nn.Module) -> None:
    for module in task.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(without_values(parameter)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, without_values(buffer))


def fake_steps(mix: tuple[str, ...], *, counted: bool) -> None:
    """A step of two micro-batches on fake tensors."""
    task = make_task(mix, 0.1, **RANDOM).float()
    batches = [task.counted(batch, dict.fromkeys(mix, 0.5)) if counted else batch for batch in make_batches(2)]
    with FakeTensorMode():
        forget_values(task)
        batches = [
            replace(batch, streams={name: samples.map(without_values) for name, samples in batch.streams.items()})
            for batch in batches
        ]
        Steps(task, batches, torch.device("cpu")).step()


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_a_step_needs_no_value_on_the_host(mix: tuple[str, ...]) -> None:
    fake_steps(mix, counted=True)


def test_a_batch_that_was_not_counted_needs_some() -> None:
    with pytest.raises(DataDependentOutputException):
        fake_steps(("mlm",), counted=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_a_step_does_not_wait_for_the_gpu(mix: tuple[str, ...]) -> None:
    device, task = torch.device("cuda"), make_task(mix, 0.1, **RANDOM).float()
    batches = [task.counted(batch, dict.fromkeys(mix, 0.5)).to(device) for batch in make_batches(2)]
    steps = Steps(task.to(device), batches, device)
    steps.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
