"""How the task is spread over processes, in one place."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmpretrain import distributed
from mmpretrain.batch import Batch
from mmpretrain.step import forward_backward
from mmpretrain.task import Task

# Later releases of torch renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def reached_parameters(task: Task, example: Batch) -> dict[str, frozenset[str]]:
    """The names of the parameters that each objective's gradient reaches.

    A tower that no objective asks for, or a pooling head that none looks at, would otherwise be decayed by the
    optimiser and be waited for by DDP. Found out by a backward pass of each over a small example.
    """
    task.eval()
    reached = {}
    for objective in task.objectives:
        forward_backward(task, task, [example], {name: float(name == objective) for name in task.objectives})
        reached[objective] = frozenset(
            name for name, parameter in task.named_parameters() if parameter.grad is not None
        )
        task.zero_grad()
    task.train()
    return reached


def wrap(task: Task, device: torch.device) -> nn.Module:
    """The task as each rank runs it: DDP over several processes, itself on one.

    Raises: ValueError if the model has BatchNorm and several CPU processes would each normalise by their own part.
    """
    if distributed.world_size() == 1:
        return task
    if task.model.image.has_batch_norm:
        if device.type != "cuda":
            raise ValueError(
                "model.image has BatchNorm, which cannot be synchronised between CPU processes; "
                "run one process, or choose an encoder without it"
            )
        task = nn.SyncBatchNorm.convert_sync_batchnorm(task)
    # Every trained parameter is reached in every step (`freeze.Freeze`), so nothing has to be searched for.
    device_ids = [device.index] if device.type == "cuda" else None
    sync_buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
    return DistributedDataParallel(task, device_ids=device_ids, **sync_buffers)
