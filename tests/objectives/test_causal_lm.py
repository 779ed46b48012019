"""Next-token prediction against torch's own layers, text by text."""

import pytest
import torch
import torch.nn.functional as F

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import IndependentObjective, hooks_of
from mmpretrain.objectives.causal_lm import CausalLM
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.objectives.references import text_states

LENGTHS = (3, 20, 9, 32, 1, 5, 2)


def test_loss_is_that_of_torchs_layers_text_by_text() -> None:
    model = tiny.image_text().double()
    assert model.text is not None
    batch = tiny.batch(LENGTHS)
    text, lengths = batch.texts("pairs")
    expected, hits = torch.zeros((), dtype=torch.float64), 0
    for ids, length in zip(text, lengths.tolist(), strict=True):
        logits = text_states(model.text, ids[:length])[0, :-1] @ model.text.token_embedding.weight.T
        expected = expected + F.cross_entropy(logits, ids[1:length], reduction="sum")
        hits += int((logits.argmax(-1) == ids[1:length]).sum())
    objective = CausalLM(model)
    loss, others = objective.loss(Encodings(model, batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert int(others["accuracy"]) == hits
    assert objective.count(batch).item() == sum(LENGTHS) - len(LENGTHS)
    assert next(objective.parameters(), None) is None, "the output matrix is the encoder's"


def test_it_is_independent_and_logs_its_perplexity() -> None:
    objective = CausalLM(tiny.image_text())
    assert isinstance(objective, IndependentObjective)
    assert hooks_of(objective).perplexity


def test_a_text_encoder_that_is_missing_or_bidirectional_is_refused() -> None:
    for model in (ImageTextModel(tiny.vit(), None), ImageTextModel(tiny.vit(), tiny.text(causal=False), embed_dim=12)):
        with pytest.raises(
            ValueError, match=r"^objective\.lm2 needs a causal text encoder; set model\.text\.causal=true"
        ):
            CausalLM(model, config_path="objective.lm2")
