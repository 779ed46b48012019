"""The real commands at a tiny size, each in a process of its own.

A command is forked from a process that has imported torch already (multiprocessing's forkserver), which saves the
six seconds that importing takes. From there on it is what `python -m` does: module, arguments, environment, streams,
working directory, signals and exit code are the command's own.
"""

import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from mmpretrain.checkpoints import store

NUM_PAIRS = 200
NUM_HELD_OUT = 40
BATCH_SIZE = 16
DEADLINE_SECONDS = 240.0

TINY_MODEL = (
    "model=clip_tiny",
    "model.embed_dim=16",
    "model.image.image_size=32",
    "model.image.args.embed_dim=32",
    "model.image.args.depth=1",
    "model.image.args.num_heads=2",
    "model.text.width=32",
    "model.text.depth=1",
    "model.text.num_heads=2",
    "model.text.context_length=16",
)
TINY_RUN = (
    *TINY_MODEL,
    "run.dir=run",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    f"trainer.batch_size={BATCH_SIZE}",
    "trainer.log_every=1steps",
    "trainer.eval_every=1000epochs",
    "optimizer.lr=1e-3",
    "data.workers=0",
    "eval=[retrieval]",
)
"""A run in the folder `run` of the working directory; `data.root` and `trainer.duration` are still to be given."""

TINY_MAE = ("objective.mae.decoder_width=32", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2")


# ---------------------------------------------------------------------------------------------- data

_COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220), "grey": (128, 128, 128)}
_WORDS = ("circle", "square", "cross", "star", "ring")


def png(seed: int, colour: str) -> bytes:
    """A 32-pixel image that is mostly one colour."""
    noise = np.random.default_rng(seed).integers(-30, 30, (32, 32, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(_COLOURS[colour] + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, first: int, count: int, broken: Sequence[int] = ()) -> None:
    """A tar of pairs numbered from `first`; the images of those in `broken` do not decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0.0) as tar:
        for number in range(first, first + count):
            colour, word = list(_COLOURS)[number % len(_COLOURS)], _WORDS[number % len(_WORDS)]
            # Captions differ in length, so that a micro-batch's are packed.
            caption = f"a {colour} {word} number {number}" + " and more" * (number % 3)
            image = b"no image" if number in broken else png(number, colour)
            fields = {"caption": caption, "label": colour}
            tar.write({"__key__": f"{number:06d}", "png": image, "txt": caption, "json": json.dumps(fields).encode()})


def write_pairs(root: Path, broken: Sequence[int] = ()) -> Path:
    """`root/train` with 200 pairs in two tars and `root/val` with 40 in one."""
    half = NUM_PAIRS // 2
    write_shard(root / "train" / "000000.tar", 0, half, broken)
    write_shard(root / "train" / "000001.tar", half, NUM_PAIRS - half, broken)
    write_shard(root / "val" / "000000.tar", NUM_PAIRS, NUM_HELD_OUT)
    return root


# ---------------------------------------------------------------------------------------------- processes

_PRELOADED = (
    "mmpretrain.build_evaluation",
    "mmpretrain.checkpoints.load",
    "mmpretrain.evals.retrieval",
    "mmpretrain.reporting.report",
    "mmpretrain.reporting.tensorboard",
    "mmpretrain.training.trainer",
    "torch.nn.parallel",
    "torch.utils.data",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "hydra._internal.hydra",
    "hydra.core.plugins",
)


def start(function: Callable[..., None], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """A process that calls a function of a module; a daemon ends with this process.

    It is forked from one that runs no tensor code, so that no thread is lost in the fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    process = context.Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def _become(module: str, arguments: Sequence[str], folder: str, environment: Mapping[str, str], output: str) -> None:
    """In the new process: what the shell does before `python -m module arguments`, then that."""
    multiprocessing.set_start_method(None, force=True)  # its own processes start as they do by default
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # An interpreter ends its pools (joblib's) before multiprocessing waits for child processes; Process.run does not.
        threading._shutdown()


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    code: int
    """The exit code; minus the signal's number if a signal ended it."""
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that say what went wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


def poll(
    condition: Callable[[], Any], what: str, is_alive: Callable[[], bool], output: Callable[[], str] = lambda: ""
) -> None:
    """Poll until a condition holds. Fails if the process ends first, or after the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert is_alive(), f"ended before {what}:\n{output()}"
        assert time.monotonic() < deadline, f"no {what} in {DEADLINE_SECONDS} s:\n{output()}"
        time.sleep(0.005)


def kill_stragglers(folder: str) -> None:
    """Kill what a launcher started in sessions of its own, known by its working directory, and wait for its end."""
    for _ in range(2000):
        alive = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _works_in(entry, folder)]
        if not alive:
            return
        for entry in alive:
            os.kill(int(entry.name), signal.SIGKILL)
        time.sleep(0.005)
    raise AssertionError(f"processes in {folder} outlive SIGKILL")


def _works_in(process: Path, folder: str) -> bool:
    try:
        is_zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return not is_zombie and os.readlink(process / "cwd").startswith(folder)
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_listening(port: str) -> bool:
    """Whether a process listens at a port of this machine."""
    addresses = [line.split()[1::2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses += [line.split()[1::2] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return any(local.endswith(f":{int(port):04X}") and state == "0A" for local, state, *_ in addresses)


class Command:
    """A running `python -m module arguments`."""

    def __init__(
        self, module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.arguments = arguments
        self._output = Path(tempfile.mkdtemp(prefix="command-", dir=folder))
        self._process = start(
            _become, module, tuple(arguments), str(folder), dict(environment or {}), str(self._output)
        )

    @property
    def pid(self) -> int:
        """Its process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self._process.is_alive():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def send_until_it_ends(self, number: signal.Signals) -> None:
        """Send it a signal again and again."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._process.is_alive():
            assert time.monotonic() < deadline, f"did not end in {DEADLINE_SECONDS} s:\n{self.stderr}"
            self.send(number)
            self._process.join(0.01)

    def wait(self) -> Finished:
        """What it left when it ended; one that never ends is killed and fails the test."""
        self._process.join(DEADLINE_SECONDS)
        hung = self._process.is_alive()
        if hung:
            self._process.kill()
            self._process.join()
        finished = Finished(self._process.exitcode or 0, self._read("stdout"), self._read("stderr"))
        assert not hung, f"{self.arguments} did not end in {DEADLINE_SECONDS} s:\n{finished.stderr}"
        return finished

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._read("stderr")

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Poll until a condition holds. Fails if the command ends first, or after the deadline."""
        poll(condition, what, self._process.is_alive, lambda: self.stderr)

    def _read(self, name: str) -> str:
        path = self._output / name
        return path.read_text() if path.exists() else ""


def run(module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Finished:
    """`python -m module arguments` in `folder`, to its end."""
    return Command(module, arguments, folder, environment).wait()


def group(world_size: int) -> list[dict[str, str]]:
    """The environment of each process of a group on this machine, as torchrun sets it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def start_train(folder: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> Command:
    """A running `python -m mmpretrain.train` of the tiny model."""
    return Command("mmpretrain.train", [*TINY_RUN, *overrides], folder, environment)


def train(folder: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> Finished:
    """`python -m mmpretrain.train` of the tiny model, to its end."""
    return start_train(folder, *overrides, environment=environment).wait()


def trained(folder: Path, pairs: Path, *overrides: str, code: int = 0) -> Finished:
    """`train` on the data set `pairs`, which must end with this exit code."""
    finished = train(folder, f"data.root={pairs}", *overrides)
    assert finished.code == code, finished.stderr
    return finished


def start_group(
    folder: Path, world_size: int, *overrides: str, environment: Mapping[str, str] | None = None
) -> list[Command]:
    """The same as `start_train`, for each process of a group, which speak gloo; one process alone is in no group."""
    ranks = [{}] if world_size == 1 else group(world_size)
    return [start_train(folder, *overrides, environment={**(environment or {}), **rank}) for rank in ranks]


def train_group(folder: Path, world_size: int, *overrides: str) -> list[Finished]:
    """`start_group`, to the end of all."""
    return [rank.wait() for rank in start_group(folder, world_size, *overrides)]


def trained_group(folder: Path, world_size: int, *overrides: str) -> Path:
    """`train_group` in a new folder, which must succeed. Returns: the run's directory."""
    folder.mkdir()
    for rank in train_group(folder, world_size, *overrides):
        assert rank.code == 0, rank.stderr
    return folder / "run"


# ---------------------------------------------------------------------------------------------- what a run left


TENSORBOARD = {"tensorboard": {"_target_": "mmpretrain.reporting.tensorboard.TensorBoard"}}
"""The node `writer` as it is by default."""


def records(folder: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def num_records(folder: Path) -> int:
    """How many whole lines a run's metrics.jsonl has, which may still be missing."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def results(folder: Path) -> dict[str, float]:
    """A run's results.json."""
    scores: dict[str, float] = json.loads((folder / "results.json").read_text())
    return scores


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*"))


def tensors(folder: Path, name: str) -> bytes:
    """A file of the last checkpoint of a run, as it is."""
    return (checkpoints(folder)[-1] / name).read_bytes()


def weights(folder: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    """The tensors of a checkpoint of a run: `model`, `optimizer` or `ema`."""
    return store.load_tensors(store.path_of(folder / "checkpoints", step), part)


def exact_outcome(folder: Path) -> dict[str, Any]:
    """What two runs must share bit for bit: weights, moments, and every metric that is no timing."""
    metrics = [
        {name: value for name, value in record.items() if not re.match(r"system/|objectives/\w+_time_share", name)}
        for record in records(folder)
    ]
    timings, last = ("wall_seconds", "pairs_per_second"), checkpoints(folder)[-1]
    parts = {
        part: save(store.load_tensors(last, part)) for part in ("model", "optimizer", "ema") if store.has(last, part)
    }
    return {
        **parts,
        "metrics": metrics,
        "results": {name: value for name, value in results(folder).items() if name not in timings},
    }
