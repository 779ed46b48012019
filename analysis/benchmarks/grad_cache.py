r"""Measure memory and gradients of a large batch in micro-batches (gradient caching), with half of the patches dropped.

    python -m analysis.benchmarks.grad_cache [--batch 4096] [--micro-batch 64] [--output grad_cache.json]

Memory: the emoji model (conf/model/clip_tiny.yaml) in float32, with images of 64 pixels (its own size) and of 128. Steps
of the large batch in micro-batches, of two micro-batches and of one run in turn, each in a separate process. The figure is
the peak beyond the memory that the process held before: inputs are in memory, caches of libraries are warm, and the rows of
the loss with their gradients (2 x 2 x batch x width x 4 bytes) are subtracted. Gradients of weights count: with any
accumulation of gradients, their sum is in memory beside activations from the second micro-batch on. So the ratio falls as
activations grow, and two micro-batches take as much as a hundred. `with state` adds weights and AdamW's moments. Medians over
the rounds.

Gradients: a narrower model of the same kind in float64; the whole batch on one process against micro-batches on 1 and on
2 gloo processes with DDP. The largest relative error of a parameter's gradient must be at most 1e-9; the temperature's is
printed separately. With open_clip's accumulation (accum_freq) the temperature's gradient is accum_freq times too large.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import demand, one_line, peak_bytes, write_record
from analysis.benchmarks.noise import my_batches, noise
from analysis.benchmarks.ranks import on_ranks
from mmpretrain.batch import Batch
from mmpretrain.config import instantiate
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.training import parallel, probe
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

CONF = Path(__file__).resolve().parents[2] / "conf"
MASK_RATIO = 0.5
AGREEMENT = 1e-9
WEIGHTS = {"infonce": 1.0}
# Make glibc return freed memory at once, so that it does not count as memory of the step.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def make_task(narrow: bool, image_size: int = 64) -> Task:
    """Build the emoji model, or a narrower one of two blocks in float64, with half of the patches dropped."""
    torch.manual_seed(0)
    node = yaml.safe_load((CONF / "model" / "clip_tiny.yaml").read_text(encoding="utf-8"))
    node["image"]["image_size"] = image_size
    if narrow:
        node["image"]["image_size"] = 32
        node["image"]["args"] |= {"embed_dim": 32, "depth": 2, "num_heads": 2}
        node["text"] |= {"vocab_size": 1000, "width": 32, "depth": 2, "num_heads": 2}
        node["embed_dim"] = 24
    model: ImageTextModel = instantiate.instantiate(node, 0, "model")
    task = Task(model, {"infonce": InfoNCE(model, mask_ratio=MASK_RATIO)})
    return task.double() if narrow else task


def make_batches(task: Task, batch_size: int, micro_batch_size: int) -> list[Batch]:
    """Return this rank's micro-batches of a fixed batch of noise with captions of 8 to 24 tokens."""
    return my_batches(noise(task.model, batch_size, 8, 24), micro_batch_size)


def measure_memory(batch_size: int, micro_batch_size: int, image_size: int) -> dict[str, float]:
    """Return the peak memory of a step in bytes, without rows and their gradients, and its seconds. Runs in a new process."""
    task = make_task(narrow=False, image_size=image_size)
    batches = make_batches(task, batch_size, micro_batch_size)
    for batch in make_batches(task, 16 * micro_batch_size, micro_batch_size):  # warm up: libraries cache plans by shape
        forward_backward(task, task, [batch], WEIGHTS)
    task.zero_grad()
    started = time.perf_counter()
    with peak_bytes() as peak:
        forward_backward(task, task, batches, WEIGHTS)
    rows = 2 * 2 * batch_size * task.model.embed_dim * 4
    state = 3 * sum(parameter.nbytes for parameter in task.parameters())
    return {"bytes": peak[0] - rows, "with_state": peak[0] - rows + state, "seconds": time.perf_counter() - started}


def gradients(batch_size: int, micro_batch_size: int) -> dict[str, Tensor]:
    """Return the gradients of the narrow model."""
    task = make_task(narrow=True)
    batches = make_batches(task, batch_size, micro_batch_size)
    Freeze(task, {}, probe.reached_parameters(task, batches[0]))
    forward_backward(parallel.wrap(task, torch.device("cpu")), task, batches, WEIGHTS)
    return {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative error of a gradient, and that of the temperature."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    each = {
        # The gradient of a key's bias is zero up to rounding, so compare it with the norm over all parameters.
        name: float((found[name] - gradient).norm() / max(gradient.norm(), 1e-6 * total))
        for name, gradient in expected.items()
    }
    return {
        "largest": float(torch.tensor(list(each.values())).max()),
        "logit_scale": each["objectives.infonce.logit_scale"],
    }


def arrays(batch_size: int, micro_batch_size: int) -> dict[str, np.ndarray]:
    """Return the gradients of the narrow model as arrays, which can be sent to another process."""
    return {name: gradient.numpy() for name, gradient in gradients(batch_size, micro_batch_size).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=arguments.positive, default=4096)
    parser.add_argument("--micro-batch", type=arguments.positive, default=64)
    parser.add_argument("--image-size", type=arguments.listed(arguments.positive), default="64,128")
    parser.add_argument("--rounds", type=arguments.positive, default=1)
    parser.add_argument("--output", type=arguments.writable)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure_memory(args.measure, args.micro_batch, *args.image_size)))
        return
    if args.batch % (2 * args.micro_batch):
        parser.error(f"--batch {args.batch}: expected a multiple of 2 processes x {args.micro_batch} of --micro-batch")
    print(one_line())
    print(f"peak of a step, medians of {args.rounds}")
    print(f"{'pixels':>8}{'batch':>8}{'in':>6}{'MiB':>10}{'with state':>12}{'seconds':>9}")
    medians: dict[int, dict[int, dict[str, float]]] = {}
    ratios: dict[int, dict[str, dict[str, float]]] = {}
    for size in args.image_size:
        values: dict[int, list[dict[str, float]]] = {
            batch: [] for batch in (args.micro_batch, 2 * args.micro_batch, args.batch)
        }
        command = [sys.executable, "-m", "analysis.benchmarks.grad_cache", "--micro-batch", str(args.micro_batch)]
        for turn in range(args.rounds):
            for batch in values if turn % 2 == 0 else reversed(values):
                own = [*command, "--image-size", str(size), "--measure", str(batch)]
                done = subprocess.run(own, check=True, stdout=subprocess.PIPE, env={**os.environ, **AT_ONCE})
                values[batch].append(json.loads(done.stdout))
        medians[size] = {
            batch: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            for batch, rounds in values.items()
        }
        for batch, median in medians[size].items():
            mib = f"{median['bytes'] / 2**20:>10,.0f}{median['with_state'] / 2**20:>12,.0f}"
            print(f"{size:>8}{batch:>8}{args.micro_batch:>6}{mib}{median['seconds']:>9.1f}")
        one, *more = medians[size].values()
        ratios[size] = {
            str(batch): {key: each[key] / one[key] for key in ("bytes", "with_state")}
            for batch, each in zip(list(values)[1:], more, strict=True)
        }
        for larger, ratio in ratios[size].items():
            print(
                f"{f'{larger} over {args.micro_batch}':>22}{ratio['bytes']:>10.2f}{ratio['with_state']:>12.2f}",
                flush=True,
            )
    expected = gradients(args.batch, args.batch)
    found = {}
    for ranks in (1, 2):
        sent = on_ranks(ranks, "cpu", arrays, args.batch, args.micro_batch)
        found[ranks] = error = errors({name: torch.from_numpy(array) for name, array in sent.items()}, expected)
        print(
            f"{ranks} rank{'s' if ranks > 1 else ''}: largest relative error of a gradient {error['largest']:.1e}, "
            f"of the temperature's {error['logit_scale']:.1e}"
        )
        demand("gradients", error["largest"], AGREEMENT)
    write_record(args, medians=medians, ratios=ratios, errors=found)


if __name__ == "__main__":
    main()
