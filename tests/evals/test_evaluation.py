"""Evaluators over data sets: names, what is shared, precision, and data sets that do not fit."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mmpretrain.evals.base import Context, Evaluator, evaluate
from mmpretrain.evals.contrastive_loss import ContrastiveLoss
from mmpretrain.evals.retrieval import Retrieval
from mmpretrain.evals.zero_shot import ZeroShot
from tests.evals.held_out import make_context, make_model, make_set


class Precision:
    """An evaluator that says in which precision it is run."""

    data: Sequence[str] | None = None

    def applicable_datasets(self, context: Context) -> list[str]:
        return list(context.sets)

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        rows = context.embedded(name).images
        is_float32 = (rows @ context.embedded_texts(["a cat"]).T).dtype == torch.float32
        return {"is_float32": float(is_float32), "training": float(context.model.training)}


def test_scores_are_named_by_data_set_and_metric(tmp_path: Path) -> None:
    context = make_context(data=make_set(tmp_path))
    scores = evaluate({"a": Retrieval(ks=(1,)), "b": ContrastiveLoss(), "c": ZeroShot()}, context)
    assert set(scores) == {
        "eval-val/text_retrieval_recall@1",
        "eval-val/image_retrieval_recall@1",
        "eval-val/contrastive_loss",
    }


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_evaluation_mode_meanwhile_and_then_as_before(tmp_path: Path, training: bool) -> None:
    model = make_model().train(training)
    scores = evaluate({"precision": Precision()}, make_context(model, make_set(tmp_path)))
    assert scores["eval-val/training"] == 0
    assert model.training == training


def test_bf16_is_for_the_models_passes_and_similarities_are_float32(tmp_path: Path) -> None:
    model, data = make_model(), make_set(tmp_path)
    exact, rounded = (
        make_context(model, data, autocast=torch.autocast("cpu", torch.bfloat16, enabled=enabled))
        for enabled in (False, True)
    )
    assert evaluate({"precision": Precision()}, rounded)["eval-val/is_float32"] == 1
    evaluate({"precision": Precision()}, exact)
    difference = (exact.embedded("val").images - rounded.embedded("val").images).abs().max()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (Retrieval(data=["test"]), r"^eval.mine.data has 'test', which is not in data.val; expected one of: val$"),
        (ZeroShot(data=["val"]), r"^eval.mine.data has 'val', which lacks what it needs; .*: there is none$"),
        (ContrastiveLoss(data=["val"]), r"^eval.mine.data has 'val', which lacks what it needs; .*: there is none$"),
    ],
)
def test_data_sets_that_an_evaluator_cannot_be_run_on_are_refused(
    tmp_path: Path, evaluator: Evaluator, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate({"mine": evaluator}, make_context(data=make_set(tmp_path), logit_scale=None))


def test_an_evaluator_is_run_on_the_data_sets_it_names(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    context = make_context()
    context.sets = {"a": data, "b": data, "c": data}
    scores = evaluate({"retrieval": Retrieval(data=["c", "a"], ks=(1,))}, context)
    assert {name.split("/")[0] for name in scores} == {"eval-a", "eval-c"}
