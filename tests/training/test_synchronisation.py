"""A step off the logging step neither waits for the device nor mixes devices or precisions.

Where there is no GPU, fake CUDA tensors stand for it (see `tests/cuda/steps.py`).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def outcomes_of(cases: list[str], library: Path) -> dict[str, dict[str, Any]]:
    """The error of each case, or None, and its calls of attention."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.cuda.steps", *cases],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return {case: outcome for line in finished.stdout.splitlines() for case, outcome in json.loads(line).items()}


def errors_of(cases: list[str], library: Path) -> dict[str, str | None]:
    """The error of each case, or None."""
    return {case: outcome["error"] for case, outcome in outcomes_of(cases, library).items()}


@pytest.mark.slow
def test_a_step_of_each_objective_alone_runs_on_fake_cuda_tensors(library: Path) -> None:
    cases = [f"one:{name}" for name in OBJECTIVES]
    assert errors_of(cases, library) == dict.fromkeys(cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["one", "ddp", "fsdp", "hsdp", "one-selective", "fsdp-blocks"],
)
def test_a_step_of_a_mix_runs_on_fake_cuda_tensors(strategy: str, library: Path) -> None:
    cases = [f"{strategy}:{'+'.join(mix)}" for mix in MIXES]
    assert errors_of(cases, library) == dict.fromkeys(cases)


@pytest.mark.slow
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
        "float16": "computes in float16",
        "index": "waits for a copy of indices [2]",
        "mask": "waits for the number of elements of a mask",
        "synchronize": "the host waits for the device",
        "stream": "the host waits for the device",
        "pageable": "waits for a copy of [24] from cpu to cuda",
        "unwaited": "waits for a copy of [] from cuda:0 to cpu",
    }
    assert {fault for fault, case in cases.items() if expected[fault] in (errors[case] or "")} == set(expected), errors


@pytest.mark.slow
def test_selective_checkpointing_saves_what_attention_by_segments_returns(library: Path) -> None:
    cases = {way: f"one{way}:infonce" for way in ("", "-selective", "-blocks")}
    outcomes = outcomes_of([*cases.values()], library)
    attentions = {way: outcomes[case]["attentions"] for way, case in cases.items()}
    assert attentions["-selective"] == attentions[""] > 0 and attentions["-blocks"] > attentions[""], attentions


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
