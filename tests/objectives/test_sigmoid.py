"""The pairwise sigmoid objective: SigLIP's loss of a batch, its learned temperature and bias."""

import pytest
import torch
from open_clip.loss import SigLipLoss

from mmpretrain.objectives.base import IndependentObjective
from mmpretrain.objectives.sigmoid import Sigmoid
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.objectives.references import embeddings


def test_loss_of_a_batch_is_open_clips() -> None:
    model = tiny.image_text().double()
    batch = tiny.batch([3, 5, 9, 9, 20])
    sigmoid = Sigmoid(model, init_logit_scale=20, init_logit_bias=-5).double()
    expected = SigLipLoss()(*embeddings(model, batch), sigmoid.logit_scale.exp(), sigmoid.logit_bias)
    loss = sigmoid.loss(*sigmoid.embed(Encodings(model, batch)))
    torch.testing.assert_close(loss, expected.squeeze(), rtol=1e-10, atol=0)


def test_temperature_and_bias_start_where_the_paper_starts_them_and_are_all_that_the_objective_owns() -> None:
    sigmoid = Sigmoid(tiny.image_text())
    own = {name: parameter.shape for name, parameter in sigmoid.named_parameters()}
    assert own == {"logit_scale": (1,), "logit_bias": (1,)}
    assert sigmoid.logit_scale.exp().item() == pytest.approx(10)
    assert sigmoid.logit_bias.item() == -10
    assert not isinstance(sigmoid, IndependentObjective)


def test_copies_in_a_batch_are_no_negatives_of_each_other() -> None:
    model = tiny.image_text().double()
    sigmoid = Sigmoid(model).double()
    rows, shared = sigmoid.embed(Encodings(model, tiny.batch([3, 5, 9])))
    copies = {**rows, "ids": torch.tensor([7, 7, 8])}
    assert sigmoid.loss(copies, shared) < sigmoid.loss(rows, shared)


def test_a_temperature_of_none_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^objective\.siglip\.init_logit_scale is 0; expected a number above 0"):
        Sigmoid(tiny.image_text(), init_logit_scale=0, config_path="objective.siglip")
