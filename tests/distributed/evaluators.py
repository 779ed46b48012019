"""Evaluators that read images themselves; a function for the pool."""

from dataclasses import replace
from pathlib import Path

from mmpretrain.evals.adversarial import Adversarial
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.cka import CKA
from mmpretrain.evals.memorised import Memorised
from mmpretrain.evals.robustness import Robustness
from tests.evals.test_robustness import context


def scores_of(folder: Path) -> tuple[dict[str, float], int]:
    """Return (scores, number of times that the run was asked to stop) on this rank."""
    asked: list[None] = []
    found = replace(context(folder), check_stop=lambda: asked.append(None))
    found.sets = {"val": replace(found.sets["val"], train=found.sets["val"].shards)}
    evaluators = {
        "robustness": Robustness(corruptions=("contrast", "shot_noise"), severities=(2, 5), max_samples=5),
        "adversarial": Adversarial(radii=(4,), steps=2, max_samples=7),
        "cka": CKA(str(folder / "run"), max_samples=3),
        "memorised": Memorised(chunk_size=4),
    }
    return dict(evaluate(evaluators, found)), len(asked)
