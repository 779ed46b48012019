"""Batches from the host to the device."""

import torch

from mmpretrain.batch import Batch


class Transfer:
    """Copies batches to `device`, on CUDA in a stream of its own.

    The host runs ahead of a GPU: the bytes of one step travel from page-locked memory while it computes the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The same batch on the device; what is computed from now on waits for it, and the host does not."""
        if self._copying is None:
            return batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            there = batch.to(self._device)
        computing.wait_stream(self._copying)
        # Or the allocator would give the memory to the next copy while this batch is still being read.
        there.record_stream(computing)
        return there
