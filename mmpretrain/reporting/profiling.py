"""Trace of some training steps for Perfetto or chrome://tracing."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger(__name__)

_WARM_UP_STEPS = 3


@contextmanager
def profiled(folder: Path, num_steps: int) -> Iterator[Callable[[], None]]:
    """Record `num_steps` steps after three warm-up steps in FOLDER/trace.json and FOLDER/operators.txt; none for 0.

    Yields: a function to call after each step.
    """
    if num_steps == 0:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        by_time = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        (folder / "operators.txt").write_text(by_time)
        log.info(
            "trace: %s (ui.perfetto.dev opens it), operators by time: operators.txt beside it", folder / "trace.json"
        )

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = schedule(wait=1, warmup=_WARM_UP_STEPS - 1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write, with_stack=False) as profiler:
        yield profiler.step


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work, for example before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
