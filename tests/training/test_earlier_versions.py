"""Runs of an earlier commit: resumed bit for bit, evaluated and exported by the code at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

REPOSITORY = Path(__file__).resolve().parents[2]
BEFORE_THE_ROOMS = "7e73759"
"""The last commit whose modules lay flat in mmpretrain/."""

SETTINGS = (
    "schedule=constant",
    "trainer.ema_decay=0.9",
    "objective=[infonce,mae]",
    *runs.TINY_MAE,
    "checkpoint.keep_last=0",
)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The earlier commit's tree."""
    tree = tmp_path_factory.mktemp("earlier")
    archive = subprocess.run(["git", "archive", BEFORE_THE_ROOMS], cwd=REPOSITORY, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"needs the history of the repository: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
    (tree / "mmpretrain" / "conf").symlink_to("../conf")
    return tree


def train_earlier(tree: Path, folder: Path, *overrides: str) -> None:
    """`python -m mmpretrain.train` of the earlier commit."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmpretrain.train", *runs.TINY_RUN, *SETTINGS, *overrides]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_a_run_of_an_earlier_commit_goes_on_bit_for_bit(earlier: Path, pairs: Path, tmp_path: Path) -> None:
    data, whole, cut = f"data.root={pairs}", tmp_path / "whole", tmp_path / "cut"
    train_earlier(earlier, whole, data, "trainer.duration=6steps")
    train_earlier(earlier, cut, data, "trainer.duration=3steps")

    finished = runs.run("mmpretrain.evaluate", [f"checkpoint={cut / 'run'}", "eval=[retrieval]"], tmp_path)
    assert finished.code == 0, finished.stderr
    finished = runs.train(cut, *SETTINGS, data, "trainer.duration=6steps")
    assert finished.code == 0, finished.stderr
    assert "resumed from" in finished.stderr
    for name in ("model", "optimizer", "ema"):
        file = f"{name}.safetensors"
        assert runs.tensors(cut / "run", file) == runs.tensors(whole / "run", file), name
    # Of the last step also what is logged; the shorter run's third step was its last.
    found, expected = (runs.exact_outcome(folder / "run")["metrics"][-1] for folder in (cut, whole))
    assert found == expected
