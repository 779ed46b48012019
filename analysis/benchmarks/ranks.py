"""Run a function on several local processes, which form a process group like those of torchrun."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from mmpretrain import distributed


def on_ranks(world_size: int, device: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    """Run `fn(*arguments)` on `world_size` processes, and return the result of rank 0: plain values or arrays.

    Processes divide the cores; on CUDA each has its own GPU.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = mp.get_context("forkserver")
    server.set_forkserver_preload(
        ["mmpretrain.training.task", "mmpretrain.training.parallel", "analysis.benchmarks.step"]
    )
    results = server.SimpleQueue()
    threads = max(1, torch.get_num_threads() // world_size)
    context = mp.start_processes(
        _rank,
        (world_size, port, threads, device, fn, arguments, results),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    while results.empty():  # raises if a rank has failed
        context.join(timeout=0.1)
    value = results.get()
    while not context.join():
        pass
    return value


def _rank(
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    device: str,
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.setup(torch.device(device))
    value = fn(*arguments)
    if rank == 0:
        results.put(value)
    distributed.shut_down()
