"""Steps on fake CUDA tensors and a fake process group. Where there is no GPU, the library of cuda_stub.c is to be preloaded.

Fake tensors have a shape, a type and a device, and no values. Nothing is computed, and nothing is sent.
"""

import copy
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmpretrain.batch import Batch
from mmpretrain.training import parallel
from mmpretrain.training.task import Task

CUDA = torch.device("cuda", 0)

_SOURCE = Path(__file__).with_name("cuda_stub.c")


def cuda_runtime() -> Path | None:
    """Return the CUDA runtime library that this PyTorch has loaded; None if it was built without CUDA."""
    torch.cuda.is_available()
    maps = Path("/proc/self/maps").read_text()
    return next((Path(path) for path in re.findall(r"\S+/libcudart[^\s/]*\.so\S*", maps)), None)


def build(folder: Path, runtime: Path) -> Path:
    """Compile the library in a folder, with every function of the runtime that cuda_stub.c does not have."""
    source = _SOURCE.read_text()
    listed = subprocess.run(["nm", "-D", "--defined-only", runtime], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r" T (cuda\w+)", listed)) - set(re.findall(r"\b(cuda\w+)\(", source))
    rest = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names))
    # The name under which PyTorch looks for the driver.
    library = folder / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{library.name}", "-o", library, "-ldl"],
        input=source + rest, text=True, check=True,
    )  # fmt: skip
    return library


@contextmanager
def fake_ranks(world_size: int, per_machine: int) -> Iterator[None]:
    """Be rank 0 of a group of processes that sends nothing, on fake tensors; without a group for a `world_size` of 1.

    Args:
        world_size: number of processes.
        per_machine: number of processes of a machine.
    """
    if world_size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    ddp = partial(DistributedDataParallel, init_sync=False)  # otherwise it would read the weights
    try:
        with (
            mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(min(per_machine, world_size))),
            mock.patch.object(parallel, "init_device_mesh", partial(_mesh, parallel.init_device_mesh)),
            mock.patch.object(parallel, "DistributedDataParallel", ddp),
            FakeTensorMode(),
        ):
            yield
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _mesh(make: Any, *arguments: Any, **options: Any) -> Any:
    with unset_fake_temporarily():
        return make(*arguments, **options)


def on_cuda(tensor: Tensor) -> Tensor:
    """Return a fake tensor on CUDA of the same shape and type. Call it inside of `fake_ranks`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def fake_task(task: Task) -> Task:
    """Copy a task with fake parameters and buffers on CUDA. Call it inside of `fake_ranks`."""
    parameters = {id(p): nn.Parameter(on_cuda(p), p.requires_grad) for p in task.parameters()}
    return copy.deepcopy(task, {**parameters, **{id(buffer): on_cuda(buffer) for buffer in task.buffers()}})


def fake_batch(batch: Batch) -> Batch:
    """Copy a micro-batch with fake tensors on the host, for `Transfer`. Call it inside of `fake_ranks`."""
    samples = {name: each.map(lambda x: torch.empty(x.shape, dtype=x.dtype)) for name, each in batch.streams.items()}
    return replace(batch, streams=samples)


def wrap(task: Task) -> nn.Module:
    """Wrap a prepared task as `parallel.wrap` does. DDP can take one step: before the second it would read its buckets."""
    wrapped = parallel.wrap(task, CUDA)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, _reduce)
    return wrapped


def _reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce gradients as DDP does; the fake group's own future has no result."""
    dist.all_reduce(bucket.buffer())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
