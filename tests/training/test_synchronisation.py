"""A step off the logging step neither waits for the device nor mixes devices or precisions.

Where there is no GPU, fake CUDA tensors stand for it (see `tests/cuda/steps.py`).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis.benchmarks import fake_cuda
from tests.cuda.steps import FAULTS, Steps
from tests.distributed.steps import RANDOM, make_batches, make_task

MIXES = (
    ("infonce", "multi_positive", "sigmoid", "mae"),
    ("coca", "cappa", "simclr_layer", "flip"),
    ("infonce", "mae_fixed", "mae_images", "mlm", "mlm_texts"),
    ("simclr", "captioning", "causal_lm"),
    ("flip_block", "mlm_words"),
)
OBJECTIVES = sorted({name for mix in MIXES for name in mix})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtime = fake_cuda.cuda_runtime()
    if runtime is None or shutil.which("gcc") is None:
        pytest.skip("needs a PyTorch built with CUDA, and gcc")
    return fake_cuda.build(tmp_path_factory.mktemp("stub"), runtime)


def errors_of(cases: list[str], library: Path) -> dict[str, str | None]:
    """The error of each case, or None."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.cuda.steps", *cases],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return {case: error for line in finished.stdout.splitlines() for case, error in json.loads(line).items()}


@pytest.mark.slow
def test_a_step_of_each_objective_alone_runs_on_fake_cuda_tensors(library: Path) -> None:
    cases = [f"one:{name}" for name in OBJECTIVES]
    assert errors_of(cases, library) == dict.fromkeys(cases)


@pytest.mark.parametrize("strategy", ["one", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp"))])
def test_a_step_of_a_mix_runs_on_fake_cuda_tensors(strategy: str, library: Path) -> None:
    cases = [f"{strategy}:{'+'.join(mix)}" for mix in MIXES]
    assert errors_of(cases, library) == dict.fromkeys(cases)


def test_a_layer_that_waits_or_mixes_devices_or_precisions_fails(library: Path) -> None:
    cases = {fault: f"one:mae:{fault}" for fault in FAULTS}
    errors = errors_of(list(cases.values()), library)
    assert errors[cases.pop("none")] is None
    expected = {
        "item": "_local_scalar_dense",
        "constant": "at least two devices, cuda:0 and cpu",
        "copied_constant": "waits for a copy of values",
        "nonzero": "DynamicOutputShapeException: aten.nonzero",
        "float64": "widens to float64",
        "float32": "computes in torch.float32",
    }
    assert {fault for fault, case in cases.items() if expected[fault] in (errors[case] or "")} == set(expected), errors


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_a_step_does_not_wait_for_the_gpu(mix: tuple[str, ...]) -> None:
    device, task = torch.device("cuda"), make_task(mix, 0.1, **RANDOM).float()
    batches = [task.counted(batch, dict.fromkeys(mix, 0.5)).pin_memory() for batch in make_batches(2)]
    task = task.to(device)
    steps = Steps(task, task, batches, device)
    steps.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
