"""Evaluators that read images themselves, on several processes: all have the scores of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.evaluators import scores_of
from tests.distributed.pool import Pool
from tests.evals.held_out import make_set
from tests.saved_runs import save_run


@pytest.mark.slow
def test_ranks_share_the_images_and_get_the_same_scores(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    make_set(tmp_path)
    save_run(tmp_path / "run")
    expected, _ = scores_of(tmp_path)
    assert len(expected) == 6 + 3 + 2 + 4
    for world_size in (2, 4):  # of four ranks one has no sample of CKA's three
        results = pool(world_size).run(scores_of, tmp_path)
        for scores, asked in results:
            assert scores == pytest.approx(expected, rel=1e-4) and scores == results[0][0]
            assert asked == results[0][1], "check_stop is a collective"
