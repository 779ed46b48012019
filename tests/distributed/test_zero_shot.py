"""Zero-shot classification on several processes: each classifies its share, and all have the same scores."""

from collections.abc import Callable
from pathlib import Path

from tests.distributed.pool import Pool
from tests.evals.held_out import classify_many, make_set


def test_ranks_share_the_images_and_get_the_same_scores_bit_for_bit(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    make_set(tmp_path)
    expected, pictures, operations = classify_many(tmp_path)
    assert 0 < expected["eval-val/acc1"] < expected["eval-val/acc5"] < 1 and list(pictures) == ["eval-val/confusion"]
    for world_size in (2, 4):
        for rank, (scores, its_pictures, its_operations) in enumerate(pool(world_size).run(classify_many, tmp_path)):
            assert scores == expected
            assert its_pictures == (pictures if rank == 0 else {})
            assert its_operations < 1.1 * operations / world_size
