"""`checkpoint.best`."""

from pathlib import Path

from mmpretrain.checkpoints.load import find, load_checkpoint
from mmpretrain.training.resume import read_state
from tests import runs


def test_best_checkpoint_is_kept_and_can_be_named(pairs: Path, tmp_path: Path) -> None:
    metric = "eval-val/contrastive_loss"
    runs.trained(
        tmp_path, pairs, "trainer.duration=12steps", "trainer.eval_every=2steps", "eval=[contrastive_loss]",
        f"checkpoint.best={metric}", "checkpoint.keep_last=1", "checkpoint.every=100%", "optimizer.lr=0.05",
    )  # fmt: skip
    losses = {r["step"]: r[metric] for r in runs.records(tmp_path / "run") if metric in r}
    best = min(losses, key=lambda step: losses[step])
    assert len(losses) == 6
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best").read_text() == f"step_{best:08d}\n"
    assert {path.name for path in runs.checkpoints(tmp_path / "run")} == {f"step_{best:08d}", "step_00000012"}
    assert load_checkpoint(folder / "best").num_samples == best * runs.BATCH_SIZE
    assert read_state(find(folder / "best")[1]).best == losses[best]


def test_a_best_metric_that_nothing_gives_is_told_at_the_first_evaluation(pairs: Path, tmp_path: Path) -> None:
    settings = ("trainer.duration=4steps", "trainer.eval_every=1steps", "checkpoint.best=eval-val/acc1")
    finished = runs.train(tmp_path, f"data.root={pairs}", *settings)
    assert finished.code == 0
    told = "checkpoint.best is 'eval-val/acc1', which no evaluation gives; they give: eval-val/"
    assert finished.stderr.count(told) == 1
    assert finished.stderr.index(told) < finished.stderr.index("step 2/4")


def test_a_best_metric_of_a_data_set_that_is_not_evaluated_is_refused(pairs: Path, tmp_path: Path) -> None:
    finished = runs.trained(tmp_path, pairs, "checkpoint.best=eval-vall/acc1", "trainer.duration=1steps", code=2)
    assert finished.errors == [
        "error: checkpoint.best is 'eval-vall/acc1'; expected eval-<data set>/<metric> of a data set that is evaluated: val"
    ]
