"""Sharded checkpoints that are written while the training goes on."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpretrain import distributed
from mmpretrain.checkpoints import store

_WAIT_SECONDS = 1800.0


class BackgroundWriter:
    """Writes sharded checkpoints in a thread of each process, one at a time. The threads communicate in their own group.

    Creating it is a collective.

    Args:
        timeout_seconds: timeout of the training's collectives. The threads wait for each other for half an hour at least,
            since one of them may write longer than the others.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.saved_step = 0
        """Step of the last checkpoint that is complete."""
        self._group = distributed.background_group(max(timeout_seconds, _WAIT_SECONDS))
        self._writing: Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is written."""
        return self._writing is not None and not self._writing.done()

    def start(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        keep_last: int,
    ) -> None:
        """Copy this rank's tensors to the host, and start to write a checkpoint (see `store.save_sharded`).

        Every rank calls it, after `finish`.
        """
        assert self._writing is None
        copies = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for part, named in tensors.items()
        }
        writing: Future[None] = Future()

        def write() -> None:
            try:
                store.save_sharded(folder, step, copies, state, keep_last, self._group)
                self.saved_step = step
                writing.set_result(None)
            except BaseException as error:  # raised by `finish`
                writing.set_exception(error)

        self._writing = writing
        threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True).start()

    def finish(self) -> None:
        """Wait until the checkpoint is written. Raises: OSError on all ranks if one of them cannot write."""
        if self._writing is not None:
            try:
                self._writing.result()
            finally:
                self._writing = None
