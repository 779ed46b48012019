r"""Measure memory and time of the contrastive loss with its gradients, against open_clip's ClipLoss.

    python -m analysis.benchmarks.loss_memory [--batch 16384] [--width 512] [--output loss_memory.json]

Both compute the loss and the gradients of both towers' rows and of the scale, from the same unit rows and the same scale.
They run in turn, each in a separate process, after a pass over a few rows; the table has medians over the rounds. One pass
gives both memory and time, since it frees its memory. Memory is the peak beyond the memory that the process held before
(Linux's VmHWM, or the CUDA allocator's peak), without the gradients of the rows. Equality is checked on at most 8,192 of
the rows, several chunks: the largest relative error of a gradient is printed, and must be at most 1e-12 in float64 and
5e-6 in float32.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import demand, one_line, peak_bytes, write_record
from mmpretrain.losses import info_nce
from mmpretrain.reporting.profiling import synchronize

NAMES = ("open_clip", "mmpretrain")
SCALE = 100 / 7
LARGEST_CHECKED = 8192
LIMITS = {"float64": (torch.float64, 1e-12), "float32": (torch.float32, 5e-6)}


def inputs(batch: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return image rows and text rows, [batch, width], and the scale, all with requires_grad."""
    generator = torch.Generator().manual_seed(0)
    rows = [F.normalize(torch.randn(batch, width, generator=generator, dtype=dtype), dim=-1) for _ in range(2)]
    return [tensor.to(device).requires_grad_() for tensor in (*rows, torch.tensor(SCALE, dtype=dtype))]


def gradients(name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of one side's loss."""
    image, text, scale = tensors
    loss = ClipLoss()(image, text, scale) if name == "open_clip" else info_nce(image, text, scale)
    return torch.autograd.grad(loss, tensors)


def error(dtype: torch.dtype, batch: int, width: int, device: str) -> float:
    """Return the largest relative error of a gradient."""
    tensors = inputs(min(batch, LARGEST_CHECKED), width, dtype, device)
    theirs, ours = (gradients(name, tensors) for name in NAMES)
    return float(torch.stack([(a - b).norm() / a.norm() for a, b in zip(theirs, ours, strict=True)]).max())


def measure(name: str, batch: int, width: int, device: str) -> dict[str, float]:
    """Return the peak memory in bytes and the seconds. Runs in a new process."""
    tensors = inputs(batch, width, torch.float32, device)
    gradients(
        name, inputs(64, width, torch.float32, device)
    )  # so that memory of lazily loaded libraries is not counted
    gradient_bytes = sum(tensor.nbytes for tensor in tensors)
    synchronize(torch.device(device))
    with peak_bytes(device) as peak:
        started = time.perf_counter()
        gradients(name, tensors)
        synchronize(torch.device(device))
        seconds = time.perf_counter() - started
    return {"bytes": peak[0] - gradient_bytes, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=arguments.positive, default=16384)
    parser.add_argument("--width", type=arguments.positive, default=512)
    parser.add_argument("--rounds", type=arguments.positive, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    errors = {name: error(dtype, args.batch, args.width, args.device) for name, (dtype, _) in LIMITS.items()}
    for name, worst in errors.items():
        demand(f"gradients in {name}", worst, LIMITS[name][1])
    values: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip.loss", "mmpretrain.losses"])
    for turn in range(args.rounds):
        for name in NAMES if turn % 2 == 0 else reversed(NAMES):
            with ProcessPoolExecutor(1, mp_context=context) as pool:  # raises if its process is killed
                values[name].append(pool.submit(measure, name, args.batch, args.width, args.device).result())
    medians = {
        name: {key: statistics.median(value[key] for value in values[name]) for key in ("bytes", "seconds")}
        for name in NAMES
    }
    ratios = {key: medians["mmpretrain"][key] / medians["open_clip"][key] for key in ("bytes", "seconds")}
    print(one_line())
    print(f"batch {args.batch}, width {args.width}, {args.device}, medians of {args.rounds}")
    for name in NAMES:
        print(f"{name:>12}  {medians[name]['bytes'] / 2**20:10,.0f} MiB  {medians[name]['seconds']:8.2f} s")
    print(f"{'ratio':>12}  {ratios['bytes']:10.3f}      {ratios['seconds']:8.2f}")
    print("largest relative error of a gradient: " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
    write_record(args, medians=medians, ratios=ratios, errors=errors)


if __name__ == "__main__":
    main()
