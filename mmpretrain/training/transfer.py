"""Transfer of batches from the host to the device."""

from collections.abc import Callable
from functools import partial

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
        return self.start(batch)()

    def start(self, batch: Batch) -> Callable[[], Batch]:
        """Start to copy a batch.

        Returns: function that returns the batch on the device. From its call on, work of the current stream waits for the
            copy; what was enqueued before runs beside it.
        """
        if self._copying is None:
            return partial(batch.to, self._device)
        with torch.cuda.stream(self._copying):
            there = batch.to(self._device)
        copied = self._copying.record_event()

        def arrived() -> Batch:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(copied)
            # Otherwise the allocator could reuse the memory for the next copy while this batch is still being read.
            there.record_stream(computing)
            return there

        return arrived
