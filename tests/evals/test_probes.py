"""Linear probe, nearest neighbours and few shots, against scikit-learn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.embeddings import Embedded
from mmpretrain.evals.few_shot import FewShot, drawn_order
from mmpretrain.evals.knn import KNN
from mmpretrain.evals.linear_probe import LinearProbe
from mmpretrain.evals.logistic_regression import choose_c, fit, scores_of
from tests.evals.held_out import embedded, make_context, make_set

NUM_CLASSES, WIDTH = 6, 10
CENTRES = torch.randn(NUM_CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))


def split(count: int, seed: int, collapsed: bool = False) -> Embedded:
    """Classes that overlap, of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.arange(1.0, NUM_CLASSES + 1), count, replacement=True, generator=generator)
    features = CENTRES[labels] * 1.5 + 2 * torch.randn(count, WIDTH, generator=generator)
    features = torch.ones_like(features) if collapsed else features
    return replace(embedded(features, torch.zeros(0, WIDTH), []), labels=labels)


def context(folder: Path, collapsed: bool = False) -> Context:
    data = make_set(folder, label="cls")
    cached = {"val": split(150, 2, collapsed), "val.train": split(400, 3, collapsed)}
    return make_context(data=replace(data, train=data.shards), _embedded=cached)


def unit(split: Embedded) -> tuple[Any, Any]:
    return F.normalize(split.features, dim=1).numpy(), split.labels.numpy()


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_the_fit_is_that_of_scikit_learn(c: float) -> None:
    train, test = split(400, 3), split(150, 2)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(
        train.features.double().numpy(), train.labels.numpy()
    )
    weights = fit(train.features.double(), train.labels, NUM_CLASSES, c)
    ours = scores_of(weights, test.features.double()).softmax(1)
    expected = theirs.predict_proba(test.features.double().numpy())
    assert np.abs(ours.numpy() - expected).max() < 5e-4  # derivatives of up to 1e-5 remain


def test_a_fit_from_another_solution_ends_at_the_same_one() -> None:
    train = split(400, 3)
    features = train.features.double()
    near = fit(features, train.labels, NUM_CLASSES, 0.01)
    torch.testing.assert_close(
        fit(features, train.labels, NUM_CLASSES, 1.0, near), fit(features, train.labels, NUM_CLASSES, 1.0),
        atol=1e-3, rtol=1e-3,
    )  # fmt: skip


def test_the_linear_probe_scores_like_scikit_learn(tmp_path: Path) -> None:
    scores = evaluate({"probe": LinearProbe(cs=[0.1])}, context(tmp_path))
    train, test = split(400, 3), split(150, 2)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=10_000).fit(train.features.numpy(), train.labels.numpy())
    assert scores["eval-val/linear_probe_acc1"] == pytest.approx(
        theirs.score(test.features.numpy(), test.labels.numpy())
    )
    assert scores["eval-val/linear_probe_c"] == 0.1
    assert set(scores["eval-val/linear_probe_acc1"].intervals) == {"sample", "class"}


def test_c_is_chosen_on_a_part_of_the_training_split_alone(tmp_path: Path) -> None:
    train, cs = split(400, 3), (1e-5, 1e-2, 1.0)
    chosen = choose_c(train.features, train.labels, NUM_CLASSES, cs, 0.2, 1000)
    scores = evaluate({"probe": LinearProbe(cs=cs)}, context(tmp_path))
    assert scores["eval-val/linear_probe_c"] == chosen > 1e-5
    # Features that tell nothing: every C is as good, and the strongest regularisation is chosen.
    assert choose_c(torch.ones(400, 3), train.labels, NUM_CLASSES, (1.0, 1e-2), 0.2, 1000) == 1e-2


def test_small_classes_decide_on_c_by_one_image_each() -> None:
    train = split(400, 3)
    chosen = torch.cat([(train.labels == label).nonzero()[: 2 + label % 3, 0] for label in range(NUM_CLASSES)])
    features, labels = train.features[chosen] + 3 * CENTRES[train.labels[chosen]], train.labels[chosen]
    # With the smallest C the sizes of the classes, 2 to 4 images, decide alone.
    assert choose_c(features, labels, NUM_CLASSES, (1e-6, 1.0), 0.2, 1000) == 1.0
    alone = torch.arange(4)
    with pytest.raises(
        UsageError, match=r"^cs has 2 values, but .* one sample of each class .*: eval.<name>.cs=\[1\]$"
    ):
        choose_c(torch.randn(4, 3), alone, 4, (0.1, 1.0), 0.2, 1000)


def test_neighbours_vote_like_scikit_learns(tmp_path: Path) -> None:
    def weights(distances: Any) -> Any:  # the cosine similarity of unit vectors is 1 - distance^2 / 2
        return np.exp((1 - distances**2 / 2) / 0.07)

    (train, labels), (test, expected) = unit(split(400, 3)), unit(split(150, 2))
    theirs = KNeighborsClassifier(20, weights=weights).fit(train, labels)
    scores = evaluate({"knn": KNN(chunk_size=64)}, context(tmp_path))
    assert scores["eval-val/knn_acc1"] == pytest.approx(theirs.score(test, expected))
    assert evaluate({"knn": KNN(k=1000)}, context(tmp_path))["eval-val/knn_acc1"] > 0


def test_few_shots_are_the_mean_over_draws(tmp_path: Path) -> None:
    scores = evaluate({"few": FewShot(shots=[1, 4], num_draws=2)}, context(tmp_path))
    (train, labels), (test, expected) = unit(split(400, 3)), unit(split(150, 2))
    for shots in (1, 4):
        found = []
        for draw in range(2):
            chosen = (drawn_order(torch.from_numpy(labels), draw) < shots).numpy()
            assert np.bincount(labels[chosen]).tolist() == [shots] * NUM_CLASSES
            theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(train[chosen], labels[chosen])
            found.append(theirs.score(test, expected))
        assert scores[f"eval-val/few_shot_acc1@{shots}"] == pytest.approx(np.mean(found), abs=0.004)


def test_draws_differ_and_fewer_shots_are_among_more() -> None:
    labels = torch.arange(60) % 3
    first, second = drawn_order(labels, 0), drawn_order(labels, 1)
    assert not torch.equal(first, second)
    assert sorted(first[labels == 0].tolist()) == list(range(20))


def test_a_collapsed_model_is_at_chance(tmp_path: Path) -> None:
    """It predicts one class for all images: no more than the part of the largest class, and 1 / C of the classes."""
    evaluators: dict[str, Any] = {"probe": LinearProbe(), "knn": KNN(), "few": FewShot(shots=[2])}
    scores = evaluate(evaluators, context(tmp_path, collapsed=True))
    largest = float(split(150, 2).labels.bincount().max()) / 150
    for name, score in scores.items():
        if name.endswith("acc1") or "acc1@" in name:
            assert score <= largest, name
        if name.endswith("mean_per_class_recall"):
            assert score <= 1 / NUM_CLASSES + 1e-9, name


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e15])  # the last one overflows in the fit
def test_a_diverged_model_has_no_hit(tmp_path: Path, value: float) -> None:
    found = context(tmp_path)
    cached = {name: replace(each, features=each.features * value) for name, each in found._embedded.items()}
    evaluators: dict[str, Any] = {"probe": LinearProbe()}
    if not np.isfinite(value):
        evaluators |= {"knn": KNN(), "few": FewShot(shots=[2])}
    scores = evaluate(evaluators, replace(found, _embedded=cached))
    assert {score for name, score in scores.items() if "_acc" in name or name.endswith("recall")} == {0.0}


def test_features_are_those_before_the_projection_or_the_embeddings(tmp_path: Path) -> None:
    scores = {}
    for features in ("pooled", "embedding"):
        cached = {"val": split(150, 2), "val.train": split(400, 3)}
        noise = {name: replace(each, images=torch.ones_like(each.images)) for name, each in cached.items()}
        changed = replace(context(tmp_path), _embedded=noise)
        probe = LinearProbe(features=features, cs=[1.0])  # type: ignore[arg-type]
        scores[features] = evaluate({"probe": probe}, changed)["eval-val/linear_probe_acc1"]
    assert scores["pooled"] > 0.6 > scores["embedding"]


def test_a_training_split_is_embedded_with_its_labels(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    data = make_set(tmp_path, label="cls")
    found = make_context(data=replace(data, train=make_set(tmp_path / "train").shards))
    scores = evaluate({"knn": KNN(k=1)}, found)
    assert scores["eval-val/knn_acc1"] == 1  # each image is its own nearest neighbour
    assert found.embedded_train("val").captions == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearProbe(cs=[]), "cs is \\[\\]; expected at least one strength"),
        (lambda: LinearProbe(cs=[0.0]), "cs is 0.0; expected a number above 0"),
        (lambda: LinearProbe(held_out_fraction=1.0), "held_out_fraction is 1.0"),
        (lambda: KNN(k=0), "k is 0; expected a number at least 1"),
        (lambda: KNN(temperature=0.0), "temperature is 0.0"),
        (lambda: FewShot(shots=[]), "shots is \\[\\]"),
        (lambda: FewShot(shots=[0]), "shots is 0"),
        (lambda: FewShot(num_draws=0), "num_draws is 0"),
    ],
)
def test_wrong_arguments_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_training_split_of_one_class_is_refused(tmp_path: Path) -> None:
    changed = context(tmp_path)
    changed._embedded["val.train"] = replace(split(9, 3), labels=torch.zeros(9, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"data.val.val.train has samples of 1 class; expected several"):
        evaluate({"knn": KNN()}, changed)


def test_without_a_training_split_or_labels_they_do_not_apply(tmp_path: Path) -> None:
    data = make_set(tmp_path)
    for evaluator in (LinearProbe(), KNN(), FewShot()):
        for lacking in (replace(data, label="cls"), replace(data, train=data.shards)):
            assert evaluator.applicable_datasets(make_context(data=lacking)) == []
