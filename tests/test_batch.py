"""A batch moves as a whole."""

import pytest
import torch

from mmpretrain.batch import Batch, Packing, Refused, Samples


def make_batch() -> Batch:
    numbers = torch.arange(3)
    pairs = Samples(
        positions=numbers,
        ids=numbers,
        seeds=numbers,
        images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8),
        text=torch.ones(3, 8, dtype=torch.int64),
        lengths=torch.tensor([3, 4, 5]),
        packing=Packing(torch.tensor([0, 3, 8]), torch.tensor([0, 1, 0]), 2, 8, 2),
    )
    images = Samples(positions=numbers, ids=numbers, seeds=numbers, images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8))
    return Batch({"pairs": pairs, "images": images}, seed=5, refused=(Refused("pairs", "0.tar", "a", "why"),))


def test_every_tensor_moves_and_the_rest_stays() -> None:
    batch = make_batch()
    moved = batch.to(torch.device("meta"))
    for name, samples in moved.streams.items():
        assert len(samples) == 3
        for field in ("positions", "ids", "seeds", "images", "text", "lengths"):
            before, after = getattr(batch.streams[name], field), getattr(samples, field)
            assert (after is None) == (before is None)
            assert after is None or (after.device.type == "meta" and after.shape == before.shape)
    packing = moved.streams["pairs"].packing
    assert packing is not None and packing.slots.device.type == packing.turns.device.type == "meta"
    assert (packing.num_rows, packing.row_length, packing.most) == (2, 8, 2)
    assert moved.streams["images"].packing is None
    assert moved.seed == 5 and moved.refused == batch.refused


@pytest.mark.gpu
def test_every_tensor_is_pinned() -> None:
    pinned = make_batch().pin_memory()
    for samples in pinned.streams.values():
        tensors = [value for value in vars(samples).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 4 and all(tensor.is_pinned() for tensor in tensors)
    packing = pinned.streams["pairs"].packing
    assert pinned.seed == 5 and packing is not None and packing.slots.is_pinned()
