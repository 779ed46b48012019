"""The benchmarks' checks, and all that fit this machine at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.benchmarks.machine import demand

SMALL = {
    "data": ["--sides", "256", "--images", "64", "--rounds", "1"],
    "grad_cache": ["--batch", "16", "--micro-batch", "8", "--image-size", "64"],
    "loss_memory": ["--batch", "256", "--width", "32", "--rounds", "1"],
    "order": ["--samples", "1e6", "--rounds", "1"],
    "packing": ["--batch", "8", "--rounds", "1"],
    "scaling": ["--processes", "1,2", "--batch", "8", "--steps", "1", "--timed", "1", "--rounds", "1"],
    "step": ["--model", "emoji_clip", "--batch", "4", "--steps", "2", "--rounds", "1", "--round-steps", "1"],
}


@pytest.mark.parametrize("difference", [2e-9, float("nan"), float("inf")])
def test_what_differs_or_is_no_number_ends_a_benchmark(difference: float) -> None:
    demand("gradients", 1e-9, 1e-9)
    with pytest.raises(SystemExit, match=r"gradients differ by .* expected 1e-09 at most"):
        demand("gradients", difference, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"analysis.benchmarks.{name}", *SMALL[name], "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["machine"]["cores"] > 0 and len(record) > 3
