r"""Whole training commands of mmpretrain and of open_clip's own trainer on the same tars, seed by seed.

Both train the model of `open_clip_configs/emoji_clip` from scratch for the same number of epochs with the same
batch, learning rate, warm-up, decay and crops. The two commands of a seed run one after the other, and every second
seed turns their order round. `wall_seconds` is the whole command, imports and the one checkpoint at the end included;
`pairs_per_second` is training alone. Neither side evaluates while it is timed; afterwards both are scored on the same
pixels and texts by the functions of `evaluate_open_clip.py`.

The work is the same but for the end of an epoch of N pairs: open_clip makes ceil(N / batch) full batches, the
last of them from a second pass, so that N % batch pairs of the first are not seen; mmpretrain sees every pair
once. The column `pairs` says what each side has seen.

open_clip's trainer pins webdataset<=0.2.86, so it needs an environment of its own:

    python -m venv ENV
    ENV/bin/pip install 'open_clip_torch[training]==3.3.0' torch==VERSION    # that of this project's environment

and then, from this project's environment,

    python -m analysis.benchmarks.train_vs_open_clip --data emoji --data-root data/emoji \
        --open-clip-python ENV/bin/python --precision bf16 --output train_vs_open_clip_emoji_bf16.json

With --recipe 'OVERRIDES' a third run of each seed is mmpretrain's with those further overrides, free to do other work:
its wall time against open_clip's, where its metrics reach open_clip's, is the time to quality.

Both sides' commands run with OMP_WAIT_POLICY=PASSIVE (OpenMP's threads sleep while they wait), which mmpretrain sets
for itself and which makes open_clip some 4 % faster, too.

DATA_ROOT holds train/*.tar and val/*.tar as `python -m data_tools build` makes them. Runs that are complete
under --runs are not repeated.

For the speed alone, of any model of open_clip on any tars, such as those of `jpeg_tars.py`:

    python -m analysis.benchmarks.train_vs_open_clip --data speed --data-root data/jpegs --model ViT-B-32 --batch 1024 \
        --epochs 3 --workers 14 --device cuda --open-clip-python ENV/bin/python --output b32.json

`data_wait` is the share of the time that training waits for batches. That both sides' mathematics is the same is what
`step.py` checks, for the same model.
"""

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor

from analysis.benchmarks.evaluate_open_clip import CHUNK, read_classes, read_samples, score
from analysis.benchmarks.machine import commit, describe, one_line, write_record
from mmpretrain.evals.embed import embed_texts
from mmpretrain.loading import load_checkpoint

HERE = Path(__file__).resolve().parent
EMOJI_CLIP = f"local-dir:{HERE / 'open_clip_configs' / 'emoji_clip'}"
TASKS = {"emoji": "retrieval", "grocery": "zero_shot", "speed": None}
OPEN_CLIP_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16"}
LOG_LINE = re.compile(
    r"^(\S+) \| INFO \| Train Epoch: \d+ \[\s*(\d+)/.*Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)", re.MULTILINE
)


@dataclass(frozen=True)
class Work:
    """What both sides are asked to do."""

    data: str
    model: str | None
    batch_size: int
    data_root: Path
    classes: Path | None
    precision: str
    epochs: int
    workers: int
    device: str
    open_clip_python: str
    overrides: tuple[str, ...]
    recipe: tuple[str, ...]
    open_clip_args: tuple[str, ...]

    @property
    def open_clip_model(self) -> str:
        """The model as open_clip names it."""
        return self.model or EMOJI_CLIP

    def of(self, side: str) -> dict[str, object]:
        """What of it one side does."""
        others = {"open_clip": ("overrides", "recipe"), "mmpretrain": ("open_clip_args", "recipe")}
        left_out = others.get(side, ("open_clip_args",))
        return {
            key: value if isinstance(value, tuple) else str(value)
            for key, value in vars(self).items()
            if key not in left_out
        }

    @property
    def val_shards(self) -> Path:
        """Glob pattern of the validation tars."""
        return self.data_root / "val" / "*.tar"


def timed(command: list[str], log: Path) -> float:
    """Wall seconds of `command`, whose output goes to the file `log`; ends the benchmark when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise SystemExit(f"exit code {code} from {' '.join(command[:3])} ...; its output is in {log}")
    return time.perf_counter() - start


def open_clip_versions(python: str) -> dict[str, str]:
    """Versions of what matters in open_clip's environment; ends the benchmark when its trainer is not there."""
    code = "import json, open_clip, open_clip_train.main, torch, webdataset as wds;"
    code += (
        "print(json.dumps({'open_clip': open_clip.__version__, 'torch': torch.__version__, 'wds': wds.__version__}))"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"--open-clip-python {python}: its trainer does not import ({reason}); see --help for making it"
        )
    return json.loads(result.stdout)


def count_pairs(shards: list[Path]) -> int:
    """Number of captions (`.txt` members) in the tars."""
    total = 0
    for path in shards:
        with tarfile.open(path) as tar:
            total += sum(name.endswith(".txt") for name in tar.getnames())
    return total


def read_open_clip_log(log: str, epochs: int) -> dict[str, float]:
    """Pairs seen, and pairs per second from the first logged step to the last; its stamps are whole seconds."""
    lines = [(stamp, int(pairs), float(wait), float(step)) for stamp, pairs, wait, step in LOG_LINE.findall(log)]
    first, last = (datetime.strptime(lines[i][0], "%Y-%m-%d,%H:%M:%S") for i in (0, -1))
    pairs = epochs * max(line[1] for line in lines)
    return {
        "pairs": float(pairs),
        "pairs_per_second": (pairs - lines[0][1]) / (last - first).total_seconds(),
        "data_wait": sum(wait for _, _, wait, _ in lines[1:]) / sum(step for _, _, _, step in lines[1:]),
    }


def run_open_clip(work: Work, seed: int, run_dir: Path) -> dict[str, float]:
    """Train with open_clip's trainer; returns times, pairs seen and validation metrics."""
    shards = sorted((work.data_root / "train").glob("*.tar"))
    num_pairs = count_pairs(shards)
    command = [
        work.open_clip_python,
        "-m",
        "open_clip_train.main",
        "--model",
        work.open_clip_model,
        "--device",
        work.device,
    ]
    command += ["--train-data", "::".join(map(str, shards)), "--dataset-type", "webdataset"]
    command += ["--train-num-samples", str(num_pairs), "--epochs", str(work.epochs), "--seed", str(seed)]
    command += ["--batch-size", str(work.batch_size), "--lr", "1e-3", "--warmup", "50", "--wd", "0.1"]
    command += ["--beta1", "0.9", "--beta2", "0.999", "--eps", "1e-8", "--aug-cfg", "scale=(0.8, 1.0)"]
    command += ["--precision", OPEN_CLIP_PRECISION[work.precision], "--workers", str(work.workers)]
    command += ["--logs", str(run_dir), "--name", "open_clip", "--save-frequency", "0"]
    command += ["--log-every-n-steps", "10"]  # as we do: each logged step waits for the device
    command += work.open_clip_args
    wall_seconds = timed(command, run_dir / "train.out")
    log = (run_dir / "open_clip" / "out.log").read_text(encoding="utf-8")
    return {
        "wall_seconds": wall_seconds,
        **read_open_clip_log(log, work.epochs),
        **score_open_clip(work, run_dir / "open_clip" / "checkpoints" / f"epoch_{work.epochs}.pt", run_dir),
    }


def score_open_clip(work: Work, weights: Path, run_dir: Path) -> dict[str, float]:
    """Validation metrics of a checkpoint of open_clip's trainer, computed in its environment."""
    if (task := TASKS[work.data]) is None:
        return {}
    output = run_dir / "metrics.json"
    command = [work.open_clip_python, str(HERE / "evaluate_open_clip.py")]
    command += ["--model", EMOJI_CLIP, "--weights", str(weights)]
    command += ["--shards", str(work.val_shards), "--task", task, "--output", str(output)]
    command += ["--classes", str(work.classes)] if work.classes is not None else []
    timed(command, run_dir / "evaluate.out")
    return json.loads(output.read_text(encoding="utf-8"))


def run_recipe(work: Work, seed: int, run_dir: Path) -> dict[str, float]:
    """`run_mmpretrain` with the overrides of the recipe."""
    return run_mmpretrain(replace(work, overrides=(*work.overrides, *work.recipe)), seed, run_dir)


def run_mmpretrain(work: Work, seed: int, run_dir: Path) -> dict[str, float]:
    """Train with mmpretrain; returns times, pairs seen and validation metrics."""
    run = run_dir / "mmpretrain"
    command = [sys.executable, "-m", "mmpretrain.train", f"run.dir={run}"]
    command += [f"experiment={'grocery' if work.data == 'grocery' else 'emoji'}_clip"]
    if work.model is not None:
        command += ["model=open_clip", f"model.name={work.model}"]
    command += [f"data.root={work.data_root}", f"data.workers={work.workers}", f"run.seed={seed}"]
    command += [f"trainer.batch_size={work.batch_size}", f"trainer.precision={work.precision}"]
    command += [f"trainer.duration={work.epochs}epochs", f"trainer.device={work.device}"]
    command += ["eval=[]", "checkpoint.every=100%", *work.overrides]
    wall_seconds = timed(command, run_dir / "train.out")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "wall_seconds": wall_seconds,
        "pairs": float(results["samples"]),
        "pairs_per_second": results["pairs_per_second"],
        "data_wait": statistics.mean(record["system/data_wait"] for record in records if "system/data_wait" in record),
        **score_mmpretrain(work, run),
    }


def score_mmpretrain(work: Work, run: Path) -> dict[str, float]:
    """Validation metrics of a run of mmpretrain: the same pixels, texts and metrics, its own encoders."""
    if (task := TASKS[work.data]) is None:
        return {}
    loaded = load_checkpoint(run)
    size = loaded.model.image.image_size
    preprocess = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))

    def embed_images(images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in images]).mul(255).round().to(torch.uint8)
        return torch.cat(
            [loaded.model.project_image(loaded.model.encode_image(part).pooled) for part in pixels.split(CHUNK)]
        )

    def embed_all_texts(texts: list[str]) -> Tensor:
        return embed_texts(loaded.model, loaded.tokenizer, texts, CHUNK)

    classes = read_classes(work.classes) if work.classes is not None else []
    return score(task, read_samples(str(work.val_shards)), classes, embed_images, embed_all_texts)


TIMES = ("wall_seconds", "pairs_per_second")
SIDES = {"open_clip": run_open_clip, "mmpretrain": run_mmpretrain, "recipe": run_recipe}


def run_once(side: str, work: Work, seed: int, run_dir: Path, versions: dict[str, str]) -> dict[str, float]:
    """One side's figures for one seed, from the run or, when it is complete, from what it left.

    Raises: SystemExit if what is there was asked otherwise, or run on another machine.
    """
    path = run_dir / "record.json"
    asked = json.loads(json.dumps({"seed": seed, "work": work.of(side), "machine": describe(), "open_clip": versions}))
    if not path.exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # what was begun would be resumed, and timed in part
        run_dir.mkdir(parents=True)
        record = {"asked": asked, "commit": commit(), "figures": SIDES[side](work, seed, run_dir)}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["asked"] != asked:
        raise SystemExit(f"{path} answers {record['asked']}, not {asked}: delete it, or give another --runs")
    figures: dict[str, float] = record["figures"]
    return figures


def deviation(values: list[float]) -> float:
    """Sample standard deviation (0 of a single value)."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(records: dict[str, list[dict[str, float]]]) -> None:
    """Each metric over seeds: mean ± sd, or median [least, most] of a time; in round brackets over the first side's."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, choices=sorted(TASKS))
    parser.add_argument("--data-root", required=True, type=Path, help="folder with train/*.tar and val/*.tar")
    parser.add_argument("--classes", type=Path, help="class texts for grocery: label, coarse_label, description")
    parser.add_argument("--open-clip-python", required=True, help="python of the environment with open_clip's trainer")
    parser.add_argument("--precision", default="bf16", choices=sorted(OPEN_CLIP_PRECISION))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--epochs", default=20, type=int)
    parser.add_argument("--model", help="with --data speed: a model of open_clip (default: the emoji model)")
    parser.add_argument("--batch", default=128, type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", default=1, type=int, help="data processes of each side (default 1)")
    parser.add_argument("--recipe", default="", help="further Hydra overrides of a third side, for the time to quality")
    parser.add_argument(
        "--open-clip-args", default="", help="further arguments of its trainer, such as ' --torchcompile'"
    )
    parser.add_argument("--sides", help="run only some (default open_clip,mmpretrain and, if it is given, recipe)")
    parser.add_argument("--runs", default=Path("runs/train_vs_open_clip"), type=Path, help="where the runs are kept")
    parser.add_argument("--output", required=True, type=Path, help="JSON with every record")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for mmpretrain.train")
    args = parser.parse_args()
    if TASKS[args.data] == "zero_shot" and args.classes is None:
        parser.error(f"--data {args.data} needs --classes TSV (label, coarse_label, description)")
    if args.model is not None and args.data != "speed":
        parser.error(f"--model {args.model}: {args.data} is compared with the emoji model alone; expected --data speed")
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
        workers=args.workers, device=args.device, open_clip_python=args.open_clip_python, overrides=tuple(args.overrides),
        recipe=tuple(shlex.split(args.recipe)), open_clip_args=tuple(shlex.split(args.open_clip_args)),
    )  # fmt: skip
    versions = open_clip_versions(args.open_clip_python)
    records: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn, seed in enumerate(int(seed) for seed in args.seeds.split(",")):
        for side in sides if turn % 2 == 0 else reversed(sides):
            what = "_".join([args.data, *([args.model, str(args.batch)] if args.model else []), args.precision])
            name = f"{what}_{args.epochs}epochs/{side}_seed{seed}"
            records[side].append(run_once(side, work, seed, (args.runs / name).resolve(), versions))
            print(f"{side} seed {seed}: {json.dumps(records[side][-1])}", flush=True)
    print(
        f"\n{args.data}, {args.precision}, {args.epochs} epochs, seeds {args.seeds}; {one_line()}; open_clip: {versions}"
    )
    print_table(records)
    write_record(args, open_clip_environment=versions, records=records)


if __name__ == "__main__":
    main()
