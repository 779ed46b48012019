"""The debug presets by the real command."""

import json
import re
from pathlib import Path

import pytest

from tests import runs

HIDDEN = {"infonce": "objective=[infonce]", "sigmoid": "objective=[sigmoid]", "mae": "objective=[mae]"}


def debug(folder: Path, preset: str, *overrides: str) -> runs.Finished:
    """`debug=PRESET` of the tiny model, whose own settings do not stand in the preset's way."""
    kept = [o for o in runs.TINY_RUN if not o.startswith(("trainer.batch_size", "trainer.log_every", "optimizer.lr"))]
    return runs.run("mmpretrain.train", [*kept, f"debug={preset}", *overrides], folder)


@pytest.mark.slow
@pytest.mark.parametrize("objective", HIDDEN)
def test_overfit_memorises_one_batch(objective: str, pairs: Path, tmp_path: Path) -> None:
    width = 128 if objective == "mae" else 64  # fewer cannot hold the pixels of 16 images
    wide = (
        f"model.image.args.embed_dim={width}",
        "model.text.width=64",
        "model.embed_dim=32",
        "model.image.args.depth=2",
    )
    decoder = [o.replace("=32", "=128") for o in runs.TINY_MAE] if objective == "mae" else []
    finished = debug(tmp_path, "overfit", f"data.root={pairs}", HIDDEN[objective], *wide, *decoder, "eval=[]")
    assert finished.code == 0, finished.stderr
    assert runs.records(tmp_path / "run")[-1]["train/loss"] < 0.01


@pytest.mark.slow
def test_profile_leaves_a_trace(pairs: Path, tmp_path: Path) -> None:
    finished = debug(tmp_path, "profile", f"data.root={pairs}", "trainer.batch_size=16", "eval=[]")
    assert finished.code == 0, finished.stderr
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    steps = {name for name in names if re.fullmatch(r"ProfilerStep#\d+", name)}
    assert len(steps) == 10
    assert any("scaled_dot_product" in name or "addmm" in name for name in names)
    assert "aten::" in (tmp_path / "run" / "profile" / "operators.txt").read_text()


NAN = """
import torch
from torch import nn


class Broken(nn.Module):
    def __init__(self, model, stream: str = "pairs") -> None:
        super().__init__()
        self.streams = (stream,)

    def count(self, batch):
        return torch.tensor(1)

    def loss(self, encodings):
        x = encodings.image_embedding(self.streams[0])
        return (-x.square().sum()).sqrt()
"""


def test_nan_names_the_operation(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(NAN)
    (tmp_path / "conf" / "objective").mkdir(parents=True)
    (tmp_path / "conf" / "objective" / "broken.yaml").write_text("broken: {_target_: broken.Broken}\n")
    command = runs.Command(
        "mmpretrain.train",
        [*runs.TINY_RUN, "debug=nan", f"data.root={pairs}", f"hydra.searchpath=[file://{tmp_path}/conf]",
         "objective=[broken]", "eval=[]", "trainer.duration=3steps"],
        tmp_path,
        {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if "error: " in line]
    assert "step 1: Function 'SqrtBackward0' returned nan values" in line
    assert "(-x.square().sum()).sqrt()" in finished.stderr, "where it stands in the forward pass"


def test_smoke_does_everything_once(pairs: Path, tmp_path: Path) -> None:
    finished = debug(tmp_path, "smoke", f"data.root={pairs}", "eval=[retrieval,gallery]")
    assert finished.code == 0, finished.stderr
    assert runs.results(tmp_path / "run")["steps"] == 6
    assert (tmp_path / "run" / "pictures" / "eval-val.text_to_image.png").exists()
    assert (tmp_path / "run" / "report.html").exists()


def number(text: str, label: str) -> float:
    """The number in a row of the table."""
    (row,) = [line for line in text.splitlines() if label in line]
    match = re.search(r"([\d,]+(\.\d+)?)\s*(GFLOP|MiB|s|│)", row.rpartition(label)[2])
    assert match is not None, row
    return float(match[1].replace(",", ""))


def test_dry_run_says_what_a_run_costs_and_leaves_nothing(pairs: Path, tmp_path: Path) -> None:
    finished = debug(tmp_path, "dry_run", f"data.root={pairs}", "trainer.batch_size=16", "objective=[infonce,mae]",
                     *runs.TINY_MAE, "trainer.duration=100steps")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert "nothing was trained" in finished.stdout
    assert "100 steps" in finished.stdout
    assert number(finished.stdout, "parameters, text") > 1e6  # the vocabulary's
    assert not (tmp_path / "run").exists()
