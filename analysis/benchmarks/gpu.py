r"""Run the CUDA tests and the benchmarks of a GPU, one after the other, the most telling first.

    python -m analysis.benchmarks.gpu --output DIR [--minutes 25] [--parts step_b32,train_b32] [--open-clip-python PYTHON]

Each part writes DIR/PART.json, and its output to DIR/PART.txt. A part with a record of this commit, machine and arguments is
not repeated, so the command may be stopped and given again. A part that cannot run, or takes longer than `--part-minutes`, is
named with the reason in one line, and the others run. After each part, DIR/table.md shows the records of this commit, machine
and arguments. MFU is the share of a matrix product timed in the same run, and `of peak` that of the card's dense
bf16 peak, where it is known (see machine.py).

- `step_*`: steps of ViT-B-32, L-14 and B-16 on batches in memory, captions of 77 tokens, bf16, beside open_clip's loop; both
  sides also compiled.
- `train_*`: whole training commands from tars of JPEGs of 512 x 512 pixels, beside open_clip's command in the environment of
  `--open-clip-python` (see train_vs_open_clip.py); if that fails, mmpretrain's alone.
- `tests`: the tests marked `gpu`. `loss_memory`, `packing`, `data`: the benchmarks of these names.

With `--size tiny` every part runs at a size for the CPU, to see that it runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.benchmarks import arguments
from analysis.benchmarks.machine import commit, describe, peak_flops_per_second
from mmpretrain.training.workers import own_cores

ROOT = Path(__file__).resolve().parents[2]
ROWS = (
    "part", "side", "pairs/s", "ratio", "MFU", "of peak", "MFU as if full", "memory GiB", "gaps", "waits for data",
)  # fmt: skip


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
                    "of peak": _of_peak(result["gflops_executed"][side] * 1e9 / result["seconds"][side]),
                    "MFU as if full": f"{result['mfu_full_context'][side]:.2f}",
                    "memory GiB": f"{on_gpu['memory_bytes'] / 2**30:.1f}" if on_gpu else "",
                    "gaps": f"{on_gpu['gaps']:.3f}" if on_gpu else "",
                }
            )
    return rows


def _of_peak(flops_per_second: float) -> str:
    peak = peak_flops_per_second()
    return "" if peak is None else f"{flops_per_second / peak:.2f}"


def _train_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    sides = {name: runs for name, runs in record["records"].items() if runs}
    reference = sides["open_clip"][0]["pairs_per_second"] if "open_clip" in sides else None
    failed = [{"side": f"{side}: failed: {reason}"} for side, reason in record.get("failed", {}).items()]
    return failed + [
        {
            "side": side,
            "pairs/s": f"{run['pairs_per_second']:,.0f}",
            "ratio": f"{run['pairs_per_second'] / reference:.2f}" if reference else "",
            "MFU": f"{run['mfu_executed']:.2f}",
            "of peak": _of_peak(run["mfu_executed"] * run["matmul_flops_per_second"]),
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
    parser.add_argument("--part-minutes", type=float, default=8.0, help="stop a command of a part after this time")
    parser.add_argument("--open-clip-python", default=sys.executable, help="python of open_clip's environment")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for the CPU")
    args = parser.parse_args(argv)
    if args.size == "full" and not torch.cuda.is_available():
        parser.error("--size full without a GPU; expected one, or --size tiny")
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"{describe()}, commit {commit()}", flush=True)
    began, failed, runs = time.monotonic(), [], {}
    try:
        for name in args.parts:
            run = runs[name] = PartRun(name, args.output.resolve(), args.size, args.open_clip_python, args.part_minutes)
            if run.is_done:
                continue
            if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
                print(f"{name}: not begun, {args.minutes:g} minutes are over; give the same command again", flush=True)
                continue
            if (reason := run.start()) is not None:
                failed.append(name)
                print(f"{name}: {reason}", flush=True)
            write_table(args.output, runs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the part that was running", flush=True)
        failed.append("stopped")
    print(write_table(args.output, runs))
    raise SystemExit(1 if failed else 0)


class PartRun:
    """Run of a part in a folder.

    Args:
        name: name of the part.
        folder: folder of the records.
        size: `full` or `tiny`.
        open_clip_python: python of open_clip's environment.
        minutes: time after which a command of the part is stopped.
    """

    def __init__(self, name: str, folder: Path, size: str, open_clip_python: str, minutes: float) -> None:
        self.name, self._folder, self._size, self._minutes = name, folder, size, minutes
        self._path, self._log, self._asked = (folder / f"{name}.{suffix}" for suffix in ("json", "txt", "asked.json"))
        self._command = PARTS[name].command(folder, size)
        if name.startswith("train_"):
            self._command += ["--open-clip-python", open_clip_python]

    @property
    def has_record(self) -> bool:
        """Whether there is a record of this commit, machine and command."""
        asked = _read(self._asked) or {}
        return {**asked, "failed": None} == {**self._described(), "failed": None} and _read(self._path) is not None

    @property
    def is_done(self) -> bool:
        """Whether there is a record, and nothing of the part failed."""
        return self.has_record and "failed" not in (_read(self._asked) or {})

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of the table."""
        return [{"part": self.name, **row} for row in PARTS[self.name].rows(_read(self._path) or {})]

    def start(self) -> str | None:
        """Run the part. Returns: why it failed in one line, or None."""
        self._asked.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        print(f"{self.name} ...", end=" ", flush=True)
        started = time.monotonic()
        if self.name == "tests":
            report = self._folder / "tests.xml"
            report.unlink(missing_ok=True)
            reason = self._run([*self._command, "--junitxml", str(report)])
            if report.exists():
                self._path.write_text(json.dumps({"outcomes": _outcomes(report)}), encoding="utf-8")
        else:
            command = [*self._command, "--output", str(self._path)]
            reason = self._run_training(command) if self.name.startswith("train_") else self._run(command)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
        if self._path.exists():  # failed tests have rows, too, but are repeated
            described = {**self._described(), **({} if reason is None else {"failed": reason})}
            self._asked.write_text(json.dumps(described), encoding="utf-8")
        return reason

    def _described(self) -> dict[str, Any]:
        return {"commit": commit(), "machine": describe(), "command": self._command}

    def _run(self, command: Sequence[str]) -> str | None:
        """Run a Python command with its output in a file. Returns: the last line that it printed if it fails, or None."""
        with self._log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
            try:
                code = process.wait(60 * self._minutes)
            except subprocess.TimeoutExpired:
                return f"stopped after {self._minutes:g} minutes (--part-minutes; {self._log})"
            finally:
                with suppress(ProcessLookupError):  # the whole session, since parts start processes of their own
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not code:
            return None
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'no output'} ({self._log})"

    def _run_training(self, command: Sequence[str]) -> str | None:
        """Write tars if there are none, and train on them on both sides, or alone if open_clip's command fails."""
        tars = self._folder / "jpegs" / "train"
        if not any(tars.glob("*.tar")):
            number = "--tars 16 --images 4096" if self._size == "full" else "--tars 1 --images 64 --side 64"
            making = ["-m", "analysis.benchmarks.jpeg_tars", "--output", str(tars), *number.split()]
            if (reason := self._run(making)) is not None:
                return reason
        failure = self._run([*command, "--sides", "open_clip,mmpretrain"])
        if failure is None:
            return None
        print("open_clip's command failed, mmpretrain's runs alone ...", end=" ", flush=True)
        reason = self._run([*command, "--sides", "mmpretrain"])
        if reason is None:
            failed = {"open_clip": f"{failure}; see --open-clip-python"}
            self._path.write_text(json.dumps({**(_read(self._path) or {}), "failed": failed}), encoding="utf-8")
        return reason


def _read(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None if the file is missing or not whole, as after a kill."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _outcomes(report: Path) -> dict[str, int]:
    """Return the numbers of passed, failed and skipped tests in a report of pytest."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    wrong = count["failures"] + count["errors"]
    return {"passed": count["tests"] - wrong - count["skipped"], "failed": wrong, "skipped": count["skipped"]}


def write_table(folder: Path, runs: Mapping[str, PartRun]) -> str:
    """Write the table of the records of this commit, machine and arguments to table.md, and return it, in Markdown."""
    lines = [f"| {' | '.join(ROWS)} |", "|" + "---|" * len(ROWS)]
    for run in runs.values():
        rows = run.rows() if run.has_record else []
        lines += ["| " + " | ".join(row.get(key, "") for key in ROWS) + " |" for row in rows]
    table = "\n".join(lines)
    (folder / "table.md").write_text(f"{describe()}, commit {commit()}\n\n{table}\n", encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
