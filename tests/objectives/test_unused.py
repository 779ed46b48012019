"""Objectives that a run does not use cost nothing."""

from pathlib import Path

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
