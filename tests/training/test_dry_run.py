"""A dry run's figures against what torch counts and measures."""

import copy
from typing import Literal

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain import optim
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.text import TextTransformer
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.training import dry_run, parallel
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task
from tests import tiny
from tests.distributed.steps import spread


def make_task() -> Task:
    """Large enough that activations and weights both count."""
    shape = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    text = TextTransformer(vocab_size=tiny.VOCAB_SIZE, context_length=32, width=96, depth=4, num_heads=3)
    model = ImageTextModel(TimmEncoder("vit_base_patch16_clip_224", 32, shape), text, 64)
    return Task(model, {"infonce": InfoNCE(model)})


def make_optimizer(task: Task) -> torch.optim.Optimizer:
    return optim.adamw(task.named_parameters(), 1e-3, 0.1, (0.9, 0.98), 1e-6, {})


@pytest.fixture(scope="module")
def costs() -> dry_run.Estimate:
    batch = tiny.batch([8] * 16 + [24] * 16)
    return dry_run.estimate(make_task(), batch, {"infonce": 1.0}, make_optimizer, "fp32", 32)


def test_operations_are_torchs_count(costs: dry_run.Estimate) -> None:
    task, batch = make_task(), tiny.batch([8] * 16 + [24] * 16)
    with FlopCounterMode(display=False) as counter:
        forward_backward(task, task, [batch], {"infonce": 1.0})
    assert costs.flops_per_pair == pytest.approx(counter.get_total_flops() / 32, rel=0.01)
    # By hand: 2 x weights x tokens forward, twice that backward, without attention's products.
    # The last of four blocks has keys and values of all tokens, and the rest of the pooled ones.
    tokens, pooled = 32 * 17 + 16 * 8 + 16 * 24, 2 * 32
    weights = 96**2 * (tokens * (3 * 12 + 2) + pooled * 10)
    assert 0.95 < costs.flops_per_pair * 32 / (6 * weights) < 1.4


def test_memory_is_that_of_a_measured_step(costs: dry_run.Estimate) -> None:
    torch.manual_seed(0)
    task, batch = make_task(), tiny.batch([8] * 16 + [24] * 16)
    optimizer = make_optimizer(task)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(2):
            forward_backward(task, task, [batch], {"infonce": 1.0})
            optim.guarded_step(optimizer, torch.tensor(1.0), None)
    peak = total = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    measured = peak + sum(tensor.nbytes for tensor in task.state_dict().values())
    assert costs.memory_bytes == pytest.approx(measured, rel=0.2)


def test_nothing_is_trained(costs: dry_run.Estimate) -> None:
    task = make_task()
    before = copy.deepcopy(task.state_dict())
    estimate = dry_run.estimate(task, tiny.batch([8] * 4), {"infonce": 1.0}, make_optimizer, "bf16", 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert estimate.seconds_per_micro_batch > 0
    assert sum(costs.parameters.values()) == sum(parameter.numel() for parameter in task.parameters())


def measured(
    num_micro_batches: int = 1,
    frozen: str | None = None,
    has_average: bool = False,
    num_shards: int = 1,
    checkpointing: Literal["none", "blocks"] = "none",
) -> dry_run.Estimate:
    task = make_task()
    parallel.prepare(task, torch.device("cpu"), "fp32", spread("ddp", checkpointing))
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(frozen is None or not name.startswith(frozen))
    batch = tiny.batch([8] * 4 + [24] * 4)
    return dry_run.estimate(
        task, batch, {"infonce": 1.0}, make_optimizer, "fp32", 8, num_micro_batches, has_average, num_shards
    )


def test_micro_batches_of_a_coupled_objective_cost_a_pass_more() -> None:
    # A forward pass is a third of forward and backward.
    assert measured(4).flops_per_pair == pytest.approx(measured().flops_per_pair * 4 / 3, rel=0.03)


def test_what_is_frozen_and_what_is_averaged_counts() -> None:
    whole, locked = measured(), measured(frozen="model.image.")
    assert locked.parameters["frozen"] > 0 == whole.parameters["frozen"]
    assert locked.flops_per_pair < 0.85 * whole.flops_per_pair and locked.memory_bytes < whole.memory_bytes
    weights = sum(tensor.nbytes for tensor in make_task().state_dict().values())
    assert measured(has_average=True).memory_bytes == whole.memory_bytes + weights


def test_what_is_spread_over_devices_and_what_is_computed_again_counts() -> None:
    whole, spread, again = measured(), measured(num_shards=4), measured(checkpointing="blocks")
    # Weights, gradients, and AdamW's two moments.
    kept = 4 * sum(tensor.nbytes for tensor in make_task().state_dict().values())
    assert whole.memory_bytes - spread.memory_bytes == pytest.approx(0.75 * kept, rel=0.02)
    between = measured(num_micro_batches=2, num_shards=4)  # gradients are whole between micro-batches
    assert between.memory_bytes - spread.memory_bytes == pytest.approx(0.75 * kept / 4, rel=0.02)
    saved, saved_again = whole.memory_bytes - kept, again.memory_bytes - kept
    assert saved_again < 0.5 * saved
    # The forward pass is a third of all; what a block does before its last product, two thirds of it, is computed twice.
    assert again.flops_per_pair == pytest.approx(whole.flops_per_pair * 11 / 9, rel=0.03)
