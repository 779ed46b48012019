r"""Count memory, communication and operations of a step on many GPUs, without any: fake tensors and a fake process group.

    python -m analysis.benchmarks.cluster --model ViT-L-14 --batch 65536 --ranks 8,64,1024 --strategies ddp,fsdp,hsdp

Rank 0 of the group takes the step of `Trainer` on fake CUDA tensors, in bf16 and with captions that fill the context. Nothing
is computed or sent. All tensors and collectives are seen, so that memory and bytes are those of a real step, but for the
workspaces of kernels and the allocator's fragmentation. What is measured is the second step, in which the optimizer has its
state (with DDP the first one, which makes it).

A collective on w ranks sends, with ring algorithms and b bytes on its larger side, 2 b (w - 1) / w for an all-reduce, and
b (w - 1) / w for an all-gather or a reduce-scatter. If its ranks span machines, and k of them are on each, then k rings pass
through k network cards: each sends a k-th of these bytes to another machine, and NVLink carries them inside (if k > 1).

The seconds are lower bounds: operations at `--tflops` times `--mfu`, bytes at the bandwidths of NVLink and of one network
card, one direction each. All three can overlap, so the largest bounds the step.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from analysis.benchmarks import arguments, fake_cuda
from analysis.benchmarks.fake_cuda import CUDA
from analysis.benchmarks.machine import write_record
from analysis.benchmarks.noise import my_batches, noise
from analysis.benchmarks.step import BETAS, EPS, LR, WEIGHT_DECAY, build_model
from mmpretrain import optim
from mmpretrain.batch import Batch
from mmpretrain.config.schema import ActivationCheckpointing, ParallelConfig, Precision, Strategy
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.training import parallel
from mmpretrain.training.precision import autocast
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task
from mmpretrain.training.traffic import Collective, Collectives
from mmpretrain.training.transfer import Transfer


@dataclass(frozen=True)
class Step:
    """Costs of a step on one rank."""

    memory_bytes: int
    """Peak of all tensors: weights, gradients, optimizer, activations, buffers of collectives."""
    flops: float
    nvlink_bytes: Mapping[str, float]
    """Bytes that a GPU sends to others of its machine, by kind of collective."""
    network_bytes: Mapping[str, float]
    """Bytes that a GPU's network card sends to other machines, by kind of collective."""
    num_collectives: int


def by_link(collectives: Iterable[Collective], per_machine: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes that a GPU sends by NVLink, and by its network card, by kind of collective."""
    nvlink: dict[str, float] = defaultdict(float)
    network: dict[str, float] = defaultdict(float)
    for each in collectives:
        neighbours = sum(rank // per_machine == each.ranks[0] // per_machine for rank in each.ranks)
        if neighbours > 1:
            nvlink[each.kind] += each.num_bytes
        if neighbours < len(each.ranks):
            network[each.kind] += each.num_bytes / neighbours
    return dict(nvlink), dict(network)


class _Memory(TorchDispatchMode):
    """Bytes of the storages on CUDA that are alive, and their peak. Those that were made before are to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of tensors, each until it is freed."""
        for tensor in tensors:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if tensor.device.type == CUDA.type and storage._cdata not in self._sizes:
                weakref.finalize(storage, self._change, storage._cdata, 0)
                self._change(storage._cdata, storage.nbytes())

    def _change(self, storage: int, num_bytes: int) -> None:
        self._alive += num_bytes - self._sizes.pop(storage, 0)
        if num_bytes:
            self._sizes[storage] = num_bytes
        self.peak = max(self.peak, self._alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(each for each in tree_leaves(result) if isinstance(each, Tensor))
        return result

    def __enter__(self) -> "_Memory":
        # FSDP2 frees gathered weights by resizing their storages, which no dispatch mode sees.
        resize, change = torch.UntypedStorage.resize_, self._change

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            if storage.device.type in (CUDA.type, "meta"):
                change(storage._cdata, storage.nbytes())
            return resized

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", watched)
        self._patch.start()
        return cast(_Memory, super().__enter__())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()


def measure(task: Task, micro_batch: Batch, num_micro_batches: int, options: ParallelConfig, per_machine: int) -> Step:
    """Return the costs of the second step, in which the optimizer has its state. Call it inside of `fake_cuda.fake_ranks`."""
    task = fake_cuda.fake_task(task)
    parallel.prepare(task, CUDA, Precision.bf16, options)
    optimizer = optim.adamw(task.named_parameters(), LR, WEIGHT_DECAY, BETAS, EPS, {})
    wrapped = fake_cuda.wrap(task)

    def step() -> None:
        batches = [fake_cuda.fake_batch(micro_batch) for _ in range(num_micro_batches)]
        passes = autocast(CUDA, Precision.bf16)
        forward_backward(wrapped, task, batches, {"infonce": 1.0}, passes, transfer=Transfer(CUDA).start)
        skipped = optim.guarded_step(optimizer, optim.grad_norms(optimizer)["all"], 1.0)
        task.after_step(micro_batch.progress, skipped)

    if not isinstance(wrapped, DistributedDataParallel):
        step()
    memory = _Memory()
    memory.add(task.state_dict().values())
    memory.add(optim.optimizer_tensors(optimizer).values())
    with memory, FlopCounterMode(display=False) as operations, Collectives() as collectives:
        step()
    nvlink, network = by_link(collectives.seen, per_machine)
    return Step(memory.peak, operations.get_total_flops(), nvlink, network, len(collectives.seen))


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU."""

    flops: float
    nvlink: float
    network: float

    def seconds(self, step: Step) -> dict[str, float]:
        """Return the shortest time of each part of a step."""
        return {
            "computing": step.flops / self.flops,
            "NVLink": sum(step.nvlink_bytes.values()) / self.nvlink,
            "network": sum(step.network_bytes.values()) / self.network,
        }


def main() -> None:
    """Run the command."""
    args = _parse()
    if not torch.cuda.is_available():
        raise SystemExit(_with_stub())
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    model = build_model(args.model)
    assert model.text is not None
    task = Task(model, {"infonce": InfoNCE(model)})
    task.randomness = None
    length = model.text.context_length
    rates = Rates(args.tflops * 1e12 * args.mfu, args.nvlink * 1e9, args.network * 1e9)
    table = Table(title=f"{args.model}, batch {args.batch:,}, {length} tokens, bf16", title_justify="left")
    for heading in (
        "GPUs",
        "strategy",
        "micro-batches",
        "memory GiB",
        "TFLOP",
        "NVLink GB",
        "network GB",
        "collectives",
    ):
        table.add_column(heading, justify="right")
    for name in ("computing", "NVLink", "network"):
        table.add_column(f"{name} s", justify="right")
    figures = []
    for world_size in args.ranks:
        if args.batch % world_size:
            raise SystemExit(f"--batch {args.batch} on {world_size} ranks; expected a multiple of the ranks")
        share = args.batch // world_size
        num_micro_batches = -(-share // args.micro_batch)
        if share % num_micro_batches:
            raise SystemExit(f"--micro-batch {args.micro_batch}; expected a divisor of the {share} pairs of a rank")
        (batch,) = my_batches(noise(model, share // num_micro_batches, length, length))
        for strategy in args.strategies:
            options = ParallelConfig(Strategy(strategy), ActivationCheckpointing(args.checkpointing), compile=False)
            with fake_cuda.fake_ranks(world_size, args.per_machine):
                step = measure(task, batch, num_micro_batches, options, args.per_machine)
            seconds = rates.seconds(step)
            nvlink, network = sum(step.nvlink_bytes.values()), sum(step.network_bytes.values())
            table.add_row(
                f"{world_size:,}", strategy, f"{num_micro_batches} x {share // num_micro_batches}",
                f"{step.memory_bytes / 2**30:.1f}", f"{step.flops / 1e12:.1f}", f"{nvlink / 1e9:.2f}",
                f"{network / 1e9:.2f}", str(step.num_collectives), *(f"{value:.3f}" for value in seconds.values()),
            )  # fmt: skip
            figures.append({"ranks": world_size, "strategy": strategy, **asdict(step), "seconds": seconds})
    Console(width=160).print(table)
    write_record(args, steps=figures)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.benchmarks.cluster", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=arguments.model, default="ViT-L-14", help="a model of open_clip, or emoji_clip")
    parser.add_argument("--batch", type=arguments.positive, default=65_536, help="pairs of a step")
    parser.add_argument(
        "--micro-batch", type=arguments.positive, default=256, help="pairs that a GPU takes at once, at most"
    )
    parser.add_argument("--ranks", type=arguments.listed(arguments.positive), default=[8, 64, 1024], help="GPUs")
    parser.add_argument(
        "--strategies", type=arguments.listed(arguments.one_of("ddp", "fsdp", "hsdp")), default=["ddp", "fsdp", "hsdp"],
        help="strategies of conf/parallel",
    )  # fmt: skip
    parser.add_argument("--per-machine", type=arguments.positive, default=8, help="GPUs of a machine")
    parser.add_argument("--checkpointing", choices=["none", "blocks", "selective"], default="none")
    parser.add_argument("--tflops", type=float, default=989.0, help="peak of a GPU in bf16 (H100 SXM)")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of the peak that is reached")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s in one direction (NVLink 4)")
    parser.add_argument(
        "--network", type=float, default=50.0, help="GB/s of one network card for each GPU (400 Gbit/s)"
    )
    parser.add_argument("--output", type=arguments.writable, help="JSON file")
    return parser.parse_args()


def _with_stub() -> int:
    """Run this command again with a CUDA driver that has no device behind it. Returns: its exit code."""
    runtime = fake_cuda.cuda_runtime()
    if runtime is None:
        raise SystemExit(
            "this PyTorch was built without CUDA; expected one with it, which needs no GPU: pip install torch"
        )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LD_PRELOAD": str(fake_cuda.build(Path(folder), runtime))}
        command = [sys.executable, "-m", "analysis.benchmarks.cluster", *sys.argv[1:]]
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    main()
