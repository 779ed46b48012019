"""Files of a run, read back."""

from pathlib import Path

import pytest

from mmpretrain.reporting.records import read_records


def test_damage_in_the_middle_of_the_metrics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "samp\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_records(path)
