"""Batches reach the device whole."""

import pytest
import torch

from mmpretrain.training.transfer import Transfer
from tests.test_batch import make_batch


@pytest.mark.gpu
def test_batches_arrive_while_the_device_computes() -> None:
    device = torch.device("cuda")
    transfer, weight = Transfer(device), torch.randn(4096, 4096, device=device)
    seen = []
    for _ in range(8):
        weight = weight @ weight / weight.norm()  # the device is behind the host
        there = transfer(make_batch().pin_memory())
        seen.append({name: samples.positions + 1 for name, samples in there.streams.items()})
        del there  # its memory is free for the next copy as soon as nothing reads it
    assert all(torch.equal(positions.cpu(), torch.arange(3) + 1) for each in seen for positions in each.values())
