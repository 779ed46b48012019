"""Ranks and collectives: the only file that speaks to other processes. Without torchrun, one process and no-ops."""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Result = TypeVar("Result")

# gloo and c10d have no error class for it.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|pair closure|timed out (after|waiting)|socket timeout", re.IGNORECASE
)
# Later releases of torch renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ALIVE = "mmpretrain/alive/"
_ANSWER_SECONDS, _LATE_ANSWER_SECONDS = 5.0, 0.1
_broken: list[bool] = []  # not empty once a collective failed


def setup(device: torch.device, timeout_seconds: float = 600.0) -> None:
    """Join the group that torchrun's environment describes: nccl on CUDA, gloo elsewhere.

    `timeout_seconds`: how long a collective waits for the slowest process.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))


def shut_down() -> None:
    """Leave the group, unless it is broken: what is lost would be waited for."""
    if dist.is_initialized() and not _broken:
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is a collective's: another process was killed, or did not answer in time."""
    if not dist.is_initialized():
        return isinstance(error, dist.DistError)
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_LOST.search(str(error))))


def reason_of(error: BaseException) -> str:
    """What a collective's error says: of its first line the first sentence, without the place in the library's source."""
    first = re.sub(r"^\[\S+:\d+\]\s*", "", str(error).strip().splitlines()[0])
    return re.split(r"\.\s", first)[0].rstrip(". ")


def absent_ranks() -> list[int]:
    """The processes that do not answer, after a collective failed. Called by each process that is alive, once."""
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

    # In a thread: a store whose host is stopped is waited for without a limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _ANSWER_SECONDS + 2 * _LATE_ANSWER_SECONDS * world_size())
    return [0] if thread.is_alive() or rank() in absent else sorted(absent)


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum of every process's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """[b, ...] of each process, all of one shape -> [world * b, ...] in the order of ranks, without gradients."""
    rows = rows.detach().contiguous()
    if not dist.is_initialized():
        return rows
    gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    _all_gather(gathered, rows)
    return gathered


def gather_ragged_rows(rows: Tensor) -> Tensor:
    """[b_r, ...] of process r -> [sum b_r, ...] in the order of ranks, on every process; b_r may differ."""
    if not dist.is_initialized():
        return rows
    counts: list[int] = gather_objects(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = gather_rows(padded).unflatten(0, (world_size(), max(counts)))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in the order of ranks, on every process. Only for values this program made itself."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Process 0's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_main(fn: Callable[[], Result]) -> Result:
    """What `fn` gives on process 0, on every process; what it refuses there is refused everywhere. A collective.

    Raises: the ValueError or OSError of `fn`.
    """
    value, error = None, None
    if is_main():
        try:
            value = fn()
        except (ValueError, OSError) as refusal:
            error = refusal
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return value


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over the processes (FSDP2), whole on each. A collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whole, on process 0 alone; empty elsewhere. A collective where they are spread."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = full(tensor)
        if is_main():  # one at a time, and on the host: the device need not hold them all at once
            whole[name] = gathered.cpu() if isinstance(tensor, DTensor) else gathered
    return whole


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `other`, of the same shape, is spread; else the tensor itself."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    # Every process has the whole of it: nothing is sent.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


class LateFlags:
    """Numbers whose maximum over ranks is known one step after they were posted, without holding up the device."""

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._work: dist.Work | None = None
        self._copied: torch.cuda.Event | None = None

    def post(self, flags: Mapping[str, Tensor]) -> None:
        """Send this step's flags: scalars on the training device, float or bool."""
        self._names = list(flags)
        values = torch.stack([flag.float() for flag in flags.values()])
        self._work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None
        self._flags = values
        if values.is_cuda:
            if self._work is not None:
                self._work.wait()  # on CUDA this makes the stream wait, not the host
                self._work = None
            self._flags = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """The flags posted last, by name; empty before the first."""
        if self._flags is None:
            return {}
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        values = dict(zip(self._names, self._flags.tolist(), strict=True))
        self._flags, self._work, self._copied = None, None, None
        return values
