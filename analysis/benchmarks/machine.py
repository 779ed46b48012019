"""Description of the machine that a benchmark ran on, and measurements of memory."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def cpu_name() -> str:
    """Return the processor's name from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe() -> dict[str, str | int]:
    """Return processor, usable cores and threads, vector instructions, GPU, and versions of libraries."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 operations per second by part of a card's name, from NVIDIA's data sheets."""


def peak_flops_per_second() -> float | None:
    """Return the dense bf16 peak of the GPU; None without one, or if its name is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def commit() -> str:
    """Return the commit of this checkout, followed by + if files differ from it; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def one_line() -> str:
    """Format `describe()` as one line."""
    return ", ".join(f"{key} {value}" for key, value in describe().items())


def write_record(args: argparse.Namespace, **figures: object) -> None:
    """Write the figures to `args.output`, if given, with the machine's description and the arguments."""
    if args.output is not None:
        record = {
            "machine": describe(),
            "commit": commit(),
            "arguments": {key: str(value) for key, value in vars(args).items()},
            **figures,
        }
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def demand(what: str, difference: float, limit: float) -> None:
    """Raise SystemExit if the difference of `what` exceeds `limit` or is NaN."""
    if not difference <= limit:
        raise SystemExit(f"{what} differ by {difference:.1e} of their value; expected {limit:.0e} at most")


def held_bytes(field: str) -> int:
    """Return a value of /proc/self/status in bytes: VmRSS (current) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def proportional_bytes() -> int:
    """Return the memory of this process in bytes, where a page that n processes share counts as an n-th (Linux's Pss)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Pss")


@contextmanager
def peak_bytes(device: str = "cpu") -> Iterator[list[int]]:
    """Inside the block memory is watched; behind it the list holds the peak beyond what was held before.

    Of the process (Linux's VmHWM), or of the CUDA allocator.
    """
    peak: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = held_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    yield peak
    peak.append((torch.cuda.max_memory_allocated() if device == "cuda" else held_bytes("VmHWM")) - before)
