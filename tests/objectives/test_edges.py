"""Every objective stays finite where there is nothing to do: nothing hidden, nothing but padding, a batch of one."""

from dataclasses import replace

import pytest
import torch

from mmpretrain.batch import Batch, Samples
from mmpretrain.training.step import forward_backward
from tests.distributed.steps import make_batches, make_task
from tests.distributed.test_step import MIXES


def batch_of(num_samples: int, length: int | None = None) -> Batch:
    """The first samples of the fixed batch; with `length` their texts are as short."""

    def of(samples: Samples) -> Samples:
        some = samples.rows(torch.arange(num_samples))
        assert some.text is not None and some.lengths is not None
        return some if length is None else replace(some, lengths=torch.full_like(some.lengths, length))

    (batch,) = make_batches(1)
    return replace(batch, streams={name: of(samples) for name, samples in batch.streams.items()})


@pytest.mark.parametrize("objectives", MIXES, ids="+".join)
@pytest.mark.parametrize(("num_samples", "length"), [(1, None), (1, 2), (3, 2), (2, 1)])
def test_losses_and_gradients_are_finite(objectives: tuple[str, ...], num_samples: int, length: int | None) -> None:
    """Texts of two tokens are start and end, which are never hidden; of one, there is nothing to predict."""
    task = make_task(objectives)
    losses = forward_backward(task, task, [batch_of(num_samples, length)], dict.fromkeys(objectives, 1.0))
    reduced = losses.reduced()
    assert set(reduced) == set(objectives)
    assert all(bool(value.isfinite()) for means in reduced.values() for value in means.values())
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
    if length is not None and objectives == ("mlm",):
        assert float(reduced["mlm"]["loss"]) == 0 and not any(bool(gradient.any()) for gradient in gradients)
