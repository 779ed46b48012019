"""Transfer of batches from the host to the device."""

import torch

from mmpretrain.batch import Batch


class Transfer:
    """Copy batches to `device`, on CUDA in a separate stream.

    The copy of one step's batches from page-locked memory overlaps with the computation of the previous step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device. Later work of the current stream waits for the copy, but the host does not."""
        if self._copying is None:
            return batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            there = batch.to(self._device)
        computing.wait_stream(self._copying)
        # Otherwise the allocator could reuse the memory for the next copy while this batch is still being read.
        there.record_stream(computing)
        return there
