r"""Measure the cost of drawing dropout and drop path from the samples' seeds.

    python -m analysis.benchmarks.randomness [--output randomness.json]

Forward and backward of conf/model/clip_tiny.yaml with InfoNCE on noise, in turn: without random layers; with random layers
that draw from PyTorch's generator; with random layers that draw by sample; and without random layers in the mode that draws
by sample (the cost of the mode itself). Medians over the rounds. The benchmark fails unless both ways of drawing keep the
same fraction of values.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import demand, one_line, write_record
from analysis.benchmarks.noise import my_batches, noise
from analysis.benchmarks.step import OPEN_CLIP_PRECISION
from mmpretrain.batch import Batch
from mmpretrain.config import instantiate
from mmpretrain.config.schema import Precision
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.training.precision import autocast
from mmpretrain.training.randomness import SampleRandomness
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

LAYERS = {
    "drop path .1": {"drop_path_rate": 0.1},
    "dropout .1": {"proj_drop_rate": 0.1},
    "dropout .1, attention .1, drop path .1": {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1},
}
"""Arguments of timm's image encoder; the text encoder has its dropout where the image encoder has."""


def make_task(args: dict[str, float]) -> Task:
    """Build the model of conf/model/clip_tiny.yaml with random layers."""
    file = Path(__file__).resolve().parents[2] / "conf" / "model" / "clip_tiny.yaml"
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    node["image"]["args"] |= args
    node["text"]["dropout"] = args.get("proj_drop_rate", 0.0)
    model = instantiate.instantiate(node, 0, "model")
    return Task(model, {"infonce": InfoNCE(model)})


def check() -> None:
    """Check the fraction of kept values. Raises: SystemExit if it differs between both ways."""
    torch.manual_seed(0)
    (batch,) = my_batches(noise(make_task({}).model, 64, 8, 8, 0))
    x = torch.ones(64, 100, 512)
    with SampleRandomness() as random, random.of(batch.streams["pairs"], "check"):
        ours = F.dropout(x, 0.1)
    demand("the means of what is kept", abs(float(ours.mean() - F.dropout(x, 0.1).mean())), 2e-3)


def measure(
    args: dict[str, float], batch: Batch, precision: Precision, device: torch.device, rounds: int
) -> dict[str, float]:
    """Return the median seconds of each way."""
    plain, random = make_task({}).to(device), make_task(args).to(device)

    def step(task: Task, randomness: Callable[[], SampleRandomness] | None) -> None:
        task.randomness = randomness
        task.zero_grad()
        forward_backward(task, task, [batch], {"infonce": 1.0}, autocast(device, precision))

    ways: dict[str, Callable[[], None]] = {
        "none": lambda: step(plain, None),
        "mode": lambda: step(plain, SampleRandomness),
        "torch": lambda: step(random, None),
        "by_sample": lambda: step(random, SampleRandomness),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first round warms up
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            synchronize(device)
            started = time.perf_counter()
            ways[name]()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    precision = arguments.listed(arguments.one_of(*OPEN_CLIP_PRECISION))
    parser.add_argument("--precision", type=precision, default="fp32,bf16")
    parser.add_argument("--batch", type=arguments.positive, default=128)
    parser.add_argument("--tokens", type=arguments.positive, default=24, help="tokens of each caption")
    parser.add_argument("--rounds", type=arguments.positive, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    check()
    print(f"{one_line()}\nforward and backward of {args.batch} pairs, medians of {args.rounds}, milliseconds")
    print(f"{'':<40}{'':>6}{'none':>8}{'the mode':>10}{'torch':>8}{'by sample':>11}{'ratio':>7}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    (batch,) = my_batches(noise(make_task({}).model, args.batch, args.tokens, args.tokens, 0))
    for layers, rates in LAYERS.items():
        for name in args.precision:
            found = measure(rates, batch.to(device), name, device, args.rounds)
            results.setdefault(layers, {})[name] = found
            ms = {way: 1000 * value for way, value in found.items()}
            times = f"{ms['none']:>8.1f}{ms['mode']:>10.1f}{ms['torch']:>8.1f}{ms['by_sample']:>11.1f}"
            print(f"{layers:<40}{name:>6}{times}{found['by_sample'] / found['torch']:>7.2f}", flush=True)
    write_record(args, results=results)


if __name__ == "__main__":
    main()
