r"""Measure training steps of mmpretrain and of open_clip's own loop, on the same weights and batches.

    python -m analysis.benchmarks.step --model ViT-S-32-alt --batch 32 --captions 16
    python -m analysis.benchmarks.step --model emoji_clip --batch 128 --captions data/emoji/train

Batches are in memory, as each side's loader returns them: uint8 pixels and packed captions for mmpretrain, normalised
float32 pixels and captions padded to the context length for open_clip. Both sides have the same weights, rows, AdamW
groups, learning rate, decay and loss; a step is forward, backward, update and clamping of the temperature. open_clip runs
`open_clip_train.train.train_one_epoch`, which waits for the GPU in the first and last step of each round. mmpretrain runs
the step of `Trainer` with gradient norms, without logging and flags for other processes. On a GPU a round has enough steps to
make two waits negligible. Neither side uses TF32. With `--best` both also run compiled: open_clip's --torchcompile, and
parallel.compile.

First both take `--steps` steps from the same weights in float32; the benchmark fails unless the losses agree to 1e-5 of
their value. In bf16, where the two sides round differently, the difference is printed. Then each takes `--round-steps`
steps in turn, `--rounds` times; the table has medians of wall seconds per step, and ratios. FLOPs of forward and backward are
counted as executed, and as if each caption had the full context. Utilisation (MFU) is relative to a product of two square
matrices in the same precision, timed in the same run. On a GPU, each side also has the peak of its memory, and `gaps`: the
share of three traced steps in which no kernel runs.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import yaml
from open_clip.loss import ClipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from analysis.benchmarks import arguments
from analysis.benchmarks.arguments import EMOJI_CLIP
from analysis.benchmarks.machine import demand, one_line, write_record
from analysis.benchmarks.noise import my_batches, noise
from mmpretrain import optim
from mmpretrain.batch import Batch
from mmpretrain.checkpoints.open_clip import open_clip_names, to_open_clip
from mmpretrain.config import instantiate
from mmpretrain.config.schema import ActivationCheckpointing, ParallelConfig, Precision, Strategy
from mmpretrain.data.loader import build_loader
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.stream import SampleStream, Source
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import RandomResizedCrop
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.schedules import Clock
from mmpretrain.training.parallel import prepare
from mmpretrain.training.precision import autocast
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task
from mmpretrain.training.transfer import Transfer

HERE = Path(__file__).resolve().parent
EMOJI_CLIP_OF_OPEN_CLIP = f"local-dir:{HERE / 'open_clip_configs' / 'emoji_clip'}"
OPEN_CLIP_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16"}
LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.1, (0.9, 0.98), 1e-6
AGREEMENT = 1e-5


@dataclass(frozen=True)
class Work:
    """Work that both sides do."""

    model: str
    batch_size: int
    captions: str
    precision: Precision
    device: torch.device


def build_model(name: str) -> ImageTextModel:
    """Build `emoji_clip`, the model of conf/model/clip_tiny.yaml, or a model of open_clip by name."""
    if name != EMOJI_CLIP:
        return open_clip_model(name)
    node = yaml.safe_load((HERE.parents[1] / "conf" / "model" / "clip_tiny.yaml").read_text(encoding="utf-8"))
    model: ImageTextModel = instantiate.instantiate(node, 0, "model")
    return model


def build_open_clip(work: Work, task: Task) -> Any:
    """Build open_clip's model with the weights of mmpretrain's."""
    name = EMOJI_CLIP_OF_OPEN_CLIP if work.model == EMOJI_CLIP else work.model
    model = open_clip.create_model(name, load_weights=False, output_dict=True)
    model.load_state_dict(to_open_clip(task.model, task.logit_scale))
    return model.to(work.device)


def synthetic_batches(work: Work, model: ImageTextModel, num: int) -> list[Batch]:
    """Return noise with captions of one length. Raises: SystemExit if it exceeds the model's context."""
    length = int(work.captions)
    assert model.text is not None
    if length > model.text.context_length:
        raise SystemExit(
            f"--captions {length}: {work.model} has a context of {model.text.context_length} tokens at most"
        )
    parts = (noise(model, work.batch_size, length, length, seed) for seed in range(num))
    return [batch for samples in parts for batch in my_batches(samples)]


def real_batches(work: Work, model: ImageTextModel, num: int) -> list[Batch]:
    """Return the first batches of a folder of tars."""
    shards = Shards(expand_shards("*.tar", work.captions))
    stream = SampleStream(
        "pairs", [Source("pairs", shards)], work.batch_size, 0, "txt", RandomResizedCrop((0.8, 1.0)),
        model.image_encoder.image_size,
    )  # fmt: skip
    assert model.text is not None
    loader = build_loader(
        {"pairs": stream}, ClipTokenizer(context_length=model.text.context_length),
        Clock(work.batch_size, num * work.batch_size, shards.num_samples), 0, num,
    )  # fmt: skip
    return list(loader)


def as_open_clip(batch: Batch, model: ImageTextModel) -> tuple[Tensor, Tensor]:
    """Convert a batch to the form of open_clip's loader: normalised pixels, captions padded to the context length."""
    samples = batch.streams["pairs"]
    assert samples.images is not None and samples.text is not None and samples.lengths is not None
    assert model.text is not None
    text = torch.zeros(len(samples), model.text.context_length, dtype=torch.int64)
    is_token = torch.arange(samples.text.shape[1]) < samples.lengths[:, None]
    text[:, : samples.text.shape[1]] = samples.text * is_token
    return model.normalize(samples.images.to(model.device)).contiguous().cpu(), text


def check_groups(ours: "Ours", theirs: "OpenClip") -> None:
    """Check parameter groups. Raises: SystemExit if the two sides would update a parameter differently."""
    names = {**open_clip_names(ours.task.model), "logit_scale": "logit_scale"}
    mine = {
        names[name.removeprefix("model.").removeprefix("objectives.infonce.")]: _rule(group)
        for group in ours.optimizer.param_groups
        for name in group["names"]
    }
    by_parameter = {id(p): _rule(group) for group in theirs.optimizer.param_groups for p in group["params"]}
    other = {name: by_parameter[id(p)] for name, p in theirs.original.named_parameters()}
    if mine != other:
        name = next(name for name in other if mine.get(name) != other[name])
        raise SystemExit(f"{name} is updated by {mine.get(name)} here and by {other[name]} in open_clip")


def _rule(group: dict[str, Any]) -> dict[str, Any]:
    return {"lr": float(group["lr"]), "betas": tuple(group["betas"]), **{k: group[k] for k in ("eps", "weight_decay")}}


def _open_clip_decays(name: str, parameter: Tensor) -> bool:
    """Return True if open_clip_train.main applies weight decay to the parameter."""
    return parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


class Ours:
    """Steps of mmpretrain."""

    def __init__(self, work: Work, task: Task, batches: list[Batch], compiled: bool = False) -> None:
        options = ParallelConfig(Strategy.ddp, ActivationCheckpointing.none, compiled)
        prepare(task.to(work.device), work.device, work.precision, options)
        self.work, self.task, self.batches = work, task.to(work.device).train(), batches
        self.optimizer = optim.adamw(task.named_parameters(), LR, WEIGHT_DECAY, BETAS, EPS, {})
        self.transfer = Transfer(work.device)
        self.losses: list[Tensor] = []

    def steps(self, first: int, num: int) -> None:
        """Run steps `first` to `first + num`."""
        torch.backends.cudnn.benchmark = False
        for i in range(first, first + num):
            batch = self.transfer(self.batches[i % len(self.batches)])
            losses = forward_backward(
                self.task, self.task, [batch], {"infonce": 1.0}, autocast(self.work.device, self.work.precision)
            )
            norms = optim.grad_norms(self.optimizer)
            skipped = optim.guarded_step(self.optimizer, norms["all"], None)
            self.task.after_step(batch.progress, skipped)
            self.losses.append(losses.coupled["infonce"])


class OpenClip:
    """Steps of open_clip's own loop."""

    def __init__(self, work: Work, model: Any, batches: list[tuple[Tensor, Tensor]], compiled: bool) -> None:
        self.original, self.model = model, torch.compile(model) if compiled else model
        self.batches, self.losses = batches, list[Tensor]()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if not _open_clip_decays(name, p)], "weight_decay": 0.0},
            {"params": [p for name, p in named if _open_clip_decays(name, p)], "weight_decay": WEIGHT_DECAY},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
        self.args = SimpleNamespace(
            device=str(work.device), precision=OPEN_CLIP_PRECISION[work.precision], distill=False, accum_freq=1,
            skip_scheduler=True, grad_clip_norm=None, horovod=False, rank=0, local_rank=0, log_local=False, world_size=1,
            batch_size=work.batch_size, log_every_n_steps=10**9, wandb=False,
        )  # fmt: skip
        loss = ClipLoss()

        def recorded(**kwargs: Any) -> dict[str, Tensor]:
            losses = loss(**kwargs)
            self.losses.append(losses["contrastive_loss"].detach())
            return losses

        self.loss = recorded

    def steps(self, first: int, num: int) -> None:
        """Run steps `first` to `first + num`, as an epoch of its loop."""
        torch.backends.cudnn.benchmark = True  # as in its command
        batches = [self.batches[i % len(self.batches)] for i in range(first, first + num)]
        dataloader = _Epoch(batches)
        data = {"train": SimpleNamespace(dataloader=dataloader, set_epoch=lambda epoch: None)}
        train_one_epoch(self.model, data, self.loss, 0, self.optimizer, None, None, None, self.args)


class _Epoch(list[Any]):
    """Batches with the attributes of a loader that open_clip's loop reads."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(images) for images, _ in self)


Side = Ours | OpenClip

_LARGEST_KERNELS = 10


def matmul_flops_per_second(precision: str, device: torch.device) -> float:
    """Return operations per second of a product of two square matrices, the best of 5."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronize(device)
        seconds.append((time.perf_counter() - started) / 5)
    return 2 * size**3 / min(seconds)


def flops(run: Callable[[], None]) -> float:
    """Return the number of operations of matrix products and attention that `run` executes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def make_sides(work: Work, num_batches: int, best: bool) -> dict[str, Side]:
    """Build both sides from the same weights; with `best` also compiled."""
    torch.manual_seed(0)
    model = build_model(work.model)
    make = synthetic_batches if work.captions.isdigit() else real_batches
    batches = make(work, model, num_batches)
    open_clip_batches = [as_open_clip(batch, model) for batch in batches]
    if work.device.type == "cuda":  # as the loaders of both sides return them
        batches = [batch.pin_memory() for batch in batches]
        open_clip_batches = [(images.pin_memory(), text.pin_memory()) for images, text in open_clip_batches]

    def new_task() -> Task:
        torch.manual_seed(0)
        fresh = build_model(work.model)
        return Task(fresh, {"infonce": InfoNCE(fresh)})

    ours = Ours(work, new_task(), batches)
    theirs = OpenClip(work, build_open_clip(work, ours.task), open_clip_batches, compiled=False)
    check_groups(ours, theirs)
    sides: dict[str, Side] = {"open_clip": theirs}
    if best:
        compiled = build_open_clip(work, ours.task)
        sides["open_clip_compiled"] = OpenClip(work, compiled, open_clip_batches, compiled=True)
    sides["mmpretrain"] = ours
    if best:
        sides["mmpretrain_compiled"] = Ours(work, new_task(), batches, compiled=True)
    return sides


def trace(sides: dict[str, Side], num_steps: int, precision: str) -> dict[str, float]:
    """Take the first steps, and return the largest relative difference of each side's losses to open_clip's.

    Raises: SystemExit if a difference in float32 exceeds 1e-5.
    """
    for side in sides.values():
        side.steps(0, num_steps)
    expected = torch.stack(sides["open_clip"].losses).cpu()
    difference = {
        name: float(((torch.stack(side.losses).cpu() - expected) / expected).abs().max())
        for name, side in sides.items()
    }
    if precision == "fp32":
        for name, worst in difference.items():
            demand(f"losses of {name}", worst, AGREEMENT)
    return difference


def run(work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """Check and time one precision. Raises: SystemExit if the losses do not agree."""
    sides = make_sides(work, args.steps, args.best)
    difference = trace(sides, args.steps, work.precision)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds):
        for name in list(sides) if turn % 2 == 0 else reversed(sides):
            synchronize(work.device)
            started = time.perf_counter()
            sides[name].steps(args.steps + turn * args.round_steps, args.round_steps)
            synchronize(work.device)
            seconds[name].append((time.perf_counter() - started) / args.round_steps)
    on_gpu = {name: gpu_figures(side) for name, side in sides.items()} if work.device.type == "cuda" else {}
    counted = {name: flops(partial(sides[name].steps, 0, 1)) for name in ("open_clip", "mmpretrain")}
    executed = {name: counted[name.removesuffix("_compiled")] for name in sides}
    peak = matmul_flops_per_second(work.precision, work.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "pairs_per_second": {name: work.batch_size / value for name, value in medians.items()},
        "ratio": {name: medians[name] / medians["mmpretrain"] for name in medians},
        "loss_difference": difference,
        "gflops_executed": {name: value / 1e9 for name, value in executed.items()},
        "gflops_full_context": executed["open_clip"] / 1e9,  # open_clip's text encoder computes the full context
        "matmul_gflops_per_second": peak / 1e9,
        "mfu_executed": {name: value / medians[name] / peak for name, value in executed.items()},
        "mfu_full_context": {name: executed["open_clip"] / medians[name] / peak for name in executed},
        "gpu": on_gpu,
        "all_seconds": seconds,
    }


def gpu_figures(side: Side) -> dict[str, Any]:
    """Return the peak of a side's memory in bytes, and of three steps the share without a kernel and the largest kernels."""
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - held_bytes_of(side)  # all sides keep their weights on the card
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace_of_steps:
        side.steps(0, 3)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace_of_steps.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    times = {average.key: average.self_device_time_total for average in trace_of_steps.key_averages()}
    largest = sorted(times, key=lambda name: -times[name])[:_LARGEST_KERNELS]
    return {
        "memory_bytes": torch.cuda.max_memory_allocated() - others,
        "gaps": gaps(spans),
        "kernels": {name: times[name] / sum(times.values()) for name in largest},
    }


def held_bytes_of(side: Side) -> int:
    """Return the bytes of a side's parameters, buffers, gradients and optimizer state on its device."""
    module = side.task if isinstance(side, Ours) else side.original
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    tensors += [each for state in side.optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    device = next(module.parameters()).device
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors if each.device == device
    }
    return sum(storages.values())


def gaps(spans: Sequence[tuple[float, float]]) -> float:
    """Return the share of the time from the first to the last of sorted spans that none of them covers."""
    if not spans:
        return 1.0
    covered, (first, last) = 0.0, (spans[0][0], spans[0][0])
    for start, end in spans:
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return 1 - covered / (last - first) if last > first else 1.0


def show(work: Work, result: dict[str, Any]) -> None:
    """Print the table of one precision."""
    print(f"\n{work.model}, batch {work.batch_size}, captions {work.captions}, {work.precision}, {work.device}")
    print(f"{'':<20}{'ms/step':>10}{'pairs/s':>10}{'ours is':>9}{'GFLOP/step':>12}{'MFU':>7}{'as if full':>12}")
    for name, value in result["seconds"].items():
        speed = f"{1000 * value:>10.1f}{result['pairs_per_second'][name]:>10.1f}{result['ratio'][name]:>8.2f}x"
        mfu = f"{result['mfu_executed'][name]:>7.2f}{result['mfu_full_context'][name]:>12.2f}"
        figures = result["gpu"].get(name)
        gpu = f"{figures['memory_bytes'] / 2**30:>9.1f} GiB, gaps {figures['gaps']:.3f}" if figures else ""
        print(f"{name:<20}{speed}{result['gflops_executed'][name]:>12.1f}{mfu}{gpu}")
    print(
        f"largest relative difference of {len(result['loss_difference'])} sides' losses: "
        + ", ".join(f"{name} {value:.1e}" for name, value in result["loss_difference"].items())
        + f"; a matrix product makes {result['matmul_gflops_per_second']:,.0f} GFLOP/s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=arguments.model, default="ViT-S-32-alt", help="a model of open_clip, or emoji_clip"
    )
    parser.add_argument("--batch", type=arguments.positive, default=32)
    parser.add_argument(
        "--captions", type=arguments.captions, default="16", help="tokens of every caption, or a folder of tars"
    )
    precision = arguments.listed(arguments.one_of(*OPEN_CLIP_PRECISION))
    parser.add_argument("--precision", type=precision, default="fp32,bf16")
    parser.add_argument("--steps", type=arguments.positive, default=10, help="steps whose losses are compared")
    parser.add_argument("--rounds", type=arguments.positive, default=5)
    parser.add_argument(
        "--round-steps", type=arguments.positive, help="steps of a side in a round (default 3; on a GPU 50)"
    )
    parser.add_argument("--best", action="store_true", help="also run both sides compiled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    args.round_steps = args.round_steps or (50 if args.device == "cuda" else 3)
    torch.backends.cudnn.allow_tf32 = False
    logging.disable(logging.WARNING)  # open_clip warns that no weights are loaded
    print(one_line())
    works = {
        each: Work(args.model, args.batch, args.captions, each, torch.device(args.device)) for each in args.precision
    }
    if "fp32" not in works:
        checked = replace(next(iter(works.values())), precision=Precision.fp32)
        worst = max(trace(make_sides(checked, args.steps, args.best), args.steps, "fp32").values())
        print(f"the losses of {args.steps} steps in float32 differ by {worst:.1e} at most")
    results = {}
    for name, work in works.items():
        results[name] = run(work, args)
        show(work, results[name])
    write_record(args, results=results)


if __name__ == "__main__":
    main()
