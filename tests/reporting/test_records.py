"""Files of a run, read back."""

from pathlib import Path

import pytest

from mmpretrain.reporting.records import is_better, is_lower_better, read_records


def test_damage_in_the_middle_of_the_metrics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "samp\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_records(path)


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    nan = float("nan")
    assert is_better("eval-val/acc1", 0.1, None) and not is_better("eval-val/acc1", nan, None)
    assert is_better("eval-val/acc1", 0.2, 0.1) and not is_better("eval-val/acc1", 0.1, 0.1)
    assert is_better("eval-val/contrastive_loss", 1.0, 2.0) and not is_better("eval-val/contrastive_loss", nan, 2.0)


@pytest.mark.parametrize(
    ("metric", "is_lower"),
    [
        ("eval-val/contrastive_loss", True),
        ("train/mlm_perplexity", True),
        ("wall_seconds", True),
        ("eval-val/acc1", False),
        ("eval-val/memorised_gap", True),
        ("eval-val/memorised_caption_rate", True),
        ("eval-val/corrupted_acc1_drop", True),
        ("eval-val/ece_scaled", True),
    ],
)
def test_losses_errors_and_times_improve_when_they_fall(metric: str, is_lower: bool) -> None:
    assert is_lower_better(metric) == is_lower
    assert is_better(metric, 1.0, 2.0) == is_lower and is_better(metric, 2.0, 1.0) != is_lower
