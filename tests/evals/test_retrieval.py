"""Retrieval against brute force, and on several processes."""

import json
import os
from collections.abc import Mapping
from math import comb
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.classes import Classes
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.contrastive_loss import ContrastiveLoss
from mmpretrain.evals.retrieval import Retrieval, match_ranks
from mmpretrain.evals.zero_shot import ZeroShot
from tests import runs
from tests.evals.held_out import LABELS, embedded, make_context, make_model, make_set

NUM_IMAGES, NUM_TEXTS = 11, 14
PAIRS = [(i, i) for i in range(11)] + [(0, 11), (0, 12), (3, 13), (4, 2), (5, 2), (6, 2), (6, 0)]
"""Many texts of an image (0, 3), many images of a text (2), and both (6)."""


def rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force_ranks(queries: Tensor, gallery: Tensor, pairs: list[tuple[int, int]]) -> list[int]:
    ranks = []
    for query in range(len(queries)):
        right = {item for q, item in pairs if q == query}
        similarities = [float((queries[query] * item).sum()) for item in gallery]
        best = max(similarities[item] for item in right)
        ranks.append(sum(similarities[item] >= best for item in range(len(gallery)) if item not in right))
    return ranks


@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_brute_force(chunk_size: int, seed: int) -> None:
    images, texts = rows(NUM_IMAGES, seed), rows(NUM_TEXTS, seed + 100)
    ranks = match_ranks(images, texts, torch.tensor(PAIRS), chunk_size).tolist()
    assert ranks == brute_force_ranks(images, texts, PAIRS)
    assert len(set(ranks)) > 4
    # Text 13 and the others each have an image; the order of pairs does not matter.
    backwards = [(text, image) for image, text in PAIRS]
    shuffled = torch.tensor(backwards)[torch.randperm(len(PAIRS))]
    assert match_ranks(texts, images, shuffled, chunk_size).tolist() == brute_force_ranks(texts, images, backwards)


def test_ties_count_against_the_model() -> None:
    queries, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert match_ranks(queries, gallery, torch.tensor([(0, 1)])).tolist() == [2]
    assert match_ranks(queries, gallery, torch.tensor([(0, 1), (0, 3)])).tolist() == [1]
    assert match_ranks(queries, gallery, torch.tensor([(0, 2)])).tolist() == [3]


def test_a_collapsed_model_scores_at_or_below_chance() -> None:
    data = embedded(torch.ones(NUM_IMAGES, 3), torch.ones(NUM_TEXTS, 3), PAIRS)
    scores = Retrieval(ks=(1, 5, 10))("val", make_context(_embedded={"val": data}))
    for name, column, gallery in (("text_retrieval", 0, NUM_TEXTS), ("image_retrieval", 1, NUM_IMAGES)):
        queries = sorted({pair[column] for pair in PAIRS})
        num_right = [sum(pair[column] == query for pair in PAIRS) for query in queries]
        for k in (1, 5, 10):
            chance = sum(1 - comb(gallery - right, k) / comb(gallery, k) for right in num_right) / len(queries)
            assert scores[f"{name}_recall@{k}"] <= chance
        assert scores[f"{name}_recall@5"] == 0


def test_numbers_that_are_none_count_as_wrong() -> None:
    images, texts = rows(NUM_IMAGES, 0), rows(NUM_TEXTS, 1)
    pairs = torch.tensor(PAIRS)
    before = match_ranks(images, texts, pairs)
    bad_texts = texts.clone()
    bad_texts[10] = torch.nan
    ranks = match_ranks(images, bad_texts, pairs)
    assert ranks[10] == NUM_TEXTS - 1, "its right answer is no number"
    assert bool((ranks[:10] >= before[:10]).all()), "what is no number stands in front of the right answers"
    bad_images = torch.full_like(images, torch.nan)
    assert match_ranks(bad_images, texts, pairs).min() >= NUM_TEXTS - 3


def test_recalls_are_the_parts_of_queries_that_find_an_answer() -> None:
    images, texts = rows(NUM_IMAGES, 2), rows(NUM_TEXTS, 3)
    context = make_context(_embedded={"val": embedded(images, texts, PAIRS)})
    scores = Retrieval(ks=(1, 3))("val", context)
    backwards = [(text, image) for image, text in PAIRS]
    for name, ranks in (
        ("text_retrieval", brute_force_ranks(images, texts, PAIRS)),
        ("image_retrieval", brute_force_ranks(texts, images, backwards)),
    ):
        for k in (1, 3):
            expected = sum(rank < k for rank in ranks) / len(ranks)
            assert scores[f"{name}_recall@{k}"] == pytest.approx(expected)
    assert len(scores) == 4


def test_an_image_without_text_is_no_query_but_stands_in_the_gallery() -> None:
    eye = torch.eye(3)
    texts = torch.tensor([[0.1, 0.0, 1.0], [0.0, 1.0, 0.0]])
    context = make_context(_embedded={"val": embedded(eye, texts, [(0, 0), (1, 1)])})
    scores = Retrieval(ks=(1,))("val", context)
    assert scores == {"text_retrieval_recall@1": 1.0, "image_retrieval_recall@1": 0.5}


def scores_of_a_rank(environment: Mapping[str, str], folder: Path) -> None:
    """One of several processes: every evaluator over a data set with samples that cannot be used."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    distributed.setup(torch.device("cpu"))
    data = make_set(folder, label="cls", classes=Classes(LABELS, [["a " + name, name] for name in LABELS]))
    context = make_context(make_model(), data)
    evaluators = {"r": Retrieval(ks=(1, 3, 5)), "z": ZeroShot(), "c": ContrastiveLoss(batch_size=8)}
    scores = evaluate(evaluators, context)
    refused = [each.key for each in context.embedded("val").refused]
    result = json.dumps([scores, refused, context.embedded("val").pairs.tolist()])
    (folder / f"rank{distributed.rank()}of{distributed.world_size()}.json").write_text(result)
    distributed.shut_down()


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    worlds = {size: tmp_path / str(size) for size in (1, 2, 3)}
    processes = []
    for size, folder in worlds.items():
        folder.mkdir()
        make_set(folder)
        for environment in runs.group(size):
            processes.append(runs.start(scores_of_a_rank, environment, folder))
    for process in processes:
        process.join(runs.DEADLINE_SECONDS)
        assert process.exitcode == 0
    (expected, refused, pairs) = json.loads((worlds[1] / "rank0of1.json").read_text())
    assert refused == ["000004", "000009"]
    assert 0 < expected["eval-val/text_retrieval_recall@5"] < 1
    for size, folder in worlds.items():
        for rank in range(size):
            scores, its_refused, its_pairs = json.loads((folder / f"rank{rank}of{size}.json").read_text())
            assert scores == pytest.approx(expected, rel=1e-5)
            assert (its_refused, its_pairs) == (refused, pairs)
