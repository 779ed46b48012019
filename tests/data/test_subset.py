"""Training on named samples of tars."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmpretrain.data.loader import build_loader
from mmpretrain.data.shards import Shards
from mmpretrain.data.source import concatenated, selected
from mmpretrain.data.stream import SampleStream, Source
from mmpretrain.data.subset import select
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import CenterCrop
from mmpretrain.schedules import Clock
from tests.tars import make_samples, write_tars

NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    samples = make_samples(NUM_SAMPLES)
    for number, sample in enumerate(samples):
        sample["json"] = {"uid": f"{number * 7919:016x}{number:016x}"}
    return Shards(write_tars(tmp_path_factory.mktemp("subset"), samples, [25, 20, 15]))


def save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def test_keys_and_uids_name_the_same_samples(shards: Shards, tmp_path: Path) -> None:
    wanted = [3, 24, 25, 44, 59]
    keys = save(tmp_path / "keys.npy", np.array([shards.key(sample) for sample in reversed(wanted)]))
    assert select(shards, keys).tolist() == wanted
    pairs = [(sample * 7919, sample) for sample in wanted]
    as_datacomp = np.array(pairs, dtype=np.dtype("u8,u8"))
    assert select(shards, save(tmp_path / "uids.npy", as_datacomp)).tolist() == wanted
    assert select(shards, save(tmp_path / "plain.npy", np.array(pairs, dtype=np.uint64))).tolist() == wanted


def test_kept_samples_are_the_only_ones_there(shards: Shards) -> None:
    wanted = np.array([3, 24, 25, 44, 59])
    kept = selected(shards, wanted)
    assert kept.num_samples == 5
    assert [kept.key(i) for i in range(5)] == [shards.key(sample) for sample in wanted.tolist()]
    assert [kept.read(i, ("txt",)) for i in range(5)] == [shards.read(s, ("txt",)) for s in wanted.tolist()]
    assert [kept.location(i) for i in range(5)] == [shards.location(s) for s in wanted.tolist()]
    for beyond in (5, 59, -1):
        with pytest.raises(IndexError):
            kept.key(beyond)
    assert len({shards.fingerprint, kept.fingerprint, selected(shards, wanted[:4]).fingerprint}) == 3
    again = selected(kept, np.array([0, 4]))
    assert [again.key(i) for i in range(2)] == [shards.key(sample) for sample in (3, 59)]
    assert again.fingerprint == selected(shards, wanted[[0, 4]]).fingerprint


def test_sets_that_keep_some_are_joined(shards: Shards) -> None:
    first, second = selected(Shards(shards.paths[:1]), np.array([2, 4])), Shards(shards.paths[1:])
    joined = concatenated([first, second])
    assert [joined.key(i) for i in range(joined.num_samples)] == [
        *(first.key(i) for i in range(2)),
        *(second.key(i) for i in range(second.num_samples)),
    ]


def epoch(shards: Shards, first_step: int, num_steps: int) -> list[list[int]]:
    """The sample ids of each step."""
    stream = SampleStream("pairs", [Source("pairs", shards)], 4, 0, "txt", CenterCrop(), 16)
    loader = build_loader({"pairs": stream}, ClipTokenizer(), Clock(1, 1), first_step, num_steps)
    return [sorted(batch.streams["pairs"].ids.tolist()) for batch in loader]


def test_training_sees_exactly_those_in_an_order_that_resumes(shards: Shards) -> None:
    wanted = np.arange(1, NUM_SAMPLES, 3)
    kept = selected(shards, wanted)
    steps = epoch(kept, 0, 15)
    for start in (0, 5, 10):  # 20 samples: five steps an epoch
        assert sorted(sample for step in steps[start : start + 5] for sample in step) == list(range(20))
    for first_step in (1, 7, 13):
        assert epoch(kept, first_step, 15) == steps[first_step:]


def test_names_that_no_sample_has_are_counted(shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = save(tmp_path / "keys.npy", np.array([shards.key(7), "gone", "gone too"]))
    assert select(shards, keys).tolist() == [7]
    assert "no sample has 2 of its 3 names" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array(["gone"]), "none of its 1 names is in"),
        (np.arange(4.0), r"of float64; expected keys \(text\) or uids \(two uint64 each\)"),
        (np.array([{}]), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_what_names_no_sample_is_refused(
    shards: Shards, tmp_path: Path, content: np.ndarray | None, message: str
) -> None:
    path = tmp_path / "keep.npy"
    if content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        select(shards, str(path))


def test_names_that_several_samples_share_are_refused(tmp_path: Path) -> None:
    samples = make_samples(4)
    for sample in samples:
        sample["json"] = json.dumps({"uid": "0" * 32}).encode()
    twice = Shards(write_tars(tmp_path, samples, [2, 2]))
    with pytest.raises(ValueError, match="by uid, but 3 of the samples share theirs"):
        select(twice, save(tmp_path / "keep.npy", np.zeros((1, 2), np.uint64)))


def test_samples_without_a_readable_uid_are_left_out(tmp_path: Path) -> None:
    samples = make_samples(4)
    for sample, record in zip(samples, (b"[" * 100_000, b"{", b"[1]", b'{"uid": "%032x"}' % 7), strict=True):
        sample["json"] = record
    tars = Shards(write_tars(tmp_path, samples, [4]))
    assert select(tars, save(tmp_path / "keep.npy", np.array([[0, 7]], np.uint64))).tolist() == [3]


def test_several_arrays_are_no_subset(shards: Shards, tmp_path: Path) -> None:
    np.savez(tmp_path / "keep.npz", a=np.array(["000001"]))
    with pytest.raises(ValueError, match=r"keep\.npz', several arrays; expected one \.npy"):
        select(shards, str(tmp_path / "keep.npz"))
