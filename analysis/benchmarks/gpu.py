r"""Run the CUDA tests and the benchmarks of a GPU, one after the other, the most telling first.

    python -m analysis.benchmarks.gpu --output DIR [--minutes 25] [--parts step_b32,train_b32] [--open-clip-python PYTHON]

Each part writes DIR/PART.json, and its output to DIR/PART.txt. A part with a record of this commit and these arguments is not
repeated, so the command may be stopped and given again. A part that cannot run is named with the reason in one line, and the
others run. At the end, all records stand in one table, also in DIR/table.md.

- `step_*`: steps of ViT-B-32, L-14 and B-16 on batches in memory, captions of 77 tokens, bf16, beside open_clip's loop; both
  sides also compiled.
- `train_*`: whole training commands from tars of JPEGs of 512 x 512 pixels, beside open_clip's command in the environment of
  `--open-clip-python` (see train_vs_open_clip.py); if that fails, mmpretrain's alone.
- `tests`: the tests marked `gpu`. `loss_memory`, `packing`, `data`: the benchmarks of these names.

With `--size tiny` every part runs at a size for the CPU, to see that it runs.
"""

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import commit, describe
from mmpretrain.training.workers import own_cores

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("part", "side", "pairs/s", "ratio", "MFU", "MFU as if full", "memory GiB", "gaps", "waits for data")


@dataclass(frozen=True)
class Part:
    """One part: the arguments of a command, without --output, for the sizes `full` and `tiny`."""

    command: Callable[[Path, str], list[str]]
    rows: Callable[[Mapping[str, Any]], list[dict[str, str]]]
    """Function from its record to rows of the table, by heading."""


def _benchmark(name: str, full: str, tiny: str) -> Callable[[Path, str], list[str]]:
    return lambda folder, size: [
        "-m", f"analysis.benchmarks.{name}", *(full if size == "full" else tiny).format(folder=folder).split(),
    ]  # fmt: skip


def _step_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for precision, result in record["results"].items():
        for side, speed in result["pairs_per_second"].items():
            on_gpu = result["gpu"].get(side, {})
            rows.append(
                {
                    "side": f"{side}, {precision}",
                    "pairs/s": f"{speed:,.0f}",
                    "ratio": f"{result['ratio']['open_clip'] / result['ratio'][side]:.2f}",
                    "MFU": f"{result['mfu_executed'][side]:.2f}",
                    "MFU as if full": f"{result['mfu_full_context'][side]:.2f}",
                    "memory GiB": f"{on_gpu['memory_bytes'] / 2**30:.1f}" if on_gpu else "",
                    "gaps": f"{on_gpu['gaps']:.3f}" if on_gpu else "",
                }
            )
    return rows


def _train_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    sides = {name: runs for name, runs in record["records"].items() if runs}
    first = next(iter(sides.values()))[0]["pairs_per_second"]
    return [
        {
            "side": side,
            "pairs/s": f"{run['pairs_per_second']:,.0f}",
            "ratio": f"{run['pairs_per_second'] / first:.2f}",
            "MFU": f"{run['mfu_executed']:.2f}",
            "MFU as if full": f"{run['mfu_full_context']:.2f}",
            "waits for data": f"{run['data_wait']:.3f}",
        }
        for side, (run, *_) in sides.items()
    ]


def _test_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"side": ", ".join(f"{count} {outcome}" for outcome, count in record["outcomes"].items())}]


def _loss_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "side": f"{side}, {1000 * figures['seconds']:.1f} ms",
            "ratio": f"{record['medians']['open_clip']['seconds'] / figures['seconds']:.2f}",
            "memory GiB": f"{figures['bytes'] / 2**30:.2f}",
        }
        for side, figures in record["medians"].items()
    ]


def _packing_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "side": f"{way}, {kind}, {1000 * figures['seconds']:.1f} ms",
            "ratio": f"{ways['padded']['seconds'] / figures['seconds']:.2f}",
        }
        for kind, ways in record["results"].items()
        for way, figures in ways.items()
    ]


def _data_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "side": f"{name}, JPEGs of {side} pixels, one core",
            "pairs/s": f"{row[name]:,.0f}",
            "ratio": f"{row[name] / row['open_clip']:.2f}",
        }
        for side, row in record["figures"].items()
        for name in ("open_clip", "mmpretrain")
    ]


def _train(model: str, batch: int, epochs: int) -> Callable[[Path, str], list[str]]:
    full = f"--model {model} --batch {batch} --epochs {epochs} --workers {max(1, own_cores() - 2)} --device cuda"
    tiny = "--batch 16 --epochs 24 --workers 1 --device cpu"
    files = "--data speed --data-root {folder}/jpegs --runs {folder}/runs --seeds 0"
    return _benchmark("train_vs_open_clip", f"{files} {full}", f"{files} {tiny}")


_STEP = "--precision bf16 --captions 77 --best --steps 5"
_TINY_STEP = "--model emoji_clip --batch 4 --captions 24 --steps 2 --rounds 1 --round-steps 1 --precision bf16"
PARTS = {
    "step_b32": Part(_benchmark("step", f"--model ViT-B-32 --batch 1024 {_STEP}", _TINY_STEP), _step_rows),
    "tests": Part(lambda folder, size: ["-m", "pytest", "-q", "-m", "gpu", "tests"], _test_rows),
    "train_b32": Part(_train("ViT-B-32", 1024, 3), _train_rows),
    "step_l14": Part(_benchmark("step", f"--model ViT-L-14 --batch 128 {_STEP}", _TINY_STEP), _step_rows),
    "step_b16": Part(_benchmark("step", f"--model ViT-B-16 --batch 512 {_STEP}", _TINY_STEP), _step_rows),
    "train_b16": Part(_train("ViT-B-16", 512, 1), _train_rows),
    "train_l14": Part(_train("ViT-L-14", 128, 1), _train_rows),
    "loss_memory": Part(_benchmark("loss_memory", "--batch 32768", "--batch 256 --width 32 --rounds 1"), _loss_rows),
    "packing": Part(
        _benchmark("packing", "--batch 1024 --precision bf16", "--batch 8 --rounds 1 --precision bf16"), _packing_rows
    ),
    "data": Part(_benchmark("data", "--rounds 3", "--sides 256 --images 64 --rounds 1"), _data_rows),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, help="folder of the records")
    parser.add_argument("--parts", type=arguments.listed(arguments.one_of(*PARTS)), default=list(PARTS))
    parser.add_argument("--minutes", type=float, help="begin no part after this time")
    parser.add_argument("--open-clip-python", default=sys.executable, help="python of open_clip's environment")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for the CPU")
    args = parser.parse_args(argv)
    if args.size == "full" and not torch.cuda.is_available():
        parser.error("--size full without a GPU; expected one, or --size tiny")
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"{describe()}, commit {commit()}", flush=True)
    began, failed = time.monotonic(), []
    for name in args.parts:
        if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
            print(f"{name}: not begun, {args.minutes:g} minutes are over; give the same command again", flush=True)
            continue
        if (reason := run_part(name, args.output.resolve(), args.size, args.open_clip_python)) is not None:
            failed.append(name)
            print(f"{name}: {reason}", flush=True)
    table = table_of(args.output, args.parts)
    (args.output / "table.md").write_text(f"{describe()}\n\n{table}\n", encoding="utf-8")
    print(table)
    raise SystemExit(1 if failed else 0)


def run_part(name: str, folder: Path, size: str, open_clip_python: str) -> str | None:
    """Run a part unless it has a record. Returns: why it failed in one line, or None."""
    path, log = folder / f"{name}.json", folder / f"{name}.txt"
    command = PARTS[name].command(folder, size)
    asked = {"commit": commit(), "machine": describe(), "command": command}
    done = folder / f"{name}.asked.json"
    if (
        path.exists()
        and done.exists()
        and json.loads(done.read_text(encoding="utf-8")) == json.loads(json.dumps(asked))
    ):
        return None
    print(f"{name} ...", end=" ", flush=True)
    started = time.monotonic()
    output = ["--junitxml", str(folder / "tests.xml")] if name == "tests" else ["--output", str(path)]
    if name.startswith("train_"):
        reason = _run_training([*command, *output, "--open-clip-python", open_clip_python], folder, size, log)
    else:
        reason = _run([*command, *output], log)
    if name == "tests" and (folder / "tests.xml").exists():
        path.write_text(json.dumps({"outcomes": _outcomes(folder / "tests.xml")}), encoding="utf-8")
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    if reason is None:
        done.write_text(json.dumps(asked), encoding="utf-8")
    return reason


def _run(command: Sequence[str], log: Path) -> str | None:
    """Run a Python command with its output in a file. Returns: the last line that it printed if it fails, or None."""
    with log.open("ab") as file:
        code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if not code:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no output'} ({log})"


def _run_training(command: Sequence[str], folder: Path, size: str, log: Path) -> str | None:
    """Write tars if there are none, and train on them on both sides, or alone if open_clip's command fails."""
    tars = folder / "jpegs" / "train"
    if not any(tars.glob("*.tar")):
        number = "--tars 16 --images 4096" if size == "full" else "--tars 1 --images 64 --side 64"
        making = ["-m", "analysis.benchmarks.jpeg_tars", "--output", str(tars), *number.split()]
        if (reason := _run(making, log)) is not None:
            return reason
    reason = _run([*command, "--sides", "open_clip,mmpretrain"], log)
    if reason is None:
        return None
    print(f"open_clip's command failed, mmpretrain's runs alone ({reason}) ...", end=" ", flush=True)
    return _run([*command, "--sides", "mmpretrain"], log)


def _outcomes(report: Path) -> dict[str, int]:
    """Return the numbers of passed, failed and skipped tests in a report of pytest."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    wrong = count["failures"] + count["errors"]
    return {"passed": count["tests"] - wrong - count["skipped"], "failed": wrong, "skipped": count["skipped"]}


def table_of(folder: Path, parts: Sequence[str]) -> str:
    """Return the table of all parts that have a record, in Markdown."""
    lines = [f"| {' | '.join(ROWS)} |", "|" + "---|" * len(ROWS)]
    for name in parts:
        path = folder / f"{name}.json"
        if path.exists():
            rows = PARTS[name].rows(json.loads(path.read_text(encoding="utf-8")))
            lines += ["| " + " | ".join({"part": name, **row}.get(key, "") for key in ROWS) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
