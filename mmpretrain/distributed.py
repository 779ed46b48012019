"""Ranks and collectives: the only module that communicates with other processes.

Without torchrun there is one process, and collectives are no-ops.
"""

import faulthandler
import os
import re
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

Result = TypeVar("Result")

# gloo and c10d have no error class for a lost peer; it is recognised by the message.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|pair closure|timed out (after|waiting)|socket timeout", re.IGNORECASE
)
# all_gather_into_tensor is called all_gather_single in later releases of torch.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ALIVE = "mmpretrain/alive/"
_ANSWER_SECONDS, _LATE_ANSWER_SECONDS = 5.0, 0.1
_START, _WELCOME_SECONDS = "mmpretrain/start", 1.0
_timeouts: list[float] = []  # the timeout of a collective, last
_restarts: deque[float] = deque(maxlen=4)  # times of the last calls of `restart_watchdog`, in seconds
_broken: list[bool] = []  # non-empty after a collective has failed


def setup(device: torch.device, timeout_seconds: float = 600.0) -> None:
    """Initialise the process group from torchrun's environment variables: nccl on CUDA, gloo elsewhere.

    Args:
        device: device of the training.
        timeout_seconds: timeout of a collective.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_seconds)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
            dist.init_process_group(
                backend,
                timeout=timeout,
                store=_own_store(store, rank, world_size, timeout_seconds),
                rank=rank,
                world_size=world_size,
            )
        else:
            dist.init_process_group(backend, timeout=timeout)
        _timeouts.append(timeout_seconds)


def _own_store(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> dist.Store:
    """Return the part of torchrun's store that belongs to this start of the group. A collective.

    torchrun keeps its store when it restarts the group, with the keys of processes that have ended: their addresses would be
    taken for those of the new ones. The counts of restarts are no name of a start, since each agent has its own.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set(_START, name)
        for other in range(1, world_size):
            number = store.get(f"{name}/{other}").decode()  # waits for it
            store.set(f"{name}/{number}", "welcome")
        return dist.PrefixStore(name, store)
    number, deadline = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    while True:
        name = store.get(_START).decode()  # may be that of an earlier start, in which nobody answers
        store.set(f"{name}/{rank}", number)
        try:
            store.wait([f"{name}/{number}"], timedelta(seconds=_WELCOME_SECONDS))
            return dist.PrefixStore(name, store)
        except dist.DistError:
            if time.monotonic() > deadline:
                raise


def restart_watchdog() -> None:
    """Write the stacks of this process to stderr if the next call comes later than the timeout of a collective.

    A run calls it at its start and in every step. When a rank hangs, the collectives of the
    others, which begin within a step, fail first, and that ends their watchdogs: only the hanging rank writes its stacks,
    even if it hangs in C code. The usual time of a step is therefore added.
    """
    if dist.is_initialized():
        _restarts.append(time.monotonic())
        usual = (
            statistics.median(after - before for before, after in pairwise(_restarts)) if len(_restarts) > 1 else 0.0
        )
        faulthandler.dump_traceback_later(_timeouts[-1] + usual + _ANSWER_SECONDS / 2, file=2)


def stop_watchdog() -> None:
    """End the watchdog of `restart_watchdog`: what follows may take longer than the timeout of a collective."""
    _restarts.clear()
    faulthandler.cancel_dump_traceback_later()


def within_timeout(seconds: float) -> float:
    """Return at most .9 of the timeout of a collective: a rank that waits so long can say why before the others fail."""
    return min(seconds, 0.9 * _timeouts[-1]) if dist.is_initialized() and world_size() > 1 else seconds


def shut_down() -> None:
    """Destroy the process group, unless a collective has failed: it would then wait for the lost processes."""
    stop_watchdog()
    if dist.is_initialized() and not _broken:
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Return True if the error is that of a collective: another process was killed, or did not answer in time."""
    if not dist.is_initialized():
        return isinstance(error, dist.DistError)
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_LOST.search(str(error))))


def reason_of(error: BaseException) -> str:
    """Return the reason in a collective's error message: the first sentence, without the source location."""
    first = re.sub(r"^\[\S+:\d+\]\s*", "", str(error).strip().splitlines()[0])
    return re.split(r"\.\s", first)[0].rstrip(". ")


def absent_ranks() -> list[int]:
    """Return the ranks that do not answer after a collective has failed. Every process that is alive calls it once.

    Rank 0 hosts the store through which the processes answer. If it does not respond, the result is [0].
    """
    stop_watchdog()
    if not dist.is_initialized():
        return []
    _broken.append(True)
    store = dist.distributed_c10d._get_default_store()
    absent: list[int] = []

    def ask() -> None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        store.set(f"{_ALIVE}{rank()}", "alive")
        for other in range(world_size()):
            try:
                seconds = max(deadline - time.monotonic(), _LATE_ANSWER_SECONDS)
                store.wait([f"{_ALIVE}{other}"], timedelta(seconds=seconds))
            except dist.DistError:
                absent.append(other)

    # Run in a thread, since requests to a store whose host is stopped have no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _ANSWER_SECONDS + 2 * _LATE_ANSWER_SECONDS * world_size())
    return [0] if thread.is_alive() or rank() in absent else sorted(absent)


def local_rank() -> int:
    """Return the rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return True on rank 0, the process that writes files."""
    return rank() == 0


def share(count: int) -> slice:
    """Return this rank's contiguous share of `count` items."""
    bounds = np.linspace(0, count, world_size() + 1).astype(int)
    return slice(int(bounds[rank()]), int(bounds[rank() + 1]))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows [b, ...] of all ranks into [world * b, ...], in the order of ranks, without gradients.

    The shape must be the same on all ranks.
    """
    rows = rows.detach().contiguous()
    if not dist.is_initialized():
        return rows
    gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    _all_gather(gathered, rows)
    return gathered


def gather_ragged_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows [b_r, ...] of all ranks r into [sum b_r, ...], in the order of ranks; b_r may differ."""
    if not dist.is_initialized():
        return rows
    counts: list[int] = gather_objects(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = gather_rows(padded).unflatten(0, (world_size(), max(counts)))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def background_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    """Return a new group of all processes, for collectives on the CPU beside those of the training. A collective.

    Args:
        timeout_seconds: timeout of a collective.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup)  # every process is a member
    return group


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather the values of all ranks, in the order of ranks. Values are pickled: use it only for the program's own."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's value on all ranks."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group)
    return values[0]


def from_main(fn: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `fn` on rank 0 and return its result on all ranks. A collective.

    Args:
        fn: function to call.
        group: group of all processes; None: the default group.

    Raises: the ValueError or OSError of `fn`, on all ranks.
    """
    value, error = None, None
    if is_main():
        try:
            value = fn()
        except (ValueError, OSError) as refusal:
            error = refusal
    value, error = broadcast_object((value, error), group)
    if error is not None:
        raise error
    return value


def once_per_machine(make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Call `make` on the first process of each machine, and return its CPU tensors on all, in memory that they share.

    A collective. The tensors must not be written to.

    Raises: the ValueError or OSError of `make`, on all ranks.
    """
    if not dist.is_initialized() or local_world_size() == 1:
        return make()
    place, error, memory = "", None, None
    if local_rank() == 0:
        try:
            memory = os.memfd_create("mmpretrain")  # freed with the last process that maps it, however that ends
            place = f"/proc/{os.getpid()}/fd/{memory}"
            with os.fdopen(memory, "wb", closefd=False) as file:
                file.write(save(dict(make())))
        except (ValueError, OSError) as refusal:
            error = refusal
    answers = gather_objects((place, error))
    refusals = [refusal for _, refusal in answers if refusal is not None]
    tensors = {} if refusals else load_file(answers[rank() - local_rank()][0])
    gather_objects(None)  # all have mapped it
    if memory is not None:
        os.close(memory)
    if refusals:
        raise refusals[0]
    return tensors


def full(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded. A collective if it is sharded over the ranks (FSDP2)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, other: Tensor | None) -> Tensor:
    """Shard a tensor like `other` and return this rank's DTensor.

    The tensor is returned unchanged if `other` is not sharded or has another shape.
    """
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    # Every rank has the full tensor: nothing is communicated.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class LateFlags:
    """Maximum of numbers over all ranks, read one step after they were posted, so that the device does not stall."""

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._work: dist.Work | None = None
        self._copied: torch.cuda.Event | None = None

    def post(self, flags: Mapping[str, Tensor]) -> None:
        """Start the reduction of this step's flags: float or bool scalars on the training device."""
        self._names = list(flags)
        values = torch.stack([flag.float() for flag in flags.values()])
        self._work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None
        self._flags = values
        if values.is_cuda:
            if self._work is not None:
                self._work.wait()  # on CUDA this blocks the stream, not the host
                self._work = None
            self._flags = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """Return the flags posted last, reduced, by name. The result is empty if none were posted since the last read."""
        if self._flags is None:
            return {}
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self._names, self._flags.tolist(), strict=True))
        self._flags, self._work, self._copied = None, None, None
        return values
