"""Evaluators over data sets: names, intervals, what is shared, precision, and data sets or models that do not fit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, Evaluation, Evaluator, check_evaluator, chosen_sets, evaluate
from mmpretrain.evals.contrastive_loss import ContrastiveLoss
from mmpretrain.evals.gallery import Gallery
from mmpretrain.evals.patch_similarity import PatchSimilarity
from mmpretrain.evals.projector import Projector
from mmpretrain.evals.retrieval import Retrieval
from mmpretrain.evals.zero_shot import ZeroShot
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.reporting.writers import RunWriter
from mmpretrain.schedules import Clock, Duration
from mmpretrain.training.task import Task
from tests import tiny
from tests.evals.held_out import NUM_SAMPLES, TOKENIZER, WITHOUT_CAPTION, captions, make_context, make_model, make_set


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
        (
            ZeroShot(data=["val"]),
            r"^eval.mine.data has 'val', which lacks what it needs \(label and classes\); .*: there is none$",
        ),
        (
            ContrastiveLoss(data=["val"]),
            r"^eval.mine.data has 'val', which lacks what it needs \(caption, and a model with a logit scale\); .*",
        ),
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


def images_alone() -> ImageTextModel:
    torch.manual_seed(0)
    return ImageTextModel(tiny.vit(), None, embed_dim=12).eval()


def texts_alone() -> ImageTextModel:
    return ImageTextModel(None, tiny.text(vocab_size=TOKENIZER.vocab_size), embed_dim=12).eval()


class Texts:
    """An evaluator that needs no images."""

    towers = ("text",)
    data: Sequence[str] | None = None

    def applicable_datasets(self, context: Context) -> list[str]:
        return context.captioned_sets

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        embedded = context.embedded(name)
        return {"num_samples": len(embedded.images), "num_texts": len(embedded.texts), "width": embedded.texts.shape[1]}


def test_a_model_of_images_is_evaluated_by_what_needs_images_alone(tmp_path: Path) -> None:
    context = make_context(images_alone(), make_set(tmp_path, label="cls"))
    assert evaluate({"projector": Projector(num_images=7)}, context) == {}
    rows, labels, images = context.shown.projections["eval-val"]
    embedded = context.embedded("val")
    assert embedded.texts.shape == (len(embedded.captions), 0)
    pixels = torch.stack([context.image("val", row) for row in range(3)])
    torch.testing.assert_close(embedded.images[:3], images_alone().embed_images(pixels), rtol=1e-4, atol=1e-5)
    assert rows.shape == (7, tiny.WIDTH) and images.shape == (7, 3, 32, 32)
    assert labels[0] == embedded.captions[0], "captions are read, though not embedded"


def test_a_model_of_texts_is_evaluated_without_reading_images(tmp_path: Path) -> None:
    data = replace(make_set(tmp_path), preprocess=None)
    scores = evaluate({"texts": Texts()}, make_context(texts_alone(), data))
    # The sample without caption is refused, the one with a broken image is not.
    kept = [number for number in range(NUM_SAMPLES) if number != WITHOUT_CAPTION]
    assert scores == {
        "eval-val/num_samples": len(kept),
        "eval-val/num_texts": len({caption for number in kept for caption in captions(number)}),
        "eval-val/width": tiny.WIDTH,
    }


@pytest.mark.parametrize("evaluator", [Retrieval(), ZeroShot(), ContrastiveLoss(), Gallery(), PatchSimilarity()])
def test_evaluators_of_images_and_texts_refuse_a_model_of_one(tmp_path: Path, evaluator: Evaluator) -> None:
    for tower, model in (("text", images_alone()), ("image", texts_alone())):
        message = rf"^eval.mine embeds images and texts, but model.{tower} is null; expected evaluators .* eval=\[\]$"
        with pytest.raises(ValueError, match=message):
            evaluate({"mine": evaluator}, make_context(model, make_set(tmp_path)))


def test_an_evaluator_of_images_refuses_a_model_of_texts(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"^eval.mine embeds images, but model.image is null; .*\[text_classification,sentence_similarity\], or none",
    ):
        evaluate({"mine": Projector()}, make_context(texts_alone(), make_set(tmp_path)))


@pytest.mark.parametrize("towers", ["image", ("picture",)])
def test_towers_that_are_none_are_refused(tmp_path: Path, towers: Any) -> None:
    evaluator = Texts()
    evaluator.towers = towers
    with pytest.raises(ValueError, match=r"^eval.mine has towers = .*; expected a tuple of 'image', 'text' or both$"):
        evaluate({"mine": evaluator}, make_context(data=make_set(tmp_path)))


def make_task() -> Task:
    model = make_model()
    return Task(model, {"infonce": InfoNCE(model)})


def evaluation(folder: Path) -> Evaluation:
    """Retrieval after each 100 of 250 samples, and the others after each 30; a step has 10."""
    evaluators = {"retrieval": Retrieval(ks=(1,)), "loss": ContrastiveLoss(), "projector": Projector(num_images=3)}
    every = {"retrieval": "100samples", "loss": "30samples", "projector": "30samples"}
    durations = {name: Duration.parse(value, name) for name, value in every.items()}
    return Evaluation(evaluators, durations, Clock(10, 250, 250), make_context(data=make_set(folder)))


@pytest.mark.parametrize("score", [0.5, 1, np.float32(0.5), np.ones(()), torch.tensor(0.5), torch.ones(1)])
def test_scores_become_floats(tmp_path: Path, score: Any) -> None:
    evaluator = type("Mine", (Precision,), {"__call__": lambda self, name, context: {"x": score}})()
    (value,) = evaluate({"mine": evaluator}, make_context(data=make_set(tmp_path))).values()
    assert isinstance(value, float) and value == float(score)


@pytest.mark.parametrize("scores", [3.0, None, {"x": "abc"}, {"x": None}, {"x": torch.ones(2)}, {"x": [1.0]}])
def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, scores: Any) -> None:
    evaluator = type("Mine", (Precision,), {"__call__": lambda self, name, context: scores})()
    with pytest.raises(
        UsageError, match=r"^eval\.mine returned .*; expected a dictionary with a number for each metric$"
    ):
        evaluate({"mine": evaluator}, make_context(data=make_set(tmp_path)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"__call__": None}, r"Mine has no method __call__\(name, context\)"),
        ({"applicable_datasets": None}, r"Mine has no method applicable_datasets\(context\)"),
        ({"tower": ("image",)}, r"Mine.tower is no member of an evaluator; did you mean towers"),
        ({"applicable_dataset": None}, r"Mine.applicable_dataset is no member .* did you mean applicable_datasets"),
    ],
)
def test_an_evaluator_without_what_it_needs_is_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^eval\.mine: {message}"):
        check_evaluator(type("Mine", (Precision,), members)(), "mine")


def test_an_evaluator_may_leave_out_data_and_names_sets_that_there_are(tmp_path: Path) -> None:
    context = make_context(data=make_set(tmp_path))
    members = {"applicable_datasets": lambda self, context: ["val"], "__call__": lambda self, name, context: {}}
    assert chosen_sets("mine", type("Mine", (), members)(), context) == ["val"]
    other = type("Mine", (), {**members, "applicable_datasets": lambda self, context: ["val", "test"]})()
    with pytest.raises(ValueError, match=r"^eval.mine: applicable_datasets returned \['test'\]; .* of data.val: val$"):
        chosen_sets("mine", other, context)


def test_evaluators_are_run_at_their_intervals_and_all_at_the_end(tmp_path: Path) -> None:
    evaluations, task = evaluation(tmp_path), make_task()
    due = [samples for samples in range(10, 251, 10) if evaluations.is_due(samples)]
    assert due == [30, 60, 90, 100, 120, 150, 180, 200, 210, 240, 250]
    recalls = {"eval-val/text_retrieval_recall@1", "eval-val/image_retrieval_recall@1"}
    assert set(evaluations.run(task, 30, None)) == {"eval-val/contrastive_loss"}
    assert not evaluations.has_run_all
    assert set(evaluations.run(task, 100, None)) == recalls
    assert evaluations.has_run_all
    assert set(evaluations.run(task, 250, None)) == {*recalls, "eval-val/contrastive_loss"}


def test_each_run_sees_the_weights_and_the_temperature_of_its_moment(tmp_path: Path) -> None:
    evaluations, task = evaluation(tmp_path), make_task()
    before = evaluations.run(task, 250, None)
    assert before == evaluations.run(task, 250, None)
    tiny.randomize(task.model)
    moved = evaluations.run(task, 250, None)
    torch.nn.init.constant_(task.objectives["infonce"].logit_scale, 0.0)  # type: ignore[arg-type]
    flat = evaluations.run(task, 250, None)
    losses = [scores["eval-val/contrastive_loss"] for scores in (before, moved, flat)]
    assert len(set(losses)) == 3
    assert moved["eval-val/text_retrieval_recall@1"] == flat["eval-val/text_retrieval_recall@1"]


def test_pictures_go_to_the_writer(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    writer = RunWriter(
        tmp_path / "run", 0, 0, {"tensorboard": {"_target_": "mmpretrain.reporting.tensorboard.TensorBoard"}}
    )
    evaluation(tmp_path).run(make_task(), 30, writer)
    writer.close()
    assert list((tmp_path / "run" / "tensorboard").rglob("tensors.tsv"))


def test_a_signal_between_batches_ends_it(tmp_path: Path) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluation(tmp_path).run(make_task(), 30, None, stop)


def test_a_best_metric_is_of_a_data_set_that_is_evaluated(tmp_path: Path) -> None:
    evaluated = evaluation(tmp_path)
    evaluated.check_best("eval-val/acc1", has_average=False)
    evaluated.check_best("eval-val-ema/acc1", has_average=True)
    with pytest.raises(ValueError, match=r"^checkpoint.best is 'eval-x/acc1'; expected .* that is evaluated: val$"):
        evaluated.check_best("eval-x/acc1", has_average=True)
    with pytest.raises(
        ValueError, match=r"averages no weights; expected 'eval-val/acc1', or an average: trainer.ema_decay"
    ):
        evaluated.check_best("eval-val-ema/acc1", has_average=False)


def test_the_first_caption_of_an_image_is_one_place(tmp_path: Path) -> None:
    embedded = make_context(data=make_set(tmp_path)).embedded("val")
    pairs = embedded.pairs.tolist()
    assert embedded.first_texts == [
        next(text for i, text in pairs if i == image) for image in range(len(embedded.images))
    ]
    assert make_context(data=make_set(tmp_path, caption=None)).embedded("val").first_texts == [-1] * (NUM_SAMPLES - 1)


def test_evaluators_without_data_are_named(tmp_path: Path) -> None:
    evaluation = Evaluation(
        {"retrieval": Retrieval(), "zero_shot": ZeroShot()},
        {name: Duration.parse("1steps", name) for name in ("retrieval", "zero_shot")},
        Clock(16, 100, 160),
        make_context(data=make_set(tmp_path)),
    )
    assert evaluation.without_data == "zero_shot needs label and classes"
