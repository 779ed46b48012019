r"""Measure the projection of patches as a convolution and as a matrix product, forward and backward.

    python -m analysis.benchmarks.patch_projection [--output patch_projection.json]

Images are normalised from channels-last bytes, as in training, with the batch and patch sizes of some models. Both run in
turn; medians over the rounds. The benchmark fails unless both give the same patches and gradients of the weights in float64,
to 1e-9 of their norm.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import demand, one_line, write_record
from analysis.benchmarks.step import OPEN_CLIP_PRECISION
from mmpretrain.config.schema import Precision
from mmpretrain.models.patch_projection import PatchProjection
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.training.precision import autocast

SHAPES = {
    "emoji_clip": (128, 64, 8, 192),
    "ViT-S-32": (32, 224, 32, 384),
    "ViT-B-32": (32, 224, 32, 768),
    "ViT-B-16": (16, 224, 16, 768),
    "ViT-L-14": (8, 224, 14, 1024),
}
"""Images in a batch, their side, a patch's side, the width."""
AGREEMENT = 1e-9


def ways(projection: PatchProjection) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return both functions by name."""
    return {"convolution": super(PatchProjection, projection).forward, "product": projection.product}


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[PatchProjection, Tensor, Tensor]:
    """Return a projection, images [b, 3, s, s], and a gradient of the patches."""
    b, side, patch, width = shape
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (b, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    projection = PatchProjection(3, width, patch, stride=patch, device=device, dtype=dtype)
    gradient = torch.randn(b, side // patch, side // patch, width, dtype=dtype, device=device).permute(0, 3, 1, 2)
    return projection, pixels.to(dtype) / 128 - 1, gradient


def check(shape: tuple[int, int, int, int], device: torch.device) -> float:
    """Return the largest relative difference in float64. Raises: SystemExit if it is too large."""
    projection, images, gradient = make((2, *shape[1:]), torch.float64, device)
    found = []
    for way in ways(projection).values():
        projection.zero_grad()
        patches = way(images)
        patches.backward(gradient)
        found.append((patches.detach(), *(parameter.grad for parameter in projection.parameters())))
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
    demand("patches or gradients", worst, AGREEMENT)
    return worst


def measure(
    shape: tuple[int, int, int, int], precision: Precision, device: torch.device, rounds: int
) -> dict[str, float]:
    """Return the median seconds of each way."""
    projection, images, gradient = make(shape, torch.float32, device)
    both = ways(projection)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(rounds + 3):  # the first rounds warm up
        for name in list(both) if turn % 2 == 0 else reversed(both):
            projection.zero_grad()
            synchronize(device)
            started = time.perf_counter()
            with autocast(device, precision):
                patches = both[name](images)
            patches.backward(gradient.to(patches.dtype))
            synchronize(device)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=arguments.listed(arguments.one_of(*SHAPES)), default=",".join(SHAPES))
    precision = arguments.listed(arguments.one_of(*OPEN_CLIP_PRECISION))
    parser.add_argument("--precision", type=precision, default="fp32,bf16")
    parser.add_argument("--rounds", type=arguments.positive, default=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    print(f"{one_line()}\nforward and backward, medians of {args.rounds}, milliseconds")
    print(f"{'':<12}{'':>6}{'convolution':>13}{'product':>9}{'ratio':>7}{'differ by':>11}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for model in args.models:
        difference = check(SHAPES[model], device)
        for name in args.precision:
            found = measure(SHAPES[model], name, device, args.rounds)
            results.setdefault(model, {})[name] = {**found, "difference": difference}
            times = f"{1000 * found['convolution']:>13.2f}{1000 * found['product']:>9.2f}"
            ratio = found["product"] / found["convolution"]
            print(f"{model:<12}{name:>6}{times}{ratio:>7.2f}{difference:>11.1e}", flush=True)
    write_record(args, results=results)


if __name__ == "__main__":
    main()
