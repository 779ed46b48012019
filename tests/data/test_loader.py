"""From tars to batches: one stream of samples, whatever the number of ranks, workers and micro-batches."""

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mmpretrain.batch import Batch, Samples
from mmpretrain.data.augment import Augmentation
from mmpretrain.data.decode import decode_image
from mmpretrain.data.fields import read_captions
from mmpretrain.data.loader import LoaderError, _received, build_loader, received
from mmpretrain.data.shards import Shards
from mmpretrain.data.shorten import Shorten
from mmpretrain.data.stream import SampleStream, Source, with_text
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import CenterCrop, RandomResizedCrop, Transform
from mmpretrain.schedules import Clock, TrainingProgress
from mmpretrain.seeds import draw, hash64
from tests.tars import Sample, encode, make_samples, smooth_pixels, write_tar, write_tars

NUM_SAMPLES = 700
BATCH_SIZE = 128
LAYOUTS = [(1, 0, 128), (1, 2, 32), (2, 1, 16), (4, 2, 8)]
"""(ranks, workers, micro-batch size)."""

Row = tuple[object, ...]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards: 2.7 blocks of samples, so that an epoch is 5.5 batches."""
    return write_tars(tmp_path_factory.mktemp("pairs"), make_samples(NUM_SAMPLES), [300, 150, 250])


def make_stream(
    paths: Sequence[str] | Mapping[str, tuple[Sequence[str], float | None]],
    name: str = "pairs",
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    caption: object = "txt",
    transform: Transform | None = None,
    images: bool = True,
    image_size: int = 16,
) -> SampleStream:
    """A stream of one source, or of named ones with weights."""
    named = paths if isinstance(paths, Mapping) else {name: (paths, None)}
    sources = [Source(source, Shards(list(tars)), weight) for source, (tars, weight) in named.items()]
    transform = (transform or RandomResizedCrop((0.5, 1.0), horizontal_flip=0.5)) if images else None
    return SampleStream(name, sources, batch_size, seed, caption, transform, image_size)  # type: ignore[arg-type]


def rows_of(samples: Samples) -> dict[int, Row]:
    """Position -> all that a step sees of the sample that stands there."""
    rows: dict[int, Row] = {}
    for i, position in enumerate(samples.positions.tolist()):
        image = () if samples.images is None else (samples.images.shape[1:], samples.images[i].numpy().tobytes())
        text = ()
        if samples.text is not None and samples.lengths is not None:
            text = tuple(samples.text[i, : int(samples.lengths[i])].tolist())
        rows[position] = (int(samples.ids[i]), int(samples.seeds[i]), *image, text)
    return rows


def tokens_of(tokenizer: ClipTokenizer, shards: Shards, sample: int) -> tuple[int, ...]:
    """The tokens of a sample's `txt`, read beside the loader."""
    return tuple(tokenizer(read_captions(shards, sample, "txt"))[0][0].tolist())


def read_steps(
    streams: Mapping[str, SampleStream],
    tokenizer: ClipTokenizer,
    layout: tuple[int, int, int],
    first_step: int,
    num_steps: int,
    stop: int | None = None,
) -> Iterator[dict[str, dict[int, Row]]]:
    """The steps from `first_step` to before `stop` of all ranks together; what is prefetched beyond is dropped."""
    world, workers, micro_batch = layout
    num_micro = int(next(iter(streams.values())).batch_size.values[0]) // world // micro_batch
    loaders = [
        iter(build_loader(streams, tokenizer, Clock(1, 1), first_step, num_steps, rank, world, num_micro, workers))
        for rank in range(world)
    ]
    for _ in range(first_step, num_steps if stop is None else stop):
        step: dict[str, dict[int, Row]] = {name: {} for name in streams}
        for loader in loaders:
            for _ in range(num_micro):
                for name, samples in next(loader).streams.items():
                    assert len(samples) == int(streams[name].batch_size.values[0]) // world // num_micro
                    rows = rows_of(samples)
                    assert not rows.keys() & step[name].keys()
                    step[name] |= rows
        yield step
    if stop is None:
        assert [next(loader, None) for loader in loaders] == [None] * world


def read_batches(stream: SampleStream, tokenizer: ClipTokenizer, num_steps: int, workers: int = 0) -> list[Batch]:
    batches = iter(build_loader({stream.name: stream}, tokenizer, Clock(1, 1), 0, num_steps, workers=workers))
    try:
        return list(batches)
    finally:
        if workers:  # an exception keeps the iterator alive, and torch would wait five seconds for each worker then
            batches._shutdown_workers()  # type: ignore[attr-defined]


# ---------------------------------------------------------------- one stream on every machine


@pytest.fixture(scope="module")
def reference(tars: list[str], tokenizer: ClipTokenizer) -> list[dict[str, dict[int, Row]]]:
    """Two epochs and a bit, in one process."""
    return list(read_steps({"pairs": make_stream(tars)}, tokenizer, LAYOUTS[0], 0, 12))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_ranks_workers_and_micro_batches_change_no_sample(
    tars: list[str], tokenizer: ClipTokenizer, reference: list[dict[str, dict[int, Row]]], layout: tuple[int, int, int]
) -> None:
    assert list(read_steps({"pairs": make_stream(tars)}, tokenizer, layout, 0, 12)) == reference


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_that_is_killed_and_resumed_elsewhere_goes_on_where_it_was(
    tars: list[str], tokenizer: ClipTokenizer, reference: list[dict[str, dict[int, Row]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stops = [*sorted(rng.choice(np.arange(1, 12), size=3, replace=False).tolist()), 12]
    read, start = [], 0
    for stop in stops:
        layout = LAYOUTS[rng.integers(len(LAYOUTS))]
        read += list(read_steps({"pairs": make_stream(tars)}, tokenizer, layout, start, 20, stop))
        start = stop
    assert read == reference


def test_a_step_holds_its_positions_and_an_epoch_every_sample(reference: list[dict[str, dict[int, Row]]]) -> None:
    for number, step in enumerate(reference):
        assert sorted(step["pairs"]) == list(range(number * BATCH_SIZE, (number + 1) * BATCH_SIZE))
    rows = {position: row for step in reference for position, row in step["pairs"].items()}
    for epoch in range(2):
        ids = [rows[position][0] for position in range(epoch * NUM_SAMPLES, (epoch + 1) * NUM_SAMPLES)]
        assert sorted(ids) == list(range(NUM_SAMPLES))


def test_a_row_is_the_sample_that_its_id_names(
    tars: list[str], tokenizer: ClipTokenizer, reference: list[dict[str, dict[int, Row]]]
) -> None:
    """Read straight from the tars: id, seed, crop and caption belong together."""
    stream, shards = make_stream(tars), Shards(tars)
    transform = RandomResizedCrop((0.5, 1.0), horizontal_flip=0.5)
    for position, (sample, seed, shape, pixels, tokens) in reference[5]["pairs"].items():
        assert isinstance(sample, int) and isinstance(seed, int) and isinstance(tokens, tuple)
        assert seed % 2**64 == draw(hash64(0, "pairs"), position)
        member = shards.member(sample, ["jpg"])
        assert member is not None
        crop = functools.partial(transform, seed=seed % 2**64)
        image = decode_image(shards.read(sample, ["jpg"]), crop, 16)
        assert (image.shape, image.numpy().tobytes()) == (shape, pixels)
        assert tokens == tokens_of(tokenizer, shards, sample)
        assert stream.sample_key(position) == f"{member[0]}:{shards.key(sample)}"


def test_further_views_are_crops_of_their_own_and_change_nothing_else(
    tars: list[str], tokenizer: ClipTokenizer
) -> None:
    crop = RandomResizedCrop((0.2, 0.6))

    def stream(batch_size: int, num_views: int) -> SampleStream:
        source, views = Source("pairs", Shards(tars)), [(crop, ())] * num_views
        return SampleStream("pairs", [source], batch_size, 0, "txt", RandomResizedCrop(), 16, views=views)

    (batch,) = read_batches(stream(24, 2), tokenizer, 1)
    (without,) = read_batches(stream(24, 0), tokenizer, 1)
    samples = batch.streams["pairs"]
    assert rows_of(samples) == rows_of(without.streams["pairs"]) and without.streams["pairs"].views is None
    assert samples.views is not None and samples.images is not None
    assert samples.views.shape == (24, 2, 3, 16, 16) and samples.views.dtype == torch.uint8
    shards = Shards(tars)
    for row in range(24):
        data = shards.read(int(samples.ids[row]), ["jpg"])
        for number in range(2):
            seed = hash64(int(samples.seeds[row]) % 2**64, "view", number)
            expected = decode_image(data, functools.partial(crop, seed=seed), 16)
            assert torch.equal(samples.views[row, number], expected)
        assert not torch.equal(samples.views[row, 0], samples.views[row, 1])


def test_a_stage_has_its_own_image_size_and_text_length(tars: list[str], tokenizer: ClipTokenizer) -> None:
    """What the samples are stays the same: ids, seeds, and of the texts what is kept."""
    source, stages = Source("pairs", Shards(tars)), {"piecewise": {"0%": 16, "20samples": 24}}
    lengths = {"piecewise": {"0%": 4, "20samples": 77}}
    staged = SampleStream("pairs", [source], 10, 0, "txt", RandomResizedCrop(), stages, text_length=lengths)
    clock = Clock(10, 700, 100)
    batches = list(build_loader({"pairs": staged}, tokenizer, clock, 0, 4, workers=2))
    plain = list(build_loader({"pairs": make_stream(tars, batch_size=10)}, tokenizer, clock, 0, 4))
    for step, (batch, other) in enumerate(zip(batches, plain, strict=True)):
        samples, reference = batch.streams["pairs"], rows_of(other.streams["pairs"])
        assert samples.images is not None and samples.lengths is not None
        assert samples.images.shape[2:] == ((16, 16) if step < 2 else (24, 24))
        assert batch.progress == TrainingProgress(10 * step, clock)
        for position, row in rows_of(samples).items():
            whole = reference[position][-1]
            assert row[:2] == reference[position][:2]
            assert row[-1] == (whole if step >= 2 else (*whole[:3], whole[-1]))  # type: ignore[index, misc]


def test_another_seed_or_stream_name_is_another_stream(tars: list[str], tokenizer: ClipTokenizer) -> None:
    seen = [
        rows_of(read_batches(make_stream({"same": (tars, None)}, name=name, seed=seed), tokenizer, 1)[0].streams[name])
        for name, seed in [("pairs", 0), ("pairs", 1), ("other", 0)]
    ]
    assert len({tuple(row[0] for row in rows.values()) for rows in seen}) == 3
    assert len({row[1] for rows in seen for row in rows.values()}) == 3 * BATCH_SIZE


def test_a_sample_is_seen_differently_in_every_epoch(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(1))
    rows = rows_of(read_batches(make_stream([path], batch_size=20), tokenizer, 1)[0].streams["pairs"])
    assert len({row[1] for row in rows.values()}) == 20  # seeds
    assert len({row[3] for row in rows.values()}) > 15  # crops


def test_micro_batches_lie_together_on_disk(tars: list[str], tokenizer: ClipTokenizer) -> None:
    stream = make_stream(tars, caption=None)
    batches = list(
        build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 0, 1, rank=1, world_size=2, num_micro_batches=2)
    )
    ids = torch.cat([batch.streams["pairs"].ids for batch in batches]).tolist()
    assert ids == sorted(ids)
    whole = torch.cat(
        [b.streams["pairs"].ids for b in build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 0, 1)]
    ).tolist()
    assert ids == sorted(whole)[BATCH_SIZE // 2 :]


def test_a_streams_seeds_and_images_survive_pickling(tars: list[str], tokenizer: ClipTokenizer) -> None:
    """So that workers may be spawned as well as forked."""
    stream = make_stream(tars)
    before = read_batches(stream, tokenizer, 1)[0].streams["pairs"]
    after = read_batches(pickle.loads(pickle.dumps(stream)), tokenizer, 1)[0].streams["pairs"]
    assert rows_of(before) == rows_of(after)


# ---------------------------------------------------------------- several sources and streams


def test_sources_without_weights_are_one_data_set(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    samples = make_samples(60)
    paths = write_tars(tmp_path, samples, [20, 40])
    stream = make_stream({"a": (paths[:1], None), "b": (paths[1:], None)}, batch_size=20)
    batches = read_batches(stream, tokenizer, 3)
    ids = torch.cat([batch.streams["pairs"].ids for batch in batches])
    assert ids.sort().values.tolist() == list(range(60))
    assert all(0 < (batch.streams["pairs"].ids < 20).sum() < 20 for batch in batches)  # both in every batch
    assert stream.order.num_samples == 60 and stream.fingerprints == {"a+b": Shards(paths).fingerprint}


def test_weighted_sources_hold_their_quotas_in_every_batch(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    samples = make_samples(60)
    paths = write_tars(tmp_path, samples, [20, 40])
    stream = make_stream({"a": (paths[:1], 3), "b": (paths[1:], 1)}, batch_size=20)
    shards = Shards(paths)
    for batch in read_batches(stream, tokenizer, 8):
        pairs = batch.streams["pairs"]
        assert int((pairs.ids < 20).sum()) == 15
        for sample, row in zip(pairs.ids.tolist(), rows_of(pairs).values(), strict=True):  # ids number all sources
            assert row[-1] == tokens_of(tokenizer, shards, sample)
    assert stream.fingerprints == {"a": Shards(paths[:1]).fingerprint, "b": Shards(paths[1:]).fingerprint}


def test_some_weights_and_some_none_are_refused(tars: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.train\.pairs\.sources have weights \[2\.0, None\]; give every source"):
        make_stream({"a": (tars[:1], 2.0), "b": (tars[1:], None)})
    with pytest.raises(ValueError, match="each must be positive"):
        make_stream({"a": (tars[:1], 2.0), "b": (tars[1:], 0.0)})


def test_a_stream_of_nothing_is_refused(tars: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.train\.pairs has neither a caption nor a transform"):
        make_stream(tars, caption=None, images=False)


@pytest.mark.parametrize("layout", [(1, 0, 16), (2, 1, 4)], ids=str)
def test_a_batch_of_several_streams(tmp_path: Path, tokenizer: ClipTokenizer, layout: tuple[int, int, int]) -> None:
    samples = make_samples(50)
    pairs_only = write_tar(tmp_path / "pairs.tar", samples)
    images_only = write_tar(tmp_path / "images.tar", [{"jpg": sample["jpg"]} for sample in samples[:30]])
    texts_only = write_tar(tmp_path / "texts.tar", [{"txt": sample["txt"]} for sample in samples[:21]])

    def streams() -> dict[str, SampleStream]:
        return {
            "pairs": make_stream([pairs_only], "pairs", 16),
            "images": make_stream([images_only], "images", 8, caption=None, image_size=24),
            "texts": make_stream([texts_only], "texts", 4, images=False),
        }

    batch = next(iter(build_loader(streams(), tokenizer, Clock(1, 1), 0, 1)))
    pairs, images, texts = (batch.streams[name] for name in ("pairs", "images", "texts"))
    assert pairs.images is not None and pairs.images.shape == (16, 3, 16, 16) and pairs.text is not None
    assert images.images is not None and images.images.shape == (8, 3, 24, 24)
    assert images.text is None and images.lengths is None and images.packing is None
    assert texts.images is None and texts.text is not None and len(texts) == 4
    assert not set(pairs.seeds.tolist()) & set(images.seeds.tolist())
    assert batch.seed == pairs.seeds[pairs.positions == 0]
    whole = list(read_steps(streams(), tokenizer, (1, 0, 16), 0, 6))
    assert list(read_steps(streams(), tokenizer, layout, 0, 6)) == whole
    seen = sorted(step["texts"][position][0] for step in whole for position in step["texts"] if position < 21)
    assert seen == list(range(21))


@pytest.mark.parametrize(("world", "num_micro"), [(3, 1), (1, 3), (2, 4)])
def test_a_batch_that_does_not_divide_is_named(
    tars: list[str], tokenizer: ClipTokenizer, world: int, num_micro: int
) -> None:
    streams = {"pairs": make_stream(tars, batch_size=48), "images": make_stream(tars, "images", 20, caption=None)}
    with pytest.raises(
        ValueError, match=rf"data\.train\.images\.batch_size is 20; expected a multiple of {world} proc"
    ):
        build_loader(streams, tokenizer, Clock(1, 1), 0, 1, 0, world, num_micro)


def test_the_batchs_seed_is_that_of_its_first_position(tars: list[str], tokenizer: ClipTokenizer) -> None:
    stream = make_stream(tars)
    batches = list(build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 3, 5, num_micro_batches=4))
    assert len(batches) == 8 and len({batch.seed for batch in batches}) == 8
    for batch in batches:
        pairs = batch.streams["pairs"]
        assert batch.seed == pairs.seeds[pairs.positions == pairs.positions.min()]


# ---------------------------------------------------------------- text


class WordTokenizer:
    """One token a word, ids counted from 1; padded to the longest."""

    context_length = 20
    vocab_size = 100

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(text.split()) for text in texts])
        return torch.arange(1, int(lengths.max()) + 1).repeat(len(texts), 1) * (lengths[:, None] * 0 + 1), lengths

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def test_texts_are_cut_to_a_length_that_occurs_often_and_packed() -> None:
    words = WordTokenizer()
    samples = Samples(*[torch.arange(4)] * 3)
    texts = with_text(samples, *words(["a b", "a", "a b c", "a b c d e f"]), words)
    assert texts.images is None and texts.text is not None and texts.packing is not None
    assert texts.text.shape == (4, 8) and (texts.packing.num_rows, texts.packing.row_length) == (2, 8)
    assert texts.text[2].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    longest = with_text(samples, *words(["w " * 17] * 4), words)
    assert longest.text is not None and longest.text.shape == (4, 20) and longest.packing is None


def test_loaded_text_is_open_clips_tokens_whatever_the_micro_batch(tars: list[str], tokenizer: ClipTokenizer) -> None:
    stream = make_stream(tars, batch_size=64)
    for rank in range(4):
        batch = next(iter(build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 0, 1, rank, 4)))
        pairs = batch.streams["pairs"]
        assert pairs.lengths is not None and pairs.text is not None and pairs.packing is not None
        assert pairs.text.shape == (16, pairs.packing.row_length) and pairs.packing.num_rows < 16
        assert pairs.text.gather(1, pairs.lengths[:, None] - 1).eq(49407).all()  # the end token


def test_one_of_several_captions_is_drawn_for_every_position(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    path = write_tar(tmp_path / "0.tar", [{"json": {"captions": ["one", "two", "three"]}}])
    stream = make_stream([path], batch_size=600, caption="json.captions", images=False)
    whole = rows_of(read_batches(stream, tokenizer, 1)[0].streams["pairs"])
    texts = [tokenizer.decode(row[-1]) for row in whole.values()]  # type: ignore[arg-type]
    counts = [texts.count(caption) for caption in ("one", "two", "three")]
    assert sum(counts) == 600 and max(abs(count - 200) for count in counts) < 4 * np.sqrt(600 * 2 / 9)
    halves = build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 0, 1, num_micro_batches=2)
    assert {p: row for half in halves for p, row in rows_of(half.streams["pairs"]).items()} == whole


# ---------------------------------------------------------------- bad samples and bad disks

BAD: dict[int, tuple[Sample, str]] = {
    3: ({"jpg": encode(smooth_pixels(40, 40))[:-100]}, "the JPEG is damaged"),
    5: ({"jpg": b"<html>404</html>"}, "no readable image"),
    8: ({"json": {"caption": "  "}}, "is empty"),
    11: ({"json": {"text": "no"}}, "no field 'caption' (it has: text)"),
    14: ({"json": None}, "no member json"),
    17: ({"json": b"{"}, "does not parse"),
    20: ({"jpg": None}, "no member jpg"),
    21: ({"jpg": encode(smooth_pixels(16, 16), "PPM")}, "no readable image"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One tar of 40 samples, eight of them bad, each in its own way."""
    samples = make_samples(40)
    for i, (members, _) in BAD.items():
        samples[i] = {name: value for name, value in (samples[i] | members).items() if value is not None}
    return write_tar(tmp_path_factory.mktemp("damaged") / "0.tar", samples)


def test_a_bad_sample_is_replaced_by_a_function_of_its_position(damaged: str, tokenizer: ClipTokenizer) -> None:
    stream = make_stream([damaged], batch_size=16, caption="json.caption")
    rows = {p: row for b in read_batches(stream, tokenizer, 10) for p, row in rows_of(b.streams["pairs"]).items()}
    assert len(rows) == 160
    ids, (_, first_ids) = [rows[p][0] for p in range(160)], stream.order(np.arange(160))
    assert not set(ids) & set(BAD)
    for position, (used, first) in enumerate(zip(ids, first_ids.tolist(), strict=True)):
        attempt = 0
        while first in BAD:
            first = draw(hash64(draw(hash64(0, "pairs"), position), "replacement"), attempt) % 40
            attempt += 1
        assert used == first
    whole = list(read_steps({"pairs": stream}, tokenizer, (1, 0, 16), 0, 10))
    for layout in [(1, 2, 4), (2, 1, 8), (4, 0, 1)]:
        fresh = make_stream([damaged], batch_size=16, caption="json.caption")
        assert list(read_steps({"pairs": fresh}, tokenizer, layout, 0, 10)) == whole


def test_every_draw_of_a_bad_sample_is_reported_once_with_its_reason(damaged: str, tokenizer: ClipTokenizer) -> None:
    stream = make_stream([damaged], batch_size=20, caption="json.caption")
    epochs = read_batches(stream, tokenizer, 4)
    refused = [refusal for batch in epochs for refusal in batch.refused]
    drawn = []
    for position, first in enumerate(stream.order(np.arange(80))[1].tolist()):
        attempt = 0
        while first in BAD:
            drawn.append(first)
            first = draw(hash64(draw(hash64(0, "pairs"), position), "replacement"), attempt) % 40
            attempt += 1
    assert len(drawn) > 2 * len(BAD)  # a replacement may be bad as well
    assert sorted(int(refusal.key) for refusal in refused) == sorted(drawn)
    for refusal in refused:
        assert (refusal.stream, refusal.shard) == ("pairs", damaged)
        assert "\n" not in refusal.reason
        assert BAD[int(refusal.key)][1] in refusal.reason
    with_workers = [refusal for batch in read_batches(stream, tokenizer, 4, workers=2) for refusal in batch.refused]
    assert with_workers == refused


class PickyTokenizer(ClipTokenizer):
    """A tokenizer that raises for some texts, without telling for which ones."""

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if any(text.startswith(("sample 3", "sample 7 ")) for text in texts):
            raise ValueError("I dislike\nthat")
        return super().__call__(texts)


def test_a_text_that_the_tokenizer_cannot_take_is_a_bad_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(40))
    tokenizer, bad = PickyTokenizer(), {3, 7, *range(30, 40)}
    batches = read_batches(make_stream([path], batch_size=16), tokenizer, 5)
    whole = {p: row for batch in batches for p, row in rows_of(batch.streams["pairs"]).items()}
    drawn = []
    for position, first in enumerate(make_stream([path], batch_size=16).order(np.arange(80))[1].tolist()):
        attempt = 0
        while first in bad:
            drawn.append(first)
            first = draw(hash64(draw(hash64(0, "pairs"), position), "replacement"), attempt) % 40
            attempt += 1
        assert whole[position][0] == first
        assert whole[position][-1] == tokens_of(tokenizer, Shards([path]), first)
    refused = [refusal for batch in batches for refusal in batch.refused]
    assert sorted(int(refusal.key) for refusal in refused) == sorted(drawn)
    assert {refusal.reason for refusal in refused} == {"its caption cannot be tokenized (I dislike)"}
    one_by_one = read_steps({"pairs": make_stream([path], batch_size=16)}, tokenizer, (1, 0, 1), 0, 5)
    assert {p: row for step in one_by_one for p, row in step["pairs"].items()} == whole


def test_a_replacement_comes_from_the_same_source(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    good, mixed = make_samples(10), make_samples(10)
    for sample in mixed[::2]:
        sample["jpg"] = b"bad"
    paths = [write_tar(tmp_path / f"{name}.tar", samples) for name, samples in (("good", good), ("mixed", mixed))]
    stream = make_stream({"good": (paths[:1], 1), "mixed": (paths[1:], 1)}, batch_size=20)
    for batch in read_batches(stream, tokenizer, 4):
        assert batch.refused and {refusal.shard for refusal in batch.refused} == {paths[1]}
        assert int((batch.streams["pairs"].ids >= 10).sum()) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_twenty_bad_samples_in_a_row_end_the_run(tmp_path: Path, tokenizer: ClipTokenizer, workers: int) -> None:
    path = write_tar(tmp_path / "0.tar", [sample | {"jpg": b"bad"} for sample in make_samples(30)])
    with pytest.raises(
        ValueError,
        match=r"20 samples in a row of 'pairs' cannot be used, the last \(key \d+ of .*0.tar\) for: no readable image",
    ):
        read_batches(make_stream([path], batch_size=4), tokenizer, 1, workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["vanished", "cut"])
def test_an_io_error_is_no_bad_sample(tmp_path: Path, tokenizer: ClipTokenizer, damage: str, workers: int) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(30))
    stream = make_stream([path], batch_size=30)
    if damage == "vanished":
        os.unlink(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(OSError, match=r"0\.tar"):
        read_batches(stream, tokenizer, 1, workers)


def test_copies_of_a_sample_in_one_batch_have_one_id(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    """10 samples in batches of 8: all but every fifth cross an epoch's end."""
    path = write_tar(tmp_path / "0.tar", make_samples(10))
    stream = make_stream([path], batch_size=8, transform=CenterCrop())
    copies = 0
    for batch in read_batches(stream, tokenizer, 10):
        pairs = batch.streams["pairs"]
        keys = [stream.sample_key(position) for position in pairs.positions.tolist()]
        assert pairs.images is not None
        for i, j in zip(*np.triu_indices(8, 1), strict=True):
            assert (pairs.ids[i] == pairs.ids[j]) == (keys[i] == keys[j])
            if pairs.ids[i] == pairs.ids[j]:
                copies += 1
                assert pairs.seeds[i] != pairs.seeds[j]
                assert torch.equal(pairs.images[i], pairs.images[j])
    assert copies > 5


class Planted:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    trap = tmp_path / "trap"
    payload = pickle.dumps(Planted(trap))
    samples = [
        sample | {"pyd": payload, "pickle": payload, "pkl": payload, "pth": payload} for sample in make_samples(4)
    ]
    path = write_tar(tmp_path / "0.tar", samples)
    stream = make_stream([path], batch_size=4)
    stream.check_first_sample()
    assert len(read_batches(stream, tokenizer, 1)[0].streams["pairs"]) == 4
    assert not trap.exists()
    pickle.loads(payload).close()  # the trap works
    assert trap.exists()


@pytest.fixture
def loader_and_workers(
    tars: list[str], tokenizer: ClipTokenizer
) -> tuple[Iterator[Batch], list[multiprocessing.process.BaseProcess]]:
    """A loader of 40 batches that has handed out one of each worker, and its two workers, which thus handle signals."""
    before = multiprocessing.active_children()
    loader = iter(build_loader({"pairs": make_stream(tars, batch_size=16)}, tokenizer, Clock(1, 1), 0, 40, workers=2))
    next(loader)
    next(loader)
    workers = [worker for worker in multiprocessing.active_children() if worker not in before]
    assert len(workers) == 2
    return loader, workers


def test_a_signal_to_the_process_group_leaves_workers_alone(
    loader_and_workers: tuple[Iterator[Batch], list[multiprocessing.process.BaseProcess]],
) -> None:
    loader, workers = loader_and_workers
    pids = " ".join(str(worker.pid) for worker in workers)
    subprocess.run(["sh", "-c", f"kill -TERM {pids}; kill -INT {pids}"], check=True)  # not from the parent
    assert sum(1 for _ in loader) == 38


def end_after_its_files() -> None:
    """End by SIGKILL some time after the files are closed, as a killed process may on a busy machine."""
    os.closerange(3, 4096)
    sum(range(10_000_000))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_whose_end_follows_its_files_is_named() -> None:
    worker = multiprocessing.get_context("fork").Process(target=end_after_its_files)
    worker.start()

    def broken() -> Iterator[int]:
        wait([worker.sentinel])
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    with pytest.raises(LoaderError, match=r"^worker 0 of the data loader \(process \d+\) was killed by SIGKILL; "):
        next(_received(broken(), [worker], 60, "data.timeout_seconds"))


def test_workers_end_when_their_parent_says_so(
    loader_and_workers: tuple[Iterator[Batch], list[multiprocessing.process.BaseProcess]],
) -> None:
    """Or a run that dies of an error would never leave Python, which waits for its children."""
    _, workers = loader_and_workers
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0


# ---------------------------------------------------------------- a wrong configuration is named at the start


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("json.captoin", r"its json has no field 'captoin' \(it has: caption, captions\)"),
        ("json.caption.en", r"its json has no field 'caption\.en' \(it has: str\)"),
        ("text", "it has no member text"),
    ],
)
def test_a_caption_field_that_does_not_exist_is_named(tars: list[str], caption: str, reason: str) -> None:
    stream = make_stream(tars, caption=caption)
    with pytest.raises(ValueError, match=rf"data\.train\.pairs: .*000\.tar.*'000000'.*: {reason}") as error:
        stream.check_first_sample()
    assert "set data.train.pairs.caption to `txt` or a field" in str(error.value) and "\n" not in str(error.value)


def test_shards_without_images_are_named_and_no_caption_is_blamed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "texts.tar", [{"txt": "a"}] * 3)
    stream = make_stream([path], "images", caption=None)
    with pytest.raises(
        ValueError, match=r"data\.train\.images: none of the first 3 .*no member jpg or jpeg or png"
    ) as error:
        stream.check_first_sample()
    assert "caption" not in str(error.value)


def test_every_source_is_checked(tmp_path: Path, tars: list[str]) -> None:
    path = write_tar(tmp_path / "other.tar", [{"jpg": sample["jpg"]} for sample in make_samples(2)])
    with pytest.raises(ValueError, match=r"other\.tar.*no member txt"):
        make_stream({"a": (tars, 1), "b": ([path], 1)}).check_first_sample()


def test_a_bad_first_sample_alone_stops_nothing(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    """What training replaces, the check at the start may not refuse."""
    samples = make_samples(5)
    samples[0]["txt"] = ""
    samples[1]["jpg"] = b"bad"
    stream = make_stream([write_tar(tmp_path / "0.tar", samples)], batch_size=5)
    stream.check_first_sample()
    assert {int(refusal.key) for refusal in read_batches(stream, tokenizer, 1)[0].refused} == {0, 1}


# ---------------------------------------------------------------- captions, groups and channels


def test_captions_are_drawn_from_fields_by_their_weights(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    samples = make_samples(400)
    for number, sample in enumerate(samples):
        sample["txt"], sample["json"] = f"plain {number}", {"made": f"made {number}"}
    paths = write_tars(tmp_path, samples, [400])
    stream = make_stream(paths, batch_size=100, caption={"txt": 1.0, "json.made": 3.0}, images=False)
    texts = []
    for batch in read_batches(stream, tokenizer, 4):
        part = batch.streams["pairs"]
        assert part.text is not None and part.lengths is not None
        texts += [tokenizer.decode(row[:length].tolist()) for row, length in zip(part.text, part.lengths.tolist())]
    made = sum(text.startswith("made") for text in texts)
    assert len(texts) == 400
    assert abs(made - 300) < 4 * (400 * 0.75 * 0.25) ** 0.5, "four deviations"
    again = make_stream(paths, batch_size=100, caption={"txt": 1.0, "json.made": 3.0}, images=False)
    assert [rows_of(b.streams["pairs"]) for b in read_batches(stream, tokenizer, 4)] == [
        rows_of(b.streams["pairs"]) for b in read_batches(again, tokenizer, 4)
    ]


def test_what_shortens_nothing_is_refused(tars: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"pairs\.shorten is block, but no length .* set data\.train\.pairs\.text_length$"
    ):
        SampleStream("pairs", [Source("a", Shards(tars))], 8, 0, "txt", CenterCrop(), 16, shorten=Shorten.block)


def test_an_augmentation_may_give_its_input_back_turned(tars: list[str], tokenizer: ClipTokenizer) -> None:
    """Images lie in the batch while they are augmented."""

    def read(augment: list[Augmentation]) -> Tensor:
        source = Source("a", Shards(tars))
        stream = SampleStream("pairs", [source], 8, 0, "txt", CenterCrop(), 16, augment=augment)
        images = read_batches(stream, tokenizer, 1)[0].streams["pairs"].images
        assert images is not None
        return images

    assert torch.equal(read([lambda image: image.mT]), read([]).mT)


@pytest.mark.parametrize("caption", [{}, [], {"txt": 0}, {"txt": -1.0}, {"txt": "much"}])
def test_captions_without_a_field_or_weight_are_refused(tars: list[str], caption: object) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.train\.pairs\.caption is .*; expected a field, a list of them, or fields"
    ):
        make_stream(tars, caption=caption)


@pytest.mark.parametrize(
    ("group", "same"),
    [
        ("json.label", lambda a, b: a % 3 == b % 3),
        ("cls", lambda a, b: a % 2 == b % 2),
        ("caption", lambda a, b: a % 4 == b % 4),
        ("id", lambda a, b: a == b),
    ],
)
def test_samples_of_one_group_share_a_number(
    group: str, same: Callable[[int, int], bool], tokenizer: ClipTokenizer, tmp_path: Path
) -> None:
    samples = make_samples(12)
    for number, sample in enumerate(samples):
        sample |= {"json": {"label": f"class {number % 3}"}, "cls": str(number % 2), "txt": f"text {number % 4}"}
    sources = [Source("a", Shards(write_tars(tmp_path, samples, [12])))]
    stream = SampleStream("pairs", sources, 12, 0, "txt", RandomResizedCrop(), 16, group=group)
    (batch,) = read_batches(stream, tokenizer, 1)
    part = batch.streams["pairs"]
    assert part.groups is not None
    for a, group_a in zip(part.ids.tolist(), part.groups.tolist(), strict=True):
        for b, group_b in zip(part.ids.tolist(), part.groups.tolist(), strict=True):
            assert (group_a == group_b) == same(a, b)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_have_the_models_channels(channels: int, tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    rgba = np.dstack([smooth_pixels(16, 16), np.full((16, 16), 77, np.uint8)])
    samples: list[Sample] = [
        {"png": encode(Image.fromarray(rgba), "PNG"), "txt": "transparent"},
        {"jpg": encode(smooth_pixels(16, 16)), "txt": "opaque"},
    ]
    sources = [Source("a", Shards(write_tars(tmp_path, samples, [2])))]
    stream = SampleStream("pairs", sources, 2, 0, "txt", CenterCrop(), 16, channels=channels)
    (batch,) = read_batches(stream, tokenizer, 1)
    part = batch.streams["pairs"]
    assert part.images is not None
    assert part.images.shape == (2, channels, 16, 16)
    transparent = part.images[part.ids.tolist().index(0)]
    if channels == 4:
        assert transparent[3].unique().tolist() == [77]
    if channels == 1:
        flat = Image.alpha_composite(Image.new("RGBA", (16, 16), "white"), Image.fromarray(rgba)).convert("RGB")
        assert torch.equal(transparent[0], torch.from_numpy(np.array(flat.convert("L"))))


class WhereImagesLie(Dataset[list[bool]]):
    """Of each micro-batch, where it is read: whether its images and its views are in shared memory, channels last."""

    def __init__(self, micro_batches: Dataset[Batch]) -> None:
        self._micro_batches = micro_batches

    def __getitem__(self, item: object) -> list[bool]:
        samples = self._micro_batches[item].streams["pairs"]
        assert samples.images is not None and samples.views is not None
        for images in (samples.images, samples.views.flatten(0, 1)):
            assert images.permute(0, 2, 3, 1).is_contiguous()
        return [samples.images.is_shared(), samples.views.is_shared()]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_write_images_to_the_memory_that_the_trainer_reads(
    workers: int, tars: list[str], tokenizer: ClipTokenizer
) -> None:
    """A batch of its own in shared memory is handed over as it is; any other is copied there first."""
    augment = [v2.ColorJitter(0.4)]
    views = [(RandomResizedCrop(), augment), (CenterCrop(), [])]
    sources = [Source("pairs", Shards(list(tars)))]
    stream = SampleStream("pairs", sources, 8, 0, "txt", RandomResizedCrop(), 16, augment=augment, views=views)
    loader = build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 0, 2, num_micro_batches=2)
    reader = DataLoader(
        WhereImagesLie(loader.dataset),
        sampler=loader.sampler,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    assert list(reader) == [[workers > 0] * 2] * 4


def test_a_batch_of_a_worker_holds_one_descriptor_a_stream(tars: list[str], tokenizer: ClipTokenizer) -> None:
    def batches(workers: int, num_steps: int) -> Iterator[Batch]:
        stream = make_stream(tars, batch_size=16)
        return received(build_loader({"pairs": stream}, tokenizer, Clock(16, 700), 0, num_steps, workers=workers), 60)

    kept = []
    for batch in batches(1, 12):
        kept.append(batch)
        if len(kept) == 1:
            before = len(os.listdir("/proc/self/fd"))
    assert len(kept) == 12 and len(os.listdir("/proc/self/fd")) - before <= 12
    (alone,) = batches(0, 1)
    ours, theirs = kept[0].streams["pairs"], alone.streams["pairs"]
    for name in ("positions", "ids", "seeds", "images", "text", "lengths", "word_starts"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.packing is not None and theirs.packing is not None
    assert torch.equal(ours.packing.slots, theirs.packing.slots) and torch.equal(
        ours.packing.turns, theirs.packing.turns
    )
