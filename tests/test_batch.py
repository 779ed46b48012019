"""A batch moves as a whole."""

import pytest
import torch

from mmpretrain.batch import Batch, Refused, Samples


def make_batch() -> Batch:
    numbers = torch.arange(3)
    pairs = Samples(
        positions=numbers,
        ids=numbers,
        seeds=numbers,
        images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8),
        text=torch.ones(3, 8, dtype=torch.int64),
        lengths=torch.tensor([3, 4, 5]),
        cuts=(8,),
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
    assert moved.streams["pairs"].cuts == (8,) and moved.streams["images"].cuts == ()
    assert moved.seed == 5 and moved.refused == batch.refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_tensor_is_pinned() -> None:
    pinned = make_batch().pin_memory()
    for samples in pinned.streams.values():
        tensors = [value for value in vars(samples).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 4 and all(tensor.is_pinned() for tensor in tensors)
    assert pinned.seed == 5 and pinned.streams["pairs"].cuts == (8,)
