r"""Measure pairs per second of one global batch on 1, 2 and 4 processes, with DDP and FSDP2.

    python -m analysis.benchmarks.scaling [--processes 1,2,4] [--model emoji_clip] [--output scaling.json]

The global batch, the weights and the optimiser are the same for any number of processes, which divide the batch and the
cores (or have a GPU each). Images are noise, captions have 8 to 24 tokens. The benchmark fails unless the losses of the
first `--steps` steps equal those of one process in float32, to 1e-5 of their value; in bf16 the difference is printed. A
round runs each number of processes and strategy once; every second round reverses the order. Medians over the rounds.
`efficiency` is the speed relative to one process; if processes share the cores of one machine, the best value is 1.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import demand, one_line, write_record
from analysis.benchmarks.noise import my_batches, noise
from analysis.benchmarks.ranks import on_ranks
from analysis.benchmarks.step import AGREEMENT, BETAS, EPS, LR, OPEN_CLIP_PRECISION, WEIGHT_DECAY, build_model
from mmpretrain import optim
from mmpretrain.config.schema import ActivationCheckpointing, ParallelConfig, Precision, Strategy
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.training import parallel, probe
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.precision import autocast
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

NUM_BATCHES = 4
SHORTEST, LONGEST = 8, 24


def measure(
    model: str, batch_size: int, strategy: str, precision: Precision, device_type: str, steps: int, timed: int
) -> tuple[list[float], float]:
    """Return the losses of the first steps and the seconds of a later step. Runs on each rank."""
    device = torch.device(device_type)
    torch.manual_seed(0)
    built = build_model(model)
    task = Task(built, {"infonce": InfoNCE(built)}).to(device)
    parts = (noise(built, batch_size, SHORTEST, LONGEST, seed) for seed in range(NUM_BATCHES))
    batches = [batch.to(device) for samples in parts for batch in my_batches(samples)]
    Freeze(task, {}, probe.reached_parameters(task, batches[0]))
    options = ParallelConfig(Strategy(strategy), ActivationCheckpointing.none, compile=False)
    parallel.prepare(task, device, precision, options)
    optimizer = optim.adamw(task.named_parameters(), LR, WEIGHT_DECAY, BETAS, EPS, {})
    wrapped = parallel.wrap(task, device)

    def step(i: int) -> torch.Tensor:
        batch = batches[i % NUM_BATCHES]
        losses = forward_backward(wrapped, task, [batch], {"infonce": 1.0}, autocast(device, precision))
        skipped = optim.guarded_step(optimizer, optim.grad_norms(optimizer)["all"], None)
        task.after_step(batch.progress, skipped)
        return losses.coupled["infonce"]

    losses = [float(step(i)) for i in range(steps)]
    synchronize(device)
    started = time.perf_counter()
    for i in range(timed):
        step(steps + i)
    synchronize(device)
    return losses, (time.perf_counter() - started) / timed


def run(args: argparse.Namespace, kind: tuple[int, str], precision: str, timed: int) -> tuple[list[float], float]:
    """Run `measure` on several processes with a strategy."""
    world, strategy = kind
    found: tuple[list[float], float] = on_ranks(
        world, args.device, measure, args.model, args.batch, strategy, precision, args.device, args.steps, timed
    )
    return found


def differences(losses: dict[tuple[int, str], list[float]], precision: str) -> dict[tuple[int, str], float]:
    """Return the largest relative difference of each strategy's losses to those of one process.

    Raises: SystemExit if a difference in float32 exceeds 1e-5.
    """
    expected = torch.tensor(losses[1, "ddp"])
    found = {kind: float((torch.tensor(values) / expected - 1).abs().max()) for kind, values in losses.items()}
    for (world, strategy), worst in found.items() if precision == "fp32" else ():
        demand(f"losses of {strategy} on {world}", worst, AGREEMENT)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=arguments.listed(arguments.positive), default="1,2,4")
    parser.add_argument(
        "--model", type=arguments.model, default="emoji_clip", help="a model of open_clip, or emoji_clip"
    )
    parser.add_argument("--batch", type=arguments.positive, default=128)
    parser.add_argument("--strategies", type=arguments.listed(arguments.one_of("ddp", "fsdp")), default="ddp,fsdp")
    parser.add_argument("--precision", choices=tuple(OPEN_CLIP_PRECISION), default="fp32")
    parser.add_argument("--steps", type=arguments.positive, default=5, help="steps whose losses are compared")
    parser.add_argument("--timed", type=arguments.positive, default=5, help="steps that are timed")
    parser.add_argument("--rounds", type=arguments.positive, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    for world in args.processes:
        if args.batch % world:
            parser.error(f"--batch {args.batch}: expected a multiple of {world} processes")
    kinds = [(1, "ddp")] + [(world, each) for world in args.processes if world > 1 for each in args.strategies]
    seconds: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
    if args.precision != "fp32":
        losses = {kind: run(args, kind, "fp32", 1)[0] for kind in kinds}
        differences(losses, "fp32")
    losses = {}
    for turn in range(args.rounds):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            losses[kind], each = run(args, kind, args.precision, args.timed)
            seconds[kind].append(each)
    difference = differences(losses, args.precision)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    print(one_line())
    print(f"{args.model}, global batch {args.batch}, {args.precision}, {args.device}, medians of {args.rounds}")
    print(f"{'processes':>10}{'':>6}{'pairs/s':>10}{'efficiency':>12}{'losses differ by':>18}")
    for (world, strategy), median in medians.items():
        name = "" if world == 1 else strategy
        speed = f"{args.batch / median:>10.1f}{medians[1, 'ddp'] / median:>12.2f}"
        print(f"{world:>10}{name:>6}{speed}{difference[world, strategy]:>18.1e}")
    figures = {
        f"{strategy} on {world}": {
            "pairs_per_second": args.batch / medians[world, strategy],
            "efficiency": medians[1, "ddp"] / medians[world, strategy],
            "loss_difference": difference[world, strategy],
            "all_seconds": seconds[world, strategy],
        }
        for world, strategy in kinds
    }
    write_record(args, figures=figures)


if __name__ == "__main__":
    main()
