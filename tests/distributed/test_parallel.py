"""DDP, FSDP2 and activation checkpointing change nothing but where things are."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mmpretrain.batch import Batch
from mmpretrain.checkpoints import store
from mmpretrain.config.schema import Precision
from mmpretrain.training import parallel, probe
from mmpretrain.training.precision import autocast
from mmpretrain.training.step import forward_backward
from tests.distributed.pool import Pool
from tests.distributed.steps import (
    BATCH_SIZE,
    NUM_STEPS,
    bf16_losses,
    held,
    make_batches,
    make_samples,
    make_task,
    num_reductions,
    refused_degree,
    refused_optimizer,
    refused_strategy,
    sent_bytes,
    spread,
    train,
)

MIXES = {
    "clip": ("infonce",),
    "slip": ("infonce", "simclr_layer"),
    "clip_mae_mlm": ("infonce", "mae_images", "mlm_texts"),
    "coca": ("infonce", "coca"),
    "continual": ("infonce", "distillation"),
}


@cache
def on_one_process(mix: str) -> list[dict[str, float]]:
    return train(MIXES[mix], spread(), 1, NUM_STEPS)


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-9), f"step {step}"
    assert found[0] != pytest.approx(found[1], rel=1e-3), "steps that train"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("mix", MIXES)
def test_two_processes_give_the_losses_of_one(pool: Callable[[int], Pool], mix: str, strategy: str) -> None:
    for found in pool(2).run(train, MIXES[mix], spread(strategy), 1, NUM_STEPS):
        assert_same(found, on_one_process(mix))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_tower_that_is_frozen_for_a_time_is_so_on_two_processes(pool: Callable[[int], Pool], strategy: str) -> None:
    expected = train(MIXES["clip"], spread(), 1, 6, None, None, 3)
    assert "norm_image" in expected[2] and expected[2]["norm_image"] == 0 < expected[3]["norm_image"]
    for found in pool(2).run(train, MIXES["clip"], spread(strategy), 1, 6, None, None, 3):
        assert_same(found, expected)


@pytest.mark.slow
def test_a_sharded_checkpoint_of_four_goes_on_with_two_shards_and_whole_on_one_and_two(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    objectives = MIXES["clip_mae_mlm"]
    expected = train(objectives, spread(), 1, 6)
    for found in pool(4).run(train, objectives, spread("fsdp"), 1, 3, None, tmp_path):
        assert_same(found[:3], expected[:3])
    saved = tmp_path / "step_00000003"
    assert [len(list((saved / part).iterdir())) for part in ("model", "optimizer", "ema")] == [4, 4, 4]
    store.verify(saved)
    assert_same(train(objectives, spread("ddp"), 1, 3, saved), expected[3:])
    for strategy in ("fsdp", "ddp"):
        for found in pool(2).run(train, objectives, spread(strategy), 2, 3, saved):
            assert_same(found, expected[3:])


def test_a_whole_checkpoint_goes_on_sharded(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    objectives = MIXES["clip_mae_mlm"]
    expected = train(objectives, spread(), 1, 6)
    train(objectives, spread(), 1, 3, None, tmp_path)
    for found in pool(4).run(train, objectives, spread("fsdp"), 1, 3, tmp_path / "step_00000003"):
        assert_same(found, expected[3:])


@pytest.mark.parametrize(
    ("mix", "kind"), [("coca", "blocks"), pytest.param("clip_mae_mlm", "selective", marks=pytest.mark.slow)]
)
def test_activation_checkpointing_changes_nothing(pool: Callable[[int], Pool], mix: str, kind: str) -> None:
    assert_same(train(MIXES[mix], spread("ddp", kind), 2, NUM_STEPS), on_one_process(mix))
    for found in pool(2).run(train, MIXES[mix], spread("fsdp", kind), 1, NUM_STEPS):
        assert_same(found, on_one_process(mix))


@pytest.mark.slow
def test_copies_of_shards_give_the_losses_of_one_process(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    objectives = MIXES["clip_mae_mlm"]
    expected = train(objectives, spread(), 1, 6)
    hsdp = spread("hsdp", shard_degree=2)
    for found in pool(4).run(train, objectives, hsdp, 1, 3, None, tmp_path):
        assert_same(found[:3], expected[:3])
    saved = tmp_path / "step_00000003"
    assert len(list((saved / "model").iterdir())) == 2, "one file for a shard, not for each of its copies"
    for found in pool(4).run(train, objectives, hsdp, 2, 3, saved):
        assert_same(found, expected[3:])


@pytest.mark.parametrize(
    ("strategy", "degree", "message"),
    [
        ("hsdp", 3, "shard_degree is 3; expected a divisor of the 4 processes"),
        ("hsdp", -1, "shard_degree is -1; expected a divisor of the 4 processes"),
        ("fsdp", 2, "shard_degree is 2, but parallel.strategy is fsdp; choose parallel=hsdp"),
    ],
)
def test_a_degree_that_does_not_fit_is_refused(
    pool: Callable[[int], Pool], strategy: str, degree: int, message: str
) -> None:
    assert all(message in told for told in pool(4).run(refused_degree, strategy, degree))


@pytest.mark.parametrize(("world_size", "strategy", "degree"), [(2, "fsdp", None), (4, "hsdp", 2)])
def test_each_process_holds_its_shard_of_weights_and_gradients(
    pool: Callable[[int], Pool], world_size: int, strategy: str, degree: int | None
) -> None:
    whole = sum(parameter.numel() for parameter in make_task(("infonce",)).parameters())
    for parameters, gradients, inside in pool(world_size).run(held, spread(strategy, shard_degree=degree)):
        assert parameters < 0.52 * whole and gradients < 0.52 * whole
        assert inside == whole


def test_sharded_gradients_are_reduced_once_a_step(pool: Callable[[int], Pool]) -> None:
    once = pool(2).run(num_reductions, "fsdp", 1)
    assert once[0] > 0
    assert pool(2).run(num_reductions, "fsdp", 4) == once


@pytest.mark.slow
def test_sent_bytes_are_those_of_ring_algorithms(pool: Callable[[int], Pool]) -> None:
    task = make_task(("mae",))
    reached = probe.reached_parameters(task, make_batches(1)[0])["mae"]
    trained = sum(p.nbytes for name, p in task.named_parameters() if name in reached)
    for reported, counted in pool(2).run(sent_bytes, spread("ddp"), 5):
        assert reported == counted
        assert reported["allreduce"] == pytest.approx(2 * trained / 2, rel=1e-3)  # and the number of terms
    for reported, counted in pool(4).run(sent_bytes, spread("fsdp"), 5):
        assert reported == counted
        # Parameters are padded to a multiple of the processes; weights are gathered for the forward and the backward pass.
        assert trained * 3 / 4 <= reported["reduce_scatter"] < 1.2 * trained
        assert 2 * 5 * trained * 3 / 4 * 0.8 < reported["allgather"]
    (hsdp, _), *_ = pool(4).run(sent_bytes, spread("hsdp", shard_degree=2), 5)
    assert hsdp["allreduce"] == pytest.approx(2 * (trained / 2) / 2, rel=0.2), "each copy's shard, between two copies"


@pytest.mark.parametrize(("kind", "calls"), [("none", 1), ("blocks", 2), ("selective", 2)])
def test_checkpointed_blocks_run_again_in_the_backward_pass(kind: str, calls: int) -> None:
    task = make_task(("infonce",))
    parallel.prepare(task, torch.device("cpu"), "fp32", spread("ddp", kind))
    norms = [0]
    block = task.model.text.transformer["resblocks"][0]  # type: ignore[union-attr]
    block.ln_1.register_forward_hook(lambda *_: norms.__setitem__(0, norms[0] + 1))
    forward_backward(task, task, make_batches(1), {"infonce": 1.0})
    assert norms == [calls]


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_blocks_with_batch_norm_are_not_run_twice(kind: str) -> None:
    task = make_task(("infonce",))
    task.model.text.transformer["resblocks"][1].ln_2 = torch.nn.BatchNorm1d(16)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=rf"^parallel\.activation_checkpointing is {kind}, but \w+ has BatchNorm"):
        parallel.prepare(task, torch.device("cpu"), "fp32", spread("ddp", kind))


def test_what_is_kept_is_not_overwritten_by_an_activation_in_place() -> None:
    gradients = []
    for kind in ("none", "selective"):
        task = make_task(("infonce",))
        for block in task.model.text.transformer["resblocks"]:  # type: ignore[union-attr]
            block.mlp.gelu = torch.nn.ReLU(inplace=True)
        parallel.prepare(task, torch.device("cpu"), "fp32", spread("ddp", kind))
        forward_backward(task, task, make_batches(1), {"infonce": 1.0})
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_passes_that_share_blocks_are_recomputed_alike_under_autocast(kind: str) -> None:
    names, gradients = ("infonce", "mae"), []
    for each in ("none", kind):
        task = make_task(names).float()
        parallel.prepare(task, torch.device("cpu"), Precision.bf16, spread("ddp", each))
        weights = dict.fromkeys(names, 1.0)
        batches = [task.counted(batch, weights) for batch in make_batches(2)]
        forward_backward(task, task, batches, weights, autocast(torch.device("cpu"), Precision.bf16))
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02)  # gradients of several passes are summed in float32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "blocks"])
def test_compiled_blocks_give_the_same_losses(kind: str) -> None:
    compiled = spread("ddp", kind, compile=True)
    assert_same(train(MIXES["clip"], compiled, 2, 4), train(MIXES["clip"], spread(), 2, 4))


@pytest.mark.slow
def test_compiled_blocks_of_two_processes_give_the_same_losses(pool: Callable[[int], Pool]) -> None:
    expected = train(MIXES["clip"], spread(), 1, 4)
    for found in pool(2).run(train, MIXES["clip"], spread("fsdp", compile=True), 1, 4):
        assert_same(found, expected)


@pytest.mark.slow
def test_captions_of_other_lengths_are_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once every size has been seen to vary; what the graphs are made into does not matter here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    task = make_task(("infonce",))
    torch._dynamo.reset()
    counters.clear()
    parallel.prepare(task, torch.device("cpu"), "fp32", spread(compile=True))
    graphs = []
    for seed in range(12):
        rows = torch.randperm(BATCH_SIZE, generator=torch.Generator().manual_seed(seed))
        samples = make_samples(rows[: 10 + seed % 3])
        forward_backward(task, task, [Batch({"pairs": samples})], {"infonce": 1.0})
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[6:] == graphs[6:7] * 6, graphs


def test_fsdp_in_bf16_gives_the_losses_of_ddp(pool: Callable[[int], Pool]) -> None:
    ddp, fsdp = (pool(2).run(bf16_losses, spread(strategy))[0] for strategy in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, rel=1e-5)


def test_several_processes_without_a_strategy_are_refused(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).run(refused_strategy):
        assert message == "parallel.strategy is none, but there are 2 processes; expected parallel=ddp, fsdp or hsdp"


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion"])
def test_optimisers_that_train_sharded_weights_are_let_pass(pool: Callable[[int], Pool], name: str) -> None:
    assert pool(2).run(refused_optimizer, name) == ["nothing", "nothing"]


@pytest.mark.parametrize(
    ("name", "reason"), [("adafactorbv", "Sharding propagation failed"), ("muon", "its steps on sharded")]
)
def test_optimisers_that_cannot_are_refused_in_one_line(pool: Callable[[int], Pool], name: str, reason: str) -> None:
    for message in pool(2).run(refused_optimizer, name):
        assert f"cannot train sharded weights ({reason}" in message and message.endswith("or optimizer=adamw")
