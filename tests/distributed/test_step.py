"""The step's mathematics does not depend on ranks or micro-batches, and is that of other people's losses."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.batch import Batch
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.probe import reached_parameters
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Encodings
from tests.distributed.pool import Pool
from tests.distributed.steps import (
    BATCH_SIZE,
    Result,
    late_flags,
    make_batches,
    make_task,
    open_clip_step,
    our_step,
    ragged,
    refused_on_main,
    rows_of_the_head,
    split_losses,
    split_nt_xent,
    step,
    told_by_main,
)

Pools = Callable[[int], Pool]
MIXES = [
    ("infonce",),
    ("sigmoid",),
    ("multi_positive",),
    ("mae",),
    ("mae_fixed",),
    ("mlm",),
    ("mlm_words",),
    ("causal_lm",),
    ("captioning",),
    ("coca",),
    ("cappa",),
    ("classification", "classification_text"),
    ("prototypical",),
    ("simclr",),
    ("simclr_layer",),
    ("flip",),
    ("flip_block",),
    ("distillation",),
    ("infonce", "distillation"),
    ("infonce", "mae"),
    ("flip", "mae_images", "mlm_texts"),
    ("infonce", "mae", "mlm"),
    ("infonce", "simclr"),
    ("infonce", "coca", "causal_lm"),
    ("infonce", "sigmoid", "mae"),
]
WEIGHTS = dict.fromkeys((name for mix in MIXES for name in mix), 1.0) | {"sigmoid": 0.3, "mae": 0.7, "coca": 2.0}
COUPLED = ("infonce", "sigmoid", "multi_positive", "simclr", "simclr_layer", "flip", "flip_block", "prototypical")


def whole_batch_gradients(objectives: tuple[str, ...]) -> Result:
    """The plain graph: every loss on the whole batch, no gathering, no caching."""
    task = make_task(objectives)
    (batch,) = make_batches(1)
    encodings = Encodings(task.model, batch)
    losses: dict[str, Tensor] = {}
    for name, objective in task.objectives.items():
        if name in COUPLED:
            losses[name] = objective.loss(*objective.embed(encodings))  # type: ignore[union-attr, call-arg]
        else:
            terms = objective.loss(encodings)  # type: ignore[union-attr, call-arg]
            losses[name] = (terms[0] if isinstance(terms, tuple) else terms) / objective.count(batch)  # type: ignore[union-attr]
    sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def assert_same(ours: Result, reference: Result) -> None:
    losses, gradients = ours
    assert losses == pytest.approx(reference[0], rel=1e-10)
    assert set(gradients) == set(reference[1])
    total = torch.stack([gradient.norm() for gradient in reference[1].values()]).norm()
    for name, expected in reference[1].items():
        assert expected.abs().max() > 0, f"{name} has no gradient to compare"
        # A shift in front of BatchNorm has no gradient but rounding: it is held against that of all parameters.
        error = (gradients[name] - expected).norm() / max(expected.norm(), 1e-3 * total)
        # SimCLR's head normalises short rows behind its layer norms, which loses a digit more.
        assert error < (1e-9 if "simclr_layer" in name else 1e-10), f"{name}: {error}"


@pytest.mark.parametrize("objectives", MIXES, ids="+".join)
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_one_process_gives_the_gradients_of_the_plain_graph(
    objectives: tuple[str, ...], num_micro_batches: int
) -> None:
    assert_same(step(objectives, num_micro_batches, WEIGHTS), whole_batch_gradients(objectives))


@pytest.mark.parametrize("objectives", MIXES, ids="+".join)
@pytest.mark.parametrize(
    ("world_size", "num_micro_batches"), [(2, 1), (2, 4), (4, 1), pytest.param(4, 4, marks=pytest.mark.slow)]
)
def test_several_ranks_give_the_gradients_of_the_plain_graph(
    pool: Pools, objectives: tuple[str, ...], world_size: int, num_micro_batches: int
) -> None:
    reference = whole_batch_gradients(objectives)
    for result in pool(world_size).run(step, objectives, num_micro_batches, WEIGHTS):
        assert_same(result, reference)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_the_coupled_losses_are_open_clips(pool: Pools, kind: str) -> None:
    for world_size in (1, 2, 4):
        if world_size == 1:
            assert_same(our_step(kind), open_clip_step(kind))
        else:
            ours, theirs = pool(world_size).run(our_step, kind), pool(world_size).run(open_clip_step, kind)
            for mine, reference in zip(ours, theirs, strict=True):
                assert_same(mine, reference)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_an_objective_of_weight_0_is_not_computed(num_micro_batches: int) -> None:
    weights = {"infonce": 1.0, "mae": 0.0, "sigmoid": 0.0}
    task = make_task(("infonce", "mae", "sigmoid"))

    def fail(*_: object) -> None:
        raise AssertionError("it was asked")

    for name in ("mae", "sigmoid"):
        for method in ("count", "embed", "loss"):
            setattr(task.objectives[name], method, fail)
    losses = forward_backward(task, task, make_batches(num_micro_batches), weights)
    assert list(losses.reduced()) == ["infonce"]
    alone = make_task(("infonce",))
    forward_backward(alone, alone, make_batches(num_micro_batches), {"infonce": 1.0})
    expected = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.grad is not None}
    gradients = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_a_mean_of_per_rank_means_would_have_been_noticed() -> None:
    """Ragged masks: the halves of the batch hide different numbers of patches."""
    task = make_task(("mae",))
    halves = [task.counted(batch, {"mae": 1.0}).counts["mae"] for batch in make_batches(2)]
    assert halves[0] != halves[1]


def test_a_sample_is_no_negative_of_its_copy() -> None:
    torch.manual_seed(3)
    rows = F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)
    rows = rows[[0, 1, 2, 3, 1]]
    texts = F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)[[0, 1, 2, 3, 1]]
    scale = torch.tensor([5.0], dtype=torch.float64)
    objective = make_task(("infonce",)).objectives["infonce"]
    ids = torch.tensor([0, 1, 2, 3, 1])
    loss = objective.loss({"image": rows, "text": texts, "ids": ids}, {"logit_scale": scale})  # type: ignore[call-arg, arg-type]
    similarity = (scale * rows @ texts.T).exp()
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or ids[j] != ids[i]]
        expected -= float((similarity[i, i] / similarity[i, others].sum()).log()) / 10
        expected -= float((similarity[i, i] / similarity[others, i].sum()).log()) / 10
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_unreached_parameters_are_frozen_and_named() -> None:
    task = make_task(("mae_fixed",))
    frozen = Freeze(task, {}, reached_parameters(task, make_batches(1)[0])).unreached
    assert {"model.text.token_embedding.weight", "model.image_projection.weight"} <= set(frozen)
    for name, parameter in task.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        assert parameter.grad is None
    assert task.training


def test_flags_of_one_rank_reach_all_in_the_same_step(pool: Pools) -> None:
    expected = [{}, {"stop": 0.0, "step": 0.0}, {"stop": 1.0, "step": 1.0}, {"stop": 0.0, "step": 2.0}]
    assert pool(2).run(late_flags) == [expected, expected]


def test_the_pass_that_gathers_rows_computes_no_other_objective_and_draws_the_same_dropout() -> None:
    task = make_task(("mae", "infonce"), proj_drop_rate=0.2)
    decoded, embedded = [], []
    task.objectives["mae"].norm.register_forward_hook(lambda *_: decoded.append(1))  # type: ignore[attr-defined]
    task.model.image_projection.register_forward_hook(lambda *call: embedded.append(call[-1].detach()))  # type: ignore[union-attr]
    forward_backward(task, task, make_batches(4), {"mae": 1.0, "infonce": 1.0})
    assert len(decoded) == 4 and len(embedded) == 8
    assert torch.equal(torch.stack(embedded[:4]), torch.stack(embedded[4:]))


def test_what_process_0_finds_or_refuses_every_process_does(pool: Pools) -> None:
    assert pool(2).run(told_by_main) == [10, 10]
    assert pool(2).run(refused_on_main) == ["none of the checkpoints verifies"] * 2


def test_ragged_rows_are_gathered_in_the_order_of_ranks(pool: Pools) -> None:
    for gathered in pool(4).run(ragged, 1):
        assert gathered[:, 0].tolist() == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    for gathered in pool(2).run(ragged, 0):
        assert gathered.shape == (0, 2), "a data set without captions has no texts on any rank"


@pytest.mark.parametrize("num_rows", [1, 5, 8])
def test_a_split_loss_has_every_row_whatever_their_number(num_rows: int, pool: Pools) -> None:
    expected = split_losses(num_rows)
    for found in pool(2).run(split_losses, num_rows):
        for ours, one in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_rows", [1, 5, 8])
def test_the_split_loss_of_views_has_every_row(num_rows: int, pool: Pools) -> None:
    expected = split_nt_xent(num_rows)
    for found in pool(2).run(split_nt_xent, num_rows):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objectives", [("mae",), ("infonce", "mae")])
def test_micro_batches_are_transferred_one_ahead(objectives: tuple[str, ...]) -> None:
    """At most the previous, the current and the next one are on the device, and the gradients are the same."""
    made: list[weakref.ref[Batch]] = []
    most = 0

    started, arrived = [], []

    def transfer(batch: Batch) -> Callable[[], Batch]:
        nonlocal most
        there = replace(batch)
        made.append(weakref.ref(there))
        most = max(most, sum(each() is not None for each in made))
        number = len(made)
        started.append(number)

        def arrive() -> Batch:
            arrived.append((number, max(started)))
            return there

        return arrive

    gradients = []
    for ahead in (None, transfer):
        task = make_task(objectives)
        forward_backward(task, task, make_batches(8), dict.fromkeys(objectives, 1.0), transfer=ahead)
        gradients.append([p.grad for p in task.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert 1 < most <= 3
    assert all(last == min(number + 1, len(made)) for number, last in arrived[-8:]), "waited for too early or too late"


def test_each_rank_projects_its_own_views(pool: Pools) -> None:
    assert pool(2).run(rows_of_the_head) == [[BATCH_SIZE // 2] * 2] * 2
