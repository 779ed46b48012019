"""The pages of docs/extending/: a reader's files, by configuration alone, with the page's own commands."""

import csv
import re
import shlex
from pathlib import Path

from tests import runs

PAGES = Path(__file__).resolve().parents[2] / "docs" / "extending"
TRAIN = "PYTHONPATH=. python -m mmpretrain.train "


def follow(page: str, folder: Path) -> list[list[str]]:
    """Write the files of a page below `folder`, and return the arguments of each of its training commands."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for path, content in re.findall(r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(TRAIN)) for line in lines if line.startswith(TRAIN)]


def run_page(page: str, folder: Path, pairs: Path, *overrides: str, model: tuple[str, ...] = runs.TINY_MODEL) -> Path:
    """Run the training commands of a page on small data, with `overrides`, and return the folder of the last run."""
    commands = follow(page, folder)
    assert commands
    held_out = ("data.val.val.classes=null", "data.val.val.label=null", "~data.val.composition")
    settings = [setting for setting in runs.TINY_RUN if setting not in runs.TINY_MODEL and "eval=" not in setting]
    for arguments in commands:
        small = [*arguments, f"data.root={pairs}", "trainer.duration=6steps", "trainer.eval_every=6steps"]
        finished = runs.run(
            "mmpretrain.train", [*small, *held_out, *settings, *model, *overrides], folder, {"PYTHONPATH": "."}
        )
        assert finished.code == 0, finished.stderr
    return folder / "run"


def test_an_objective_with_a_teacher(pairs: Path, tmp_path: Path) -> None:
    run = run_page("objective", tmp_path, pairs)
    assert all("train/distillation_loss" in record for record in runs.records(run) if "train/loss" in record)


def test_an_evaluator(pairs: Path, tmp_path: Path) -> None:
    run = run_page("evaluator", tmp_path, pairs)
    assert -1 <= runs.results(run)["eval-val/alignment"] <= 1


def test_an_image_encoder(pairs: Path, tmp_path: Path) -> None:
    run = run_page("image_encoder", tmp_path, pairs, model=())
    assert any("image.layers.0.weight" in name for name in runs.weights(run, 6))


def test_a_schedule(pairs: Path, tmp_path: Path) -> None:
    run = run_page("schedule", tmp_path, pairs)
    rates = [record["train/lr"] for record in runs.records(run) if "train/lr" in record]
    assert rates[0] == max(rates) > rates[-1]


def test_a_metric_writer(pairs: Path, tmp_path: Path) -> None:
    run = run_page("metric_writer", tmp_path, pairs)
    with (run / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    written = {(int(row["step"]), row["name"]): float(row["value"]) for row in rows}
    expected = {
        (record["step"], name): value
        for record in runs.records(run)
        for name, value in record.items()
        if name not in ("step", "samples")
    }
    assert len(written) == len(rows) and written == expected
    assert (run / "tensorboard").is_dir()
