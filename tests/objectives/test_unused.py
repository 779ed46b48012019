"""Objectives and views that a run does not use cost nothing."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from mmpretrain.build import build_streams, build_task, build_tokenizer
from mmpretrain.config.resolve import resolve
from mmpretrain.config.schema import register_schemas
from mmpretrain.data.order import step_positions
from mmpretrain.schedules import TrainingProgress
from tests import runs


def test_an_objective_of_weight_0_leaves_no_trace(pairs: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, overrides in (
        # The text encoder is mlm's, whatever its weight.
        ("without", ("objective=[infonce]", "model.text.causal=false", "model.text.vocab_size=49409")),
        ("with", ("objective=[infonce,mae,mlm,simclr]", *runs.TINY_MAE, "objective.mae.weight=0", "objective.simclr.weight=0",
                  "objective.mlm.weight={piecewise: {0%: 0, 50%: 0}}",
                  "objective.mae.stream=images", "data.train.images.shards=nowhere")),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        runs.trained(tmp_path / name, pairs, "trainer.duration=3steps", *overrides)
        outcomes.append(runs.exact_outcome(tmp_path / name / "run"))
    assert outcomes[0] == outcomes[1]


def test_views_are_read_for_an_objective_alone(pairs: Path) -> None:
    """Those that objective=simclr adds to the stream cost nothing where its weight is 0."""
    register_schemas()
    for weight, num_views in ((1.0, 2), (0.0, 0)):
        with initialize_config_module("mmpretrain.conf", version_base="1.3"):
            cfg = resolve(compose("train", [*runs.TINY_RUN, f"data.root={pairs}", "objective=[infonce,simclr]",
                                            f"objective.simclr.weight={weight}"]))  # fmt: skip
        task, _ = build_task(cfg)
        stream = build_streams(cfg, task)["pairs"]
        item = step_positions(stream.order, range(2), 0, 1, 1)[0]
        views = stream.read(item, build_tokenizer(cfg.data.tokenizer, task), TrainingProgress())[0].views
        assert (0 if views is None else views.shape[1]) == num_views


@pytest.mark.parametrize(
    "given", [(), ("data.train.images.views=${data.train.pairs.views}",)], ids=["own", "the pairs'"]
)
def test_views_of_a_stream_of_images(given: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    mix = ("objective=[infonce,simclr]", "objective.simclr.stream=images", "data.train.images.shards=train")
    small = ("objective.simclr.hidden_width=8", "objective.simclr.embed_dim=4")
    runs.trained(tmp_path, pairs, "trainer.duration=2steps", *mix, *small, *given)
    assert runs.records(tmp_path / "run")[-1]["train/simclr_loss"] > 0


def test_texts_longer_than_the_tokenizer_makes_them_are_refused(pairs: Path, tmp_path: Path) -> None:
    finished = runs.trained(tmp_path, pairs, "trainer.duration=1steps", "data.train.pairs.text_length=17", code=2)
    assert "data.train.pairs.text_length is 17, but the tokenizer cuts texts to 16 tokens" in finished.errors[0]
    longest = "data.train.pairs.text_length={piecewise: {0%: 8, 50%: 16}}"
    runs.trained(tmp_path, pairs, "trainer.duration=1steps", longest, "eval=[]")
