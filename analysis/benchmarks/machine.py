"""The machine a benchmark ran on, for its table and its JSON."""

import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe() -> dict[str, str | int]:
    """Processor, usable cores and threads, vector instructions, GPU, and the versions that matter."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def one_line() -> str:
    """`describe()` as a line for a table's head."""
    return ", ".join(f"{key} {value}" for key, value in describe().items())
