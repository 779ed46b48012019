"""Held-out losses and captions on several processes: each computes its share, and all have the same scores."""

from collections.abc import Callable
from pathlib import Path

from tests.distributed.pool import Pool
from tests.evals.held_out import make_set
from tests.evals.test_captions import caption_untrained
from tests.evals.test_held_out_loss import evaluate_untrained


def test_ranks_share_the_blocks_and_get_the_same_losses_bit_for_bit(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    make_set(tmp_path)
    expected = evaluate_untrained(tmp_path)
    assert set(expected) == {"mae_loss", "mlm_loss", "mlm_perplexity", "mlm_accuracy"}
    for scores in pool(2).run(evaluate_untrained, tmp_path):
        assert scores == expected


def test_ranks_share_the_images_and_get_the_same_captions(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    make_set(tmp_path)
    expected, picture = caption_untrained(tmp_path)
    for rank, (scores, its_picture) in enumerate(pool(2).run(caption_untrained, tmp_path)):
        assert scores == expected
        assert its_picture == (picture if rank == 0 else "")
