"""Training commands of both sides, figures from their logs, and scores of the trained models."""

import json
import re
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor

from analysis.benchmarks.evaluate_open_clip import CHUNK, read_classes, read_samples, score
from analysis.benchmarks.step import EMOJI_CLIP_OF_OPEN_CLIP, OPEN_CLIP_PRECISION
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.evals.embeddings import embed_texts

SHORTEST_SECONDS = 10
TASKS = {"emoji": "retrieval", "grocery": "zero_shot", "speed": None}
LOG_LINE = re.compile(
    r"^(\S+) \| INFO \| Train Epoch: \d+ \[\s*(\d+)/.*Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)", re.MULTILINE
)


@dataclass(frozen=True)
class Work:
    """Work that both sides do."""

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
        """Name of the model in open_clip."""
        return self.model or EMOJI_CLIP_OF_OPEN_CLIP

    def of(self, side: str) -> dict[str, object]:
        """Return the part of the work that one side does."""
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
    """Run a command with its output in the file `log`, and return its wall seconds. Raises: SystemExit if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise SystemExit(f"exit code {code} from {' '.join(command[:3])} ...; its output is in {log}")
    return time.perf_counter() - start


def open_clip_versions(python: str) -> dict[str, str]:
    """Return versions of libraries in open_clip's environment.

    Raises: SystemExit if its trainer is missing, or its torch has another version.
    """
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
    versions: dict[str, str] = json.loads(result.stdout)
    if versions["torch"].partition("+")[0] != torch.__version__.partition("+")[0]:
        raise SystemExit(
            f"--open-clip-python {python} has torch {versions['torch']}, and this environment {torch.__version__}; "
            "expected the same on both sides"
        )
    return versions


def count_pairs(shards: list[Path]) -> int:
    """Return the number of captions (`.txt` members) in the tars."""
    total = 0
    for path in shards:
        with tarfile.open(path) as tar:
            total += sum(name.endswith(".txt") for name in tar.getnames())
    return total


def read_open_clip_log(log: str, epochs: int) -> dict[str, float]:
    """Return the pairs seen, pairs per second, and fraction of time spent waiting, from the first to the last logged step.

    Its time stamps are whole seconds, its count of pairs restarts in each epoch, and its times are means over the steps since
    the line before: one step for the first line of an epoch, several for others.
    Raises: SystemExit for a log of less than ten seconds, which is too short to measure speed.
    """
    lines = [(stamp, int(pairs), float(wait), float(step)) for stamp, pairs, wait, step in LOG_LINE.findall(log)]
    stamps = [datetime.strptime(stamp, "%Y-%m-%d,%H:%M:%S") for stamp, *_ in lines]
    seconds = (stamps[-1] - stamps[0]).total_seconds() if stamps else 0.0
    if seconds < SHORTEST_SECONDS:
        raise SystemExit(
            f"open_clip's log tells {seconds:.0f} s of training; expected {SHORTEST_SECONDS} at least: add epochs"
        )
    pairs = epochs * max(line[1] for line in lines)
    waited = taken = 0.0
    for before, (_, seen, wait, step) in pairwise(lines):
        since = seen - before[1] if seen > before[1] else seen
        waited, taken = waited + since * wait, taken + since * step
    return {
        "pairs": float(pairs),
        "pairs_per_second": (pairs - lines[0][1]) / seconds,
        "data_wait": waited / taken,
    }


def run_open_clip(work: Work, seed: int, run_dir: Path) -> dict[str, float]:
    """Train with open_clip's trainer, and return times, pairs seen and validation metrics."""
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
    command += ["--log-every-n-steps", "10"]  # as mmpretrain does, since each logged step waits for the device
    command += work.open_clip_args
    wall_seconds = timed(command, run_dir / "train.out")
    log = (run_dir / "open_clip" / "out.log").read_text(encoding="utf-8")
    return {
        "wall_seconds": wall_seconds,
        **read_open_clip_log(log, work.epochs),
        **score_open_clip(work, run_dir / "open_clip" / "checkpoints" / f"epoch_{work.epochs}.pt", run_dir),
    }


def score_open_clip(work: Work, weights: Path, run_dir: Path) -> dict[str, float]:
    """Return the validation metrics of a checkpoint of open_clip's trainer, computed in its environment."""
    if (task := TASKS[work.data]) is None:
        return {}
    output = run_dir / "metrics.json"
    command = [work.open_clip_python, str(Path(__file__).with_name("evaluate_open_clip.py"))]
    command += ["--model", EMOJI_CLIP_OF_OPEN_CLIP, "--weights", str(weights)]
    command += ["--shards", str(work.val_shards), "--task", task, "--output", str(output)]
    command += ["--classes", str(work.classes)] if work.classes is not None else []
    timed(command, run_dir / "evaluate.out")
    return json.loads(output.read_text(encoding="utf-8"))


def run_mmpretrain(work: Work, seed: int, run_dir: Path) -> dict[str, float]:
    """Train with mmpretrain, and return times, pairs seen and validation metrics."""
    run = run_dir / "mmpretrain"
    command = [sys.executable, "-m", "mmpretrain.train", f"run.dir={run}"]
    command += [f"experiment={'grocery' if work.data == 'grocery' else 'emoji'}_clip"]
    if work.model is not None:
        command += ["model=open_clip", f"model.name={work.model}"]
    command += [f"data.root={work.data_root}", f"data.workers={work.workers}", f"run.seed={seed}"]
    command += [f"trainer.batch_size={work.batch_size}", f"trainer.precision={work.precision}"]
    command += [f"trainer.duration={work.epochs}epochs", f"trainer.device={work.device}"]
    command += ["eval=[]", *(["~data.val.val"] if TASKS[work.data] is None else [])]
    command += ["checkpoint.every=100%", *work.overrides]
    wall_seconds = timed(command, run_dir / "train.out")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    waits = [record["system/data_wait"] for record in records if "system/data_wait" in record]
    return {
        "wall_seconds": wall_seconds,
        "pairs": float(results["samples"]),
        "pairs_per_second": results["pairs_per_second"],
        "data_wait": statistics.mean(waits[1:] or waits),  # after the first logged step, as for open_clip
        **score_mmpretrain(work, run),
    }


def score_mmpretrain(work: Work, run: Path) -> dict[str, float]:
    """Return the validation metrics of a run of mmpretrain on the same pixels and texts."""
    if (task := TASKS[work.data]) is None:
        return {}
    loaded = load_checkpoint(run)
    size = loaded.model.image_encoder.image_size
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


def run_recipe(work: Work, seed: int, run_dir: Path) -> dict[str, float]:
    """Run `run_mmpretrain` with the overrides of the recipe."""
    return run_mmpretrain(replace(work, overrides=(*work.overrides, *work.recipe)), seed, run_dir)


SIDES = {"open_clip": run_open_clip, "mmpretrain": run_mmpretrain, "recipe": run_recipe}
