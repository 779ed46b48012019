"""A pool of real gloo processes, started once and shared by all tests that need several ranks."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests import runs


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    """One rank: join the group, then run what it is sent until it is killed."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environment = {**ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    from mmpretrain import distributed

    distributed.setup(torch.device("cpu"))
    while True:
        fn, arguments = connection.recv()
        try:
            connection.send((True, fn(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Pool:
    """Ranks that wait for work; `run` calls a module-level function on each and returns what rank by rank came back."""

    def __init__(self, world_size: int) -> None:
        port = _free_port()
        self._connections = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            self._processes.append(runs.start(_serve, rank, world_size, port, theirs, daemon=True))
            self._connections.append(ours)

    def run(self, fn: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((fn, arguments))
        answers = [connection.recv() for connection in self._connections]
        for rank, (succeeded, value) in enumerate(answers):
            assert succeeded, f"rank {rank}:\n{value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
