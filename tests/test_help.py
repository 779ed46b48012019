"""What the commands say about themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs

CONF = Path(__file__).parents[1] / "conf"


def test_help_of_train_names_groups_values_and_examples(tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.train", ["--help", "experiment=quickstart"], tmp_path)
    assert finished.code == 0, finished.stderr
    for expected in (
        "python -m mmpretrain.train experiment=quickstart",
        "objective: " + ", ".join(sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))),
        "model: clip_b16, clip_b32, clip_mini, clip_tiny, huggingface, open_clip",
        "debug: dry_run, nan, overfit, profile, smoke",
        "batch_size: 64",  # the experiment's
        'eval "$(mmpretrain-train -sc install=bash)"',
    ):
        assert expected in finished.stdout, finished.stdout
    assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize("command", ["evaluate", "export", "embed", "interpolate", "demo"])
def test_other_commands_have_help(command: str, tmp_path: Path) -> None:
    finished = runs.run(f"mmpretrain.{command}", ["--help"], tmp_path)
    assert finished.code == 0, finished.stderr
    assert f"python -m mmpretrain.{command} checkpoint" in finished.stdout


def test_help_explains_a_key_with_the_overrides_that_are_given(tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.train", ["--help", "trainer.batch_size", "experiment=quickstart"], tmp_path)
    assert finished.code == 0, finished.stderr
    assert finished.stdout.startswith("trainer.batch_size = 64\n"), finished.stdout
    assert "Samples of a step" in finished.stdout
    assert not list(tmp_path.glob("runs"))


def test_help_of_an_evaluation_explains_its_keys(tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.evaluate", ["eval=[zero_shot]", "-h", "eval.zero_shot.every"], tmp_path)
    assert finished.code == 0, finished.stderr
    assert finished.stdout.startswith("eval.zero_shot.every = null\n"), finished.stdout


def test_the_key_may_follow_an_equals_sign(tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.train", ["--help=trainer.ema_decay"], tmp_path)
    assert finished.code == 0, finished.stderr
    assert finished.stdout.startswith("trainer.ema_decay = null\n"), finished.stdout
    assert "such as {linear:" in finished.stdout


def test_help_for_a_key_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    finished = runs.run("mmpretrain.train", ["--help", "trainer.batchsize"], tmp_path)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: --help trainer.batchsize: there is no such key; did you mean trainer.batch_size")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("objective=", {"objective=infonce", "objective=mae", "objective=sigmoid"}),
        ("experiment=quick", {"experiment=quickstart"}),
        ("trainer.batch_s", {"trainer.batch_size="}),
    ],
)
def test_the_shell_completes_groups_and_keys(typed: str, expected: set[str], tmp_path: Path) -> None:
    line = f"mmpretrain-train {typed}"
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    code = "import sys; sys.argv = ['mmpretrain-train', '-sc', 'query=bash']; from mmpretrain.train import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert expected <= set(finished.stdout.split())
