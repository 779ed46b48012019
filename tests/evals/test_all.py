"""Every evaluator on a suite, in one command."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mmpretrain import evaluate
from mmpretrain.config import explain
from mmpretrain.config.schema import EvaluateConfig, register_schemas
from tests.saved_runs import save_run
from tests.suites import write_suite

PICTURES = {"gallery", "patch_similarity", "projector"}
"""Evaluators without scores."""


def config(*overrides: str) -> EvaluateConfig:
    """The command's configuration."""
    register_schemas()
    with initialize_config_module("mmpretrain.conf", version_base="1.3"):
        composed = OmegaConf.to_object(compose("evaluate", list(overrides)))
    assert isinstance(composed, EvaluateConfig)
    return composed


def test_all_are_those_that_give_scores() -> None:
    options = {path.stem for path in explain.CONF.glob("eval/*.yaml")}
    assert set(config("checkpoint=x", "eval=all").eval) == options - PICTURES - {
        "all",
        "cka",
    }  # cka needs a second model


@pytest.mark.slow
def test_all_applicable_evaluators_run_on_all_data_sets_of_a_suite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_run(tmp_path / "run")
    write_suite(tmp_path / "suite")
    suite = [f"data.root={tmp_path}", "data.suite=suite", "data.workers=0", "data.val_batch_size=16", "cache=none"]
    scores = evaluate.run(config(f"checkpoint={tmp_path / 'run'}", "eval=all", "device=cpu", *suite))
    found = {name.partition("/")[::2] for name in scores}
    for expected in (
        ("eval-labelled", "acc1"), ("eval-labelled", "ece"), ("eval-captioned", "image_retrieval_recall@1"),
        ("eval-shared", "text_retrieval_recall@5"), ("eval-shared", "contrastive_loss"), ("eval-captioned", "modality_gap"),
    ):  # fmt: skip
        assert expected in found
    # The suite has no training split, and no fields of json.
    idle = caplog.text.partition("give no score: ")[2]
    for name in ("linear_probe", "knn", "few_shot", "choice", "fairness", "memorised", "text_classification"):
        assert f"{name} needs " in idle
