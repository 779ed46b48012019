"""Files of tensors: a .safetensors file, or a folder of them to which every process writes its shards. None holds a pickle.

model.safetensors                                     whole tensors
model/shard-00001-model-00001-of-00001.safetensors    rows that rank 0 holds, and where they belong
      shard-00002-model-00001-of-00001.safetensors    rows that rank 1 holds, and so on

Shards are written and read by torch.distributed.checkpoint. Any number of processes can read them.
"""

import errno
import os
import re
import warnings
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    CheckpointException,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from mmpretrain import distributed

SUFFIX = ".safetensors"
# Errors of the libraries on files that others wrote. KeyError: a dtype that torch does not have.
_UNREADABLE = (
    SafetensorError, CheckpointException, ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError,
    RuntimeError,
)  # fmt: skip


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file with the default permissions of new files. Raises: OSError if it cannot be written."""
    path.touch()  # gets the default permissions; the library replaces it by a file that only its owner may read
    mode = path.stat().st_mode
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # raised when the disk is full, for example
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)


def save_sharded(tensors: Mapping[str, Tensor], path: Path, group: dist.ProcessGroup | None = None) -> list[Path]:
    """Write this rank's shards of tensors to a file in the folder `path`. A collective.

    If no tensor is a DTensor, rank 0 writes `path` with `.safetensors` instead.

    Args:
        tensors: tensors on the CPU by name; those that are no DTensors are the same on all ranks.
        path: folder to be made, which all ranks see.
        group: group of all processes, whose backend works on the CPU; None: the default group.

    Returns: the files that this rank has written.
    Raises: OSError on all ranks if one of them cannot write.
    """
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        file = path.with_suffix(SUFFIX)
        distributed.from_main(lambda: save(tensors, file), group)
        return [file] if distributed.is_main() else []
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # a file per shard, also where shards have copies
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as failed:  # raised on all ranks
        errors = [error for error, _ in failed.failures.values()]
        raise next((error for error in errors if isinstance(error, OSError)), errors[0]) from failed
    return list(path.glob(f"shard-{distributed.rank() + 1:05d}-*{SUFFIX}"))


def load(path: Path, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
    """Load tensors that `save` or `save_sharded` wrote, on the CPU. Whole files are memory-mapped.

    Args:
        path: path of the file without `.safetensors`, or the folder.
        like: function from a tensor's name to the tensor that it will be copied to. Where that is a DTensor of the same
            shape, the result is sharded in the same way, and this rank reads only its own rows.

    Returns: the tensors by name.
    Raises: ValueError if the files do not hold whole tensors; OSError if there are none.
    """
    file = path.with_suffix(SUFFIX)
    try:
        if file.is_file():
            return {name: distributed.spread_like(tensor, like(name)) for name, tensor in load_file(file).items()}
        file = path
        if not all(shard.is_file() for shard in path.iterdir()):  # a pipe would be waited for
            raise ValueError("not all of it are files")
        reader = HuggingFaceStorageReader(str(path))
        described = reader.read_metadata().state_dict_metadata
        tensors = {name: _empty(name, entry, like(name)) for name, entry in described.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} holds no tensors ({reason}); expected it as the run wrote it") from error


def _empty(name: str, entry: TensorStorageMetadata | BytesStorageMetadata, like: Tensor | None) -> Tensor:
    """Return an uninitialised tensor to read into. Raises: ValueError if the chunks are not the rows of one tensor."""
    assert isinstance(entry, TensorStorageMetadata)  # .safetensors files hold nothing else
    if entry.size:
        rows = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in entry.chunks)
        starts = accumulate((count for _, count in rows[:-1]), initial=0)
        if [start for start, _ in rows] != [*starts] or any(
            chunk.sizes[1:] != entry.size[1:] for chunk in entry.chunks
        ):
            raise ValueError(f"rows of {name} are missing or occur twice")
    if isinstance(like, DTensor) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
