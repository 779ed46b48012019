"""Sharded checkpoints; functions for the pool."""

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmpretrain import distributed
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.background import BackgroundWriter

STATE: Mapping[str, Any] = {"step": 1, "samples": 16, "fingerprint": {}, "optimizer": {}}


def values() -> dict[str, Tensor]:
    """Whole tensors: of more and fewer rows than ranks, of rows that cannot be split evenly, a scalar, integers, bf16."""
    return {
        "many": torch.arange(66.0, dtype=torch.float64).view(11, 2, 3),
        "one": torch.arange(4.0).view(1, 4),
        "half": torch.linspace(0, 1, 8).bfloat16(),
        "step": torch.tensor(7.0),
        "counts": torch.arange(5),
    }


def sharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point tensors by rows over all ranks; scalars and integers as they are."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        if tensor.is_floating_point() and tensor.ndim
        else tensor
        for name, tensor in tensors.items()
    }


def save(folder: Path, step: int = 1) -> None:
    """A sharded checkpoint of `values`, and of an optimiser without tensors."""
    tensors = {"model": sharded(values()), "optimizer": {}}
    store.save_sharded(folder, step, tensors, {**STATE, "step": step}, keep_last=0)


def load(path: Path) -> dict[str, Tensor]:
    """The checkpoint's model, read in shards and put together again."""
    found = store.load_tensors(path, "model", sharded(values()).get)
    assert all(
        isinstance(tensor, type(like)) for tensor, like in zip(found.values(), map(sharded(values()).get, found))
    )
    return {name: distributed.full(tensor) for name, tensor in found.items()}


def save_on_a_full_disk(folder: Path, full_rank: int) -> str:
    """What a rank is told if one of them may write files of 100 bytes alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        save(folder, 2)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "nothing"


def save_beside_training(folder: Path) -> tuple[bool, bool, bool]:
    """Write in the background while weights change; rank 1 begins late.

    Returns: whether rank 0's checkpoint was there before rank 1 began, and after the end, and has the weights it began with.
    """
    writer = BackgroundWriter(60.0)
    tensors = sharded(values())

    def start() -> None:
        writer.start(folder, 1, {"model": tensors, "optimizer": {}}, STATE, 0)
        for tensor in tensors.values():
            tensor.zero_()

    if distributed.rank() == 0:
        start()
    distributed.all_reduce_sum(torch.ones(3))  # the training of both goes on
    was_there = writer.saved_step == 1 or store.path_of(folder, 1).exists()
    distributed.gather_objects(None)
    if distributed.rank() == 1:
        start()
    writer.finish()
    found = store.load_tensors(store.path_of(folder, 1), "model")
    return was_there, writer.saved_step == 1, all(torch.equal(found[name], tensor) for name, tensor in values().items())
