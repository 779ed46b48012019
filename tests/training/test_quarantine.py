import json
from pathlib import Path

import pytest

from mmpretrain.batch import Refused
from mmpretrain.errors import TrainingError
from mmpretrain.training.quarantine import Quarantine


def refused(shard: str, key: str, reason: str = "no image", code: str = "member_missing") -> Refused:
    return Refused(stream="pairs", shard=shard, key=key, reason=reason, code=code)


def test_a_sample_is_quarantined_once_also_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path, max_fraction=1.0, num_refused=0)
    first.add([refused("a.tar", "000001"), refused("a.tar", "000001")])
    first.flush(16)
    first.add([refused("b.tar", "000001")])
    first.flush(32)
    assert first.num_refused == 3
    with path.open("a") as file:
        file.write('{"shard": "b.tar", "key": "0000')  # a kill in the middle of a line

    second = Quarantine(path, max_fraction=1.0, num_refused=first.num_refused)
    second.add([refused("b.tar", "000001"), refused("b.tar", "000002", "no caption", "caption_empty")])
    second.flush(48)
    assert second.num_refused == 5
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["shard"], record["key"]) for record in records] == [
        ("a.tar", "000001"),
        ("b.tar", "000001"),
        ("b.tar", "000002"),
    ]
    expected = {"stream": "pairs", "shard": "b.tar", "key": "000002", "reason": "no caption", "code": "caption_empty"}
    assert records[-1] == expected


def test_what_waits_is_written_before_an_error_ends_the_run(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_fraction=1.0, num_refused=0)
    quarantine.add([refused("a.tar", "000001")])
    quarantine.write_waiting()
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000001"


def test_refused_samples_are_not_written_before_they_are_flushed(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_fraction=1.0, num_refused=0)
    quarantine.add([refused("a.tar", "000001")])
    assert quarantine.num_refused == 0
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize(
    ("num_refused", "samples", "ends"),
    [
        (10, 16, False),  # below 1,000 samples the limit is that of 1,000: one bad shard must not end a run at once
        (11, 16, True),
        (20, 2000, False),
        (21, 2000, True),
    ],
)
def test_the_limit_is_a_fraction_of_the_samples_seen(
    num_refused: int, samples: int, ends: bool, tmp_path: Path
) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_fraction=0.01, num_refused=num_refused - 1)
    quarantine.add([refused("a.tar", "000001")])
    if not ends:
        quarantine.flush(samples)
        return
    with pytest.raises(
        TrainingError, match=f"{num_refused} of {samples} samples were refused.*max_bad_fraction = 0.01"
    ):
        quarantine.flush(samples)
