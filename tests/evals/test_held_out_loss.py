"""Held-out losses of objectives, against NumPy, on any number of ranks."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain import evaluate as evaluate_command
from mmpretrain.batch import Batch
from mmpretrain.config.schema import EvalDataConfig, EvalSetConfig, EvaluateConfig
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.embeddings import EvalSet, go_on
from mmpretrain.evals.held_out_loss import HeldOutLoss
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Objective
from mmpretrain.objectives.causal_lm import CausalLM
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.mae import MAE
from mmpretrain.objectives.mlm import MLM
from mmpretrain.scores import Score
from mmpretrain.seeds import draw, hash64, uniform
from tests import tiny
from tests.checkpoints.test_objectives import save_heads
from tests.evals.held_out import (
    BROKEN,
    NUM_SAMPLES,
    TOKENIZER,
    WITHOUT_CAPTION,
    captions,
    make_context,
    make_set,
    pixels,
)

VOCAB_SIZE = TOKENIZER.vocab_size + 1
DECODER: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def make_model(causal: bool = False) -> ImageTextModel:
    torch.manual_seed(0)
    text = tiny.text(vocab_size=VOCAB_SIZE, causal=causal)
    return tiny.randomize(ImageTextModel(tiny.vit(), text, embed_dim=12)).double()


def context_of(model: ImageTextModel, data: EvalSet, **objectives: nn.Module) -> Context:
    for objective in objectives.values():
        objective.double()
        if isinstance(objective, MLM):
            objective.set_tokenizer(TOKENIZER)
    return make_context(model, data, build_objectives=lambda: objectives)


def scores_of(context: Context, **options: Any) -> dict[str, Score]:
    found = evaluate({"held_out_loss": HeldOutLoss(**options)}, context)
    return {name.removeprefix("eval-val/"): score for name, score in found.items()}


def seed_of(sample: int) -> int:
    """The seed from which the masks of a held-out sample are drawn."""
    return draw(hash64("held-out"), sample)


@pytest.mark.parametrize("block_size", [1, 4, 50])
def test_mlm_is_the_perplexity_of_the_tokens_that_each_samples_seed_hides(tmp_path: Path, block_size: int) -> None:
    model = make_model()
    mlm = tiny.randomize(MLM(model, mask_ratio={"linear": {"0%": 0.1, "100%": 0.5}}, replaced=1.0, randomised=0.0))
    scores = scores_of(context_of(model, make_set(tmp_path), mlm=mlm), block_size=block_size)
    losses: list[float] = []
    hits: list[bool] = []
    salt = hash64("token-chosen", "mlm")
    for sample in [each for each in range(NUM_SAMPLES) if each != WITHOUT_CAPTION]:  # the broken image is not read
        (text,), _ = TOKENIZER([captions(sample)[0]])
        inside = range(1, len(text) - 1)
        chosen = [i for i in inside if uniform((seed_of(sample) ^ salt) & (1 << 64) - 1, i) < 0.5]  # the last ratio
        hidden = text.clone()
        hidden[chosen] = VOCAB_SIZE - 1
        with torch.no_grad():
            states = model.encode_text(hidden[None], torch.tensor([len(text)])).tokens[0, chosen]
            states = F.layer_norm(F.gelu(mlm.dense(states)), (tiny.WIDTH,), mlm.norm.weight, mlm.norm.bias)
            logits = (states @ model.text_encoder.token_embeddings.T + mlm.bias).numpy()
        for row, token in zip(logits, text[chosen].tolist(), strict=True):
            losses.append(float(np.logaddexp.reduce(row) - row[token]))
            hits.append(bool(row.argmax() == token))
    assert len(losses) > 20
    assert scores["mlm_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["mlm_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert scores["mlm_accuracy"] == np.mean(hits)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(tmp_path: Path) -> None:
    model = make_model(causal=True)
    with torch.no_grad():
        model.text_encoder.token_embeddings.zero_()
    scores = scores_of(context_of(model, make_set(tmp_path), causal_lm=CausalLM(model)), block_size=2)
    assert scores["causal_lm_perplexity"] == pytest.approx(VOCAB_SIZE, rel=1e-9)
    assert scores["causal_lm_accuracy"] == 0
    low, high = scores["causal_lm_perplexity"].intervals["sample"]
    assert low == pytest.approx(VOCAB_SIZE) and high == pytest.approx(VOCAB_SIZE)


def test_mae_is_the_error_of_the_patches_that_each_samples_seed_hides(tmp_path: Path) -> None:
    model = make_model()
    mae = MAE(model, mask_ratio=0.5, norm_pix=False, **DECODER)
    with torch.no_grad():
        mae.predict.weight.zero_()
        mae.predict.bias.fill_(0.25)  # the prediction of every pixel
    scores = scores_of(context_of(model, make_set(tmp_path), mae=mae))
    mean, std = (np.array(each.flatten().tolist()) for each in (model.pixel_mean, model.pixel_std))
    salt, size, errors = hash64("patch-mask", "mae"), tiny.PATCH_SIZE, []
    for sample in [each for each in range(NUM_SAMPLES) if each != BROKEN]:  # captions are not read
        seed = (seed_of(sample) ^ salt) & (1 << 64) - 1
        order = sorted(range(tiny.NUM_PATCHES), key=lambda i: _signed(draw(seed, i)))
        normal = (pixels(sample) - mean) / std
        for patch in order[tiny.NUM_PATCHES // 2 :]:
            row, column = patch // 4 * size, patch % 4 * size
            errors.append(np.mean((normal[row : row + size, column : column + size] - 0.25) ** 2))
    assert set(scores) == {"mae_loss"}
    assert scores["mae_loss"] == pytest.approx(np.mean(errors), rel=1e-9)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


class _Both(nn.Module):
    """An objective of images and texts that counts its samples, and notes how it was called."""

    streams = ("pairs",)

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.were_training: list[bool] = []

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch.streams["pairs"]))

    def loss(self, encodings: Any) -> Tensor:
        self.were_training.append(self.dropout.training)
        images, (text, _) = encodings.batch.images("pairs"), encodings.batch.texts("pairs")
        return self.weight * (images.double().mean((1, 2, 3)).sum() + 0 * text.sum())


def test_objectives_are_evaluated_where_the_data_has_what_they_read(tmp_path: Path) -> None:
    model, data = make_model(), make_set(tmp_path)
    objectives: dict[str, Objective] = {
        "mae": MAE(model, **DECODER).double(),
        "mlm": MLM(model).double(),
        "both": _Both(model),
        "infonce": InfoNCE(model),
    }
    sets = {
        "pairs": data,
        "images": replace(data, name="images", caption=None),
        "texts": replace(data, name="texts", preprocess=None),
    }
    context = Context(model, TOKENIZER, sets, 10.0, 4, 0, build_objectives=lambda: objectives)
    objectives["mlm"].set_tokenizer(TOKENIZER)
    scores = evaluate({"held_out_loss": HeldOutLoss()}, context)
    assert {name for name in scores if name.endswith("_loss")} == {
        *(f"eval-pairs/{name}_loss" for name in ("mae", "mlm", "both")), "eval-images/mae_loss", "eval-texts/mlm_loss",
    }  # fmt: skip
    assert HeldOutLoss(objectives=["both"]).applicable_datasets(context) == ["pairs"]
    means = [pixels(i).mean() for i in range(NUM_SAMPLES) if i not in (BROKEN, WITHOUT_CAPTION)]
    assert scores["eval-pairs/both_loss"] == pytest.approx(np.mean(means))
    both = objectives["both"]
    assert not any(both.were_training) and both.dropout.training
    for wrong in ("absent", "infonce"):
        with pytest.raises(UsageError, match=f"objectives has '{wrong}'; expected .*: mae, mlm, both$"):
            evaluate({"held_out_loss": HeldOutLoss(objectives=[wrong])}, context)
    assert HeldOutLoss().applicable_datasets(make_context(model, data)) == []  # a model of another library


def test_the_interval_is_that_of_a_mean_over_blocks(tmp_path: Path) -> None:
    """For means of single samples it is about 2 standard errors to each side."""
    model = make_model()
    scores = scores_of(context_of(model, make_set(tmp_path), both=_Both(model)), block_size=1)
    low, high = scores["both_loss"].intervals["sample"]
    means = np.array([pixels(i).mean() for i in range(NUM_SAMPLES) if i not in (BROKEN, WITHOUT_CAPTION)])
    error = means.std() / math.sqrt(len(means))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert (
        scores_of(context_of(model, make_set(tmp_path), both=_Both(model)), block_size=8)["both_loss"].intervals == {}
    )


def evaluate_untrained(folder: Path) -> dict[str, Score]:
    """Held-out losses of an untrained model on this rank."""
    model = make_model()
    mae, mlm = MAE(model, mask_ratio=(0.3, 0.8), **DECODER), MLM(model)
    return scores_of(context_of(model, make_set(folder), mae=tiny.randomize(mae), mlm=mlm), block_size=3)


def test_a_set_without_any_term_is_refused_in_one_line(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(UsageError, match=r"data.val.val: mlm has no terms on it"):
        scores_of(context_of(model, make_set(tmp_path), mlm=MLM(model, mask_ratio=1e-9)))


def test_a_checkpoint_has_the_losses_of_the_task_that_was_saved(tmp_path: Path) -> None:
    task = save_heads(tmp_path / "run")
    data = make_set(tmp_path)
    assert data.caption is not None
    context = Context(task.model, ClipTokenizer(16), {"val": data}, None, 4, 0)
    expected = evaluate({"held_out_loss": HeldOutLoss()}, context.of(task, go_on))
    assert set(expected) == {f"eval-val/{name}" for name in ("mae_loss", "mlm_loss", "mlm_perplexity", "mlm_accuracy")}
    val = {"val": EvalSetConfig(shards=[str(path) for path in sorted(tmp_path.glob("*.tar"))], caption=data.caption)}
    options = EvalDataConfig(workers=0, val_batch_size=4, root=".", val=val)
    node = {"_target_": "mmpretrain.evals.held_out_loss.HeldOutLoss"}
    cfg = EvaluateConfig(
        str(tmp_path / "run"),
        device="cpu",
        ema=False,
        precision=None,
        data=options,
        eval={"held_out_loss": node},
        cache="none",
    )
    assert evaluate_command.run(cfg) == expected
