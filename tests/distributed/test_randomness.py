"""With dropout and drop path a step is the same on any number of ranks and micro-batches, and when it is computed again."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from mmpretrain.training import randomness_watch
from mmpretrain.training.randomness import SampleRandomness
from tests import runs
from tests.distributed.pool import Pool
from tests.distributed.steps import (
    RANDOM,
    BesideBatchNorm,
    Noise,
    NumpyNoise,
    OfTokens,
    OwnNoise,
    Result,
    SharedDropBlock,
    example_batch,
    make_task,
    refused_randomness,
    spread,
    step,
    task_with,
    train,
)
from tests.distributed.test_step import WEIGHTS, assert_same

Pools = Callable[[int], Pool]
BATCH_SIZE = 36  # divides over 1 to 4 ranks and 1 and 3 micro-batches
OBJECTIVES = [
    ("infonce",),
    ("sigmoid",),
    ("multi_positive",),
    ("mae",),
    ("mlm",),
    ("causal_lm",),
    ("captioning",),
    ("coca",),
    ("cappa",),
    ("simclr",),
    ("flip",),
    ("flip_block",),
    ("infonce", "mae"),
    ("flip", "mae_images", "mlm_texts"),
    ("infonce", "mae", "mlm"),
    ("infonce", "simclr", "sigmoid"),
    ("infonce", "coca", "causal_lm"),
]


@cache
def on_one_process(objectives: tuple[str, ...]) -> Result:
    return step(objectives, 1, WEIGHTS, True, BATCH_SIZE)


@pytest.mark.parametrize("objectives", OBJECTIVES, ids="+".join)
def test_dropout_does_something_and_micro_batches_do_nothing(objectives: tuple[str, ...]) -> None:
    assert_same(step(objectives, 3, WEIGHTS, True, BATCH_SIZE), on_one_process(objectives))
    without = step(objectives, 1, WEIGHTS, False, BATCH_SIZE)[0]
    for name, loss in on_one_process(objectives)[0].items():
        assert loss != pytest.approx(without[name], rel=1e-4), name


@pytest.mark.parametrize("objectives", OBJECTIVES, ids="+".join)
@pytest.mark.parametrize(
    ("world_size", "num_micro_batches"),
    [
        (2, 3),
        (3, 1),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 1), (3, 3), (4, 1), (4, 3))),
    ],
)
def test_several_ranks_draw_what_one_does(
    pool: Pools, objectives: tuple[str, ...], world_size: int, num_micro_batches: int
) -> None:
    for result in pool(world_size).run(step, objectives, num_micro_batches, WEIGHTS, True, BATCH_SIZE):
        assert_same(result, on_one_process(objectives))


@pytest.mark.parametrize("kind", ["blocks", "selective"])
@pytest.mark.parametrize("objectives", [("infonce", "mae"), ("infonce", "coca", "causal_lm")], ids="+".join)
def test_blocks_that_are_computed_again_draw_what_they_drew(objectives: tuple[str, ...], kind: str) -> None:
    for num_micro_batches in (1, 3):
        found = step(objectives, num_micro_batches, WEIGHTS, True, BATCH_SIZE, spread("ddp", kind))
        assert_same(found, on_one_process(objectives))


def test_sharded_blocks_that_are_computed_again_draw_what_one_process_does(pool: Pools) -> None:
    for found in pool(2).run(step, ("infonce", "mae"), 3, WEIGHTS, True, BATCH_SIZE, spread("fsdp", "blocks")):
        assert_same(found, on_one_process(("infonce", "mae")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "blocks"])
def test_compiled_blocks_draw_what_eager_ones_do(kind: str) -> None:
    found = step(("infonce",), 3, WEIGHTS, True, BATCH_SIZE, spread("ddp", kind, compile=True))
    assert_same(found, on_one_process(("infonce",)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_compiled_blocks_without_dropout_are_computed_again(kind: str) -> None:
    found = step(("infonce",), 1, WEIGHTS, False, BATCH_SIZE, spread("ddp", kind, compile=True))
    assert_same(found, step(("infonce",), 1, WEIGHTS, False, BATCH_SIZE))


def test_what_cannot_be_compiled_and_computed_again_is_refused() -> None:
    with pytest.raises(ValueError, match="random layers, which the two together cannot recompute; use parallel"):
        step(("infonce",), 1, WEIGHTS, True, BATCH_SIZE, spread("ddp", "selective", compile=True))


def test_a_run_goes_on_with_other_micro_batches(tmp_path: Path, pool: Pools) -> None:
    mix = ("infonce", "mae_images", "mlm_texts")
    whole = train(mix, spread(), 1, 6, random=True)
    train(mix, spread(), 1, 3, save=tmp_path, random=True)
    (saved,) = tmp_path.glob("step_*")
    alone = train(mix, spread(), 4, 3, saved, random=True)
    both = pool(2).run(train, mix, spread(), 2, 3, saved, None, 0, True)
    for found in (alone, *both):
        for ours, theirs in zip(found[:3], whole[3:6], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)


def test_whole_commands_with_dropout_train_alike_in_micro_batches(pairs: Path, tmp_path: Path) -> None:
    losses = []
    for number, size in enumerate(("null", "4")):
        folder = tmp_path / str(number)
        folder.mkdir()
        finished = runs.train(
            folder, f"data.root={pairs}", "trainer.duration=3steps", f"trainer.micro_batch_size={size}", "eval=[]",
            "+model.image.args.drop_path_rate=0.5", "+model.text.dropout=0.2",
        )  # fmt: skip
        assert finished.code == 0, finished.stderr
        losses.append([record["train/loss"] for record in runs.records(folder / "run")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---------------------------------------------------------------- what does not draw by sample


@pytest.mark.parametrize("layer", [Noise, NumpyNoise, OwnNoise, SharedDropBlock, BesideBatchNorm, OfTokens])
def test_layers_that_cannot_draw_by_sample_are_named(
    layer: type[nn.Module], pool: Pools, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.image.trunk.blocks.0.mlp.drop2" if layer is not OwnNoise else "parts of the model"
    with pytest.raises(ValueError, match=rf"^{name}.* and micro-batches .3.; set"):
        randomness_watch.settle_randomness(task_with(layer()), example_batch(), 3)
    assert all(name in told for told in pool(2).run(refused_randomness, layer))
    task = task_with(layer())
    randomness_watch.settle_randomness(task, example_batch(), 1)
    assert name in caplog.text and len(caplog.records) == 1
    with task.randomness() as random:  # type: ignore[misc]
        assert not random.strict
    assert all(p.grad is None for p in task.parameters())


class BatchMean(nn.Module):
    """Statistics over the batch, and no random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5 * x.mean(dim=0)


def test_a_layer_that_mixes_samples_is_refused_with_several_micro_batches() -> None:
    task = make_task(("infonce", "mae"))
    task.model.image.trunk.add_module("norm", BatchMean())  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"^the loss of a sample depends on the others of its micro-batch.*batches \(3\)"
    ):
        randomness_watch.settle_randomness(task, example_batch(), 3)
    randomness_watch.settle_randomness(task, example_batch(), 1)
    assert task.randomness is None and all(p.grad is None for p in task.parameters())


def test_a_task_that_draws_nothing_is_run_without_the_mode() -> None:
    task = make_task(("infonce", "mae", "mlm"))
    randomness_watch.settle_randomness(task, example_batch(), 3)
    assert task.randomness is None
    task = make_task(("infonce", "mae"), 0.1, **RANDOM)
    randomness_watch.settle_randomness(task, example_batch(), 3)
    assert isinstance(task.randomness(), SampleRandomness) and task.randomness().strict  # type: ignore[misc]
