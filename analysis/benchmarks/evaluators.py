r"""Measure the evaluators that compare or learn from stored embeddings: k-NN, linear probe and retrieval.

    python -m analysis.benchmarks.evaluators [--samples 50000] [--width 512] [--classes 100] [--output evaluators.json]

The embeddings are noise around a centre of each class, of both splits alike, and each image has a caption of its own: no
model or data set is read. Each evaluator runs once, as in `mmpretrain.evaluate`, in this process; memory is the peak of the
process beyond what it held with the embeddings in memory (Linux's VmHWM).
"""

import argparse
import time
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import one_line, peak_bytes, write_record
from mmpretrain.evals.base import Context, Evaluator
from mmpretrain.evals.embeddings import Embedded
from mmpretrain.evals.knn import KNN
from mmpretrain.evals.linear_probe import LinearProbe
from mmpretrain.evals.retrieval import Retrieval
from mmpretrain.models.image_text import ImageTextModel


def embedded(count: int, width: int, classes: int, seed: int) -> Embedded:
    """Return a data set of `count` images with as many captions, whose embeddings tell the classes apart in part."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    rows = [centres[labels] + 4 * torch.randn(count, width, generator=generator) for _ in range(2)]
    images, texts = (F.normalize(each, dim=-1) for each in rows)
    places = torch.arange(count)
    return Embedded(
        images=images, features=rows[0], texts=texts, text_features=texts, captions=[str(i) for i in range(count)],
        samples=places, pairs=torch.stack([places, places], dim=1), labels=labels, fields={}, refused=[],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=arguments.positive, default=50_000, help="images of each split")
    parser.add_argument("--width", type=arguments.positive, default=512)
    parser.add_argument("--classes", type=arguments.positive, default=100)
    parser.add_argument("--output", type=arguments.writable)
    args = parser.parse_args(argv)
    splits = {
        name: embedded(args.samples, args.width, args.classes, seed)
        for seed, name in enumerate(("val", "val.train"), 1)
    }
    model = cast(ImageTextModel, torch.nn.Identity())  # no evaluator below calls it
    context = Context(model, tokenizer=None, sets={}, logit_scale=None, batch_size=1, workers=0, _embedded=splits)  # type: ignore[arg-type]
    evaluators: dict[str, Evaluator] = {"knn": KNN(), "retrieval": Retrieval(), "linear_probe": LinearProbe()}
    found: dict[str, dict[str, float]] = {}
    print(one_line())
    print(f"{args.samples:,} samples in each split, width {args.width}, {args.classes} classes")
    for name, evaluator in evaluators.items():
        with peak_bytes("cpu") as peak:
            started = time.perf_counter()
            evaluator("val", context)
            seconds = time.perf_counter() - started
        found[name] = {"bytes": peak[0], "seconds": seconds}
        print(f"{name:>14}  {seconds:8.1f} s  {peak[0] / 2**20:10,.0f} MiB")
    print(f"{'together':>14}  {sum(each['seconds'] for each in found.values()):8.1f} s")
    write_record(args, evaluators=found)


if __name__ == "__main__":
    main()
