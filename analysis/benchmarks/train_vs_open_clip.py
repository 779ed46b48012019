r"""Compare the training commands of mmpretrain and open_clip on the same tars, seed by seed.

Both train the model of `open_clip_configs/emoji_clip` from scratch for the same number of epochs with the same
batch, learning rate, warm-up, decay and crops. The two commands of a seed run one after the other; every second seed
reverses the order. `wall_seconds` is the whole command, with imports and one checkpoint at the end; `pairs_per_second` is
training alone. Neither side evaluates while it is timed; afterwards both are scored on the same pixels and texts by the
functions of `evaluate_open_clip.py`.

The work differs at the end of an epoch of N pairs. open_clip makes ceil(N / batch) full batches, the last of them from a
second pass, so that N % batch pairs of the first pass are not seen; mmpretrain sees each pair once. The column `pairs` is the
number of pairs that each side has seen.

open_clip's trainer pins webdataset<=0.2.86, so it needs an environment of its own:

    python -m venv ENV
    ENV/bin/pip install 'open_clip_torch[training]==3.3.0' torch==VERSION    # that of this project's environment

and then, from this project's environment,

    python -m analysis.benchmarks.train_vs_open_clip --data emoji --data-root data/emoji \
        --open-clip-python ENV/bin/python --precision bf16 --output train_vs_open_clip_emoji_bf16.json

With --recipe 'OVERRIDES' each seed has a third run: mmpretrain with further overrides, which may do other work. If its
metrics reach open_clip's, its wall time relative to open_clip's is the time to quality.

Both commands run with OMP_WAIT_POLICY=PASSIVE (OpenMP's threads sleep while they wait), which mmpretrain sets by itself
and which makes open_clip some 4 % faster, too.

DATA_ROOT has train/*.tar and val/*.tar, as `python -m data_tools build` writes them. Complete runs below --runs are not
repeated.

To measure only speed, with any model of open_clip and any tars, such as those of `jpeg_tars.py`:

    python -m analysis.benchmarks.train_vs_open_clip --data speed --data-root data/jpegs --model ViT-B-32 --batch 1024 \
        --epochs 3 --workers 14 --device cuda --open-clip-python ENV/bin/python --output b32.json

`data_wait` is the fraction of time that training waits for batches after the first logged step. With `--data speed`,
`mfu_executed` and `mfu_full_context` are utilisations relative to a matrix product timed in the same run, from the operations
of a step on the first batch of the tars, as executed and as if each caption had the full context. `step.py` checks for the
same model that both sides' mathematics is equal. On a GPU only bf16 is compared, since open_clip's command uses TF32 in
float32.
"""

import argparse
import json
import shlex
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from analysis.benchmarks import arguments
from analysis.benchmarks.arguments import EMOJI_CLIP
from analysis.benchmarks.machine import commit, describe, one_line, write_record
from analysis.benchmarks.step import OPEN_CLIP_PRECISION, flops, make_sides, matmul_flops_per_second
from analysis.benchmarks.step import Work as StepWork
from analysis.benchmarks.training_commands import SIDES, TASKS, Work, open_clip_versions

TIMES = ("wall_seconds", "pairs_per_second")


def run_once(side: str, work: Work, seed: int, run_dir: Path, versions: dict[str, str]) -> dict[str, float]:
    """Return one side's figures for one seed. A complete run is read instead of repeated.

    Raises: SystemExit if the complete run had other arguments, or was made on another machine.
    """
    path = run_dir / "record.json"
    asked = json.loads(json.dumps({"seed": seed, "work": work.of(side), "machine": describe(), "open_clip": versions}))
    if not path.exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # an incomplete run would be resumed, and timed only in part
        run_dir.mkdir(parents=True)
        record = {"asked": asked, "commit": commit(), "figures": SIDES[side](work, seed, run_dir)}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["asked"] != asked:
        raise SystemExit(f"{path} answers {record['asked']}, not {asked}: delete it, or give another --runs")
    figures: dict[str, float] = record["figures"]
    return figures


def deviation(values: list[float]) -> float:
    """Return the sample standard deviation (0 for a single value)."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(records: dict[str, list[dict[str, float]]]) -> None:
    """Print each metric over seeds: mean ± sd, or median [least, most] of a time, with the ratio to the first side."""
    sides = [side for side in SIDES if records[side]]
    print(f"{'':<26}" + "".join(f"{side:>32}" for side in sides))
    for key in records[sides[0]][0]:
        values = [[record[key] for record in records[side]] for side in sides]
        if key in TIMES:
            middles = [statistics.median(of_side) for of_side in values]
            cells = [
                f"{middle:.1f} [{min(of_side):.1f}, {max(of_side):.1f}]" for middle, of_side in zip(middles, values)
            ]
        else:
            digits = 1 if key == "pairs" else 3
            middles = [statistics.mean(of_side) for of_side in values]
            cells = [f"{mean:.{digits}f} ± {deviation(of_side):.{digits}f}" for mean, of_side in zip(middles, values)]
        if first := middles[0]:
            cells[1:] = [f"{cell} ({middle / first:.2f})" for cell, middle in zip(cells[1:], middles[1:])]
        print(f"{key:<26}" + "".join(f"{cell:>32}" for cell in cells))


def add_mfu(records: dict[str, list[dict[str, float]]], work: StepWork) -> None:
    """Add the utilisations `mfu_executed` and `mfu_full_context`, and what they are relative to, to each record."""
    sides = make_sides(work, 1, best=False)
    per_pair = {name: flops(partial(side.steps, 0, 1)) / work.batch_size for name, side in sides.items()}
    peak = matmul_flops_per_second(work.precision, work.device)
    for name, executed in per_pair.items():
        for record in records[name]:
            share = record["pairs_per_second"] / peak
            record["mfu_executed"], record["mfu_full_context"] = share * executed, share * per_pair["open_clip"]
            record["matmul_flops_per_second"] = peak


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, choices=sorted(TASKS))
    parser.add_argument("--data-root", required=True, type=Path, help="folder with train/*.tar and val/*.tar")
    parser.add_argument(
        "--classes", type=arguments.existing, help="class texts for grocery: label, coarse_label, description"
    )
    parser.add_argument(
        "--open-clip-python",
        type=arguments.existing,
        required=True,
        help="python of the environment with open_clip's trainer",
    )
    parser.add_argument("--precision", default="bf16", choices=sorted(OPEN_CLIP_PRECISION))
    parser.add_argument("--seeds", type=arguments.listed(int), default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--epochs", default=20, type=arguments.positive)
    parser.add_argument(
        "--model", type=arguments.model, help="with --data speed: a model of open_clip (default: the emoji model)"
    )
    parser.add_argument("--batch", default=128, type=arguments.positive)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", default=1, type=int, help="data processes of each side (default 1)")
    parser.add_argument("--recipe", default="", help="further Hydra overrides of a third side, for the time to quality")
    parser.add_argument(
        "--open-clip-args", default="", help="further arguments of its trainer, such as ' --torchcompile'"
    )
    parser.add_argument("--sides", help="run only some (default open_clip,mmpretrain and, if it is given, recipe)")
    parser.add_argument("--runs", default=Path("runs/train_vs_open_clip"), type=Path, help="where the runs are kept")
    parser.add_argument("--output", required=True, type=arguments.writable, help="JSON with every record")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for mmpretrain.train")
    args = parser.parse_args(argv)
    if TASKS[args.data] == "zero_shot" and args.classes is None:
        parser.error(f"--data {args.data} needs --classes TSV (label, coarse_label, description)")
    if args.model is not None and args.data != "speed":
        parser.error(f"--model {args.model}: {args.data} is compared with the emoji model alone; expected --data speed")
    if args.device == "cuda" and args.precision == "fp32":
        parser.error("--precision fp32 with --device cuda: open_clip's command computes it in TF32; expected bf16")
    if args.recipe and args.data == "speed":
        parser.error(f"--recipe {args.recipe!r} with --data speed: expected data with scores that it is to reach")
    for split in ("train",) if args.data == "speed" else ("train", "val"):
        if not any((args.data_root / split).glob("*.tar")):
            parser.error(f"no *.tar in {args.data_root / split}; build it with: python -m data_tools build")
    sides = args.sides.split(",") if args.sides else ["open_clip", "mmpretrain", *(["recipe"] if args.recipe else [])]
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {sorted(unknown)[0]!r}: choose from {', '.join(SIDES)}")
    if "recipe" in sides and not args.recipe:
        parser.error("--sides recipe: which one? Add --recipe 'OVERRIDES'")

    work = Work(
        data=args.data, model=args.model, batch_size=args.batch, data_root=args.data_root.resolve(),
        classes=args.classes and args.classes.resolve(), precision=args.precision, epochs=args.epochs,
        workers=args.workers, device=args.device, open_clip_python=str(args.open_clip_python),
        overrides=tuple(args.overrides), recipe=tuple(shlex.split(args.recipe)),
        open_clip_args=tuple(shlex.split(args.open_clip_args)),
    )  # fmt: skip
    versions = open_clip_versions(str(args.open_clip_python))
    records: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn, seed in enumerate(args.seeds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            what = "_".join([args.data, *([args.model, str(args.batch)] if args.model else []), args.precision])
            name = f"{what}_{args.epochs}epochs/{side}_seed{seed}"
            records[side].append(run_once(side, work, seed, (args.runs / name).resolve(), versions))
            print(f"{side} seed {seed}: {json.dumps(records[side][-1])}", flush=True)
    seeds = ", ".join(map(str, args.seeds))
    print(f"\n{args.data}, {args.precision}, {args.epochs} epochs, seeds {seeds}; {one_line()}; open_clip: {versions}")
    if args.data == "speed":
        tars, device = str(args.data_root / "train"), torch.device(args.device)
        add_mfu(records, StepWork(args.model or EMOJI_CLIP, args.batch, tars, args.precision, device))
    print_table(records)
    write_record(args, open_clip_environment=versions, records=records)


if __name__ == "__main__":
    main()
