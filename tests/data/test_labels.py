"""Labels of training samples: their classes, captions made of them, mixed images, and a few shots of each class."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmpretrain.batch import Samples
from mmpretrain.data.classes import Classes, read_class, read_classes
from mmpretrain.data.decode import BadSample
from mmpretrain.data.loader import build_loader
from mmpretrain.data.mixing import Mix
from mmpretrain.data.shards import Shards
from mmpretrain.data.source import selected
from mmpretrain.data.stream import SampleStream, Source
from mmpretrain.data.subset import draw_shots
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import CenterCrop
from mmpretrain.schedules import Clock
from tests.tars import encode, make_samples, smooth_pixels, write_tar

NUM_SAMPLES = 60
CLASSES = Classes(["fox", "elk", "owl"], [["a fox", "one fox"], ["an elk"], ["an owl"]])


def label_of(sample: int) -> int:
    """Class 0 has 30 samples, class 1 has 20 and class 2 has 10."""
    return (0, 1, 0, 1, 0, 2)[sample % 6]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    samples = [
        {
            "png": encode(smooth_pixels(20, 24, i), "PNG"),
            "cls": str(label_of(i)).encode(),
            "json": json.dumps({"kind": CLASSES.names[label_of(i)]}).encode(),
        }
        for i in range(NUM_SAMPLES)
    ]
    return Shards([write_tar(tmp_path_factory.mktemp("labelled") / "0.tar", samples)])


def stream(shards: Shards, **arguments: object) -> SampleStream:
    given = {"caption": None, "transform": CenterCrop(), "label": "cls", "classes": CLASSES, **arguments}
    return SampleStream("pairs", [Source("pairs", shards)], 20, 0, image_size=16, **given)  # type: ignore[arg-type]


def read(of: SampleStream, num_steps: int = 3, num_micro: int = 1, world_size: int = 1) -> Samples:
    """All samples of the first steps, in the order of their positions."""
    parts = [
        batch.streams["pairs"]
        for rank in range(world_size)
        for batch in build_loader(
            {"pairs": of}, ClipTokenizer(), Clock(1, 1), 0, num_steps, rank, world_size, num_micro
        )
    ]
    order = torch.cat([part.positions for part in parts]).argsort()

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)[order]

    names = ("positions", "ids", "seeds", "images", "lengths", "labels", "mixed_labels", "mixed_shares")
    return Samples(**{name: joined(name) for name in names})  # type: ignore[arg-type]


@pytest.mark.parametrize("label", ["cls", "json.kind"])
def test_each_row_has_the_class_of_its_sample(shards: Shards, label: str) -> None:
    samples = read(stream(shards, label=label))
    assert samples.labels is not None
    assert samples.labels.tolist() == [label_of(i) for i in samples.ids.tolist()]


def test_without_a_label_field_there_are_none(shards: Shards) -> None:
    assert read(stream(shards, label=None, classes=None)).labels is None


def test_a_label_that_is_no_class_is_named(shards: Shards) -> None:
    two = Classes(["x", "y"], [["x"], ["y"]])
    stream(shards, classes=two).check_first_sample()  # the first samples are of these two
    with pytest.raises(
        ValueError, match=r"its label 'fox' is neither an integer nor the name of a class; set data\.train"
    ):
        stream(shards, label="json.kind", classes=two).check_first_sample()


@pytest.mark.parametrize("label", ["-1", "1000000000", "9" * 30])
def test_a_label_that_cannot_be_the_number_of_a_class_is_told(label: str, tmp_path: Path) -> None:
    source = Shards([write_tar(tmp_path / "0.tar", [{"cls": label.encode()}])])
    with pytest.raises(BadSample, match=rf"its label is {label}; expected the number of a class, from 0 to"):
        read_class(source, 0, "cls", None)


def test_names_that_stand_twice_in_a_class_list_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "classes.txt").write_text("fox\nelk\nfox\n")
    assert list(read_classes(tmp_path / "classes.txt").names) == ["fox", "elk", "fox"]
    assert "1 names stand in it more than once, such as 'fox'" in caplog.text


def test_a_class_list_in_another_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("\u00c4pfel\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 \(.*\); expected UTF-8"):
        read_classes(tmp_path / "classes.txt")


def test_a_class_is_read_before_a_caption_that_is_its_text(shards: Shards) -> None:
    ours = stream(shards, caption="class_text", classes=Classes(["x", "y"], [["x"], ["y"]]), label="json.kind")
    with pytest.raises(ValueError, match=r"set data\.train\.pairs\.label to cls or a field"):
        ours.check_first_sample()


def test_captions_of_class_text_are_texts_of_the_class(shards: Shards) -> None:
    tokenizer = ClipTokenizer()
    lengths = {text: int(tokenizer([text])[1]) for texts in CLASSES.texts for text in texts}
    ours = stream(shards, caption="class_text")
    drawn: dict[int, set[str]] = {}
    for batch in build_loader({"pairs": ours}, tokenizer, Clock(1, 1), 0, 6):
        samples = batch.streams["pairs"]
        assert samples.text is not None and samples.labels is not None
        for i, label in enumerate(samples.labels.tolist()):
            text = tokenizer.decode(samples.text[i].tolist()).replace("!", "").strip()
            assert text in lengths
            drawn.setdefault(label, set()).add(text)
    assert drawn == {i: set(texts) for i, texts in enumerate(CLASSES.texts)}


def test_class_text_and_mix_need_labels(shards: Shards) -> None:
    with pytest.raises(
        ValueError, match=r"caption is class_text, .* but the stream has no classes; set data\.train\.pairs"
    ):
        stream(shards, caption="class_text", classes=None)
    with pytest.raises(
        ValueError, match=r"data\.train\.pairs\.mix mixes images and classes, but the stream has no label"
    ):
        stream(shards, label=None, mix=Mix())


def test_mixed_images_are_those_of_the_samples_that_are_drawn(shards: Shards) -> None:
    """Mixed with share m, an image x is (1 - m) x + m y for an image y of the class that is told."""
    plain = read(stream(shards))
    assert plain.images is not None and plain.labels is not None
    of_id = dict(zip(plain.ids.tolist(), plain.images))
    mixed = read(stream(shards, mix=Mix(cutmix_alpha=0.0, prob=0.5)))
    assert mixed.images is not None and mixed.mixed_shares is not None and mixed.mixed_labels is not None
    assert torch.equal(mixed.labels, plain.labels)  # type: ignore[arg-type]
    seen = 0
    for i, share in enumerate(mixed.mixed_shares.tolist()):
        if share == 0:
            assert torch.equal(mixed.images[i], plain.images[i]) and mixed.mixed_labels[i] == plain.labels[i]
            continue
        candidates = [
            ((1 - share) * plain.images[i].double() + share * other.double() - mixed.images[i]).abs().max()
            for sample, other in of_id.items()
            if label_of(sample) == int(mixed.mixed_labels[i])
        ]
        assert min(candidates) < 0.51
        seen += 1
    assert 15 < seen < 45


def test_mixing_does_not_depend_on_ranks_or_micro_batches(shards: Shards) -> None:
    one = read(stream(shards, mix=Mix()))
    other = read(stream(shards, mix=Mix()), world_size=2, num_micro=5)
    for name in ("images", "labels", "mixed_labels", "mixed_shares"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_bad_partner_is_replaced_and_told(tmp_path: Path) -> None:
    samples = make_samples(20)
    for i, sample in enumerate(samples):
        sample["cls"] = str(i % 3).encode()
    image = next(name for name in samples[7] if name in ("jpg", "png", "webp"))
    samples[7][image] = b"no image"
    ours = stream(Shards([write_tar(tmp_path / "0.tar", samples)]), mix=Mix())
    refused = [
        (refusal.code, refusal.key)
        for batch in build_loader({"pairs": ours}, ClipTokenizer(), Clock(1, 1), 0, 10)
        for refusal in batch.refused
    ]
    # Ten epochs draw the sample ten times as itself, and about as often as a partner.
    assert len(set(refused)) == 1 and len(refused) > 12


def test_shots_are_as_many_of_each_class(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    for shots, counts in ((4, [4, 4, 4]), (15, [15, 15, 10])):
        kept = draw_shots(shards, "cls", CLASSES, shots, seed=0).tolist()
        assert kept == sorted(set(kept))
        assert [sum(label_of(i) == each for i in kept) for each in range(3)] == counts
    assert kept != draw_shots(shards, "cls", CLASSES, 15, seed=1).tolist()
    with caplog.at_level("INFO"):
        draw_shots(shards, "cls", CLASSES, 15, seed=0)
    assert "1 of 3 classes have fewer than 15 samples" in caplog.text
    few = draw_shots(shards, "json.kind", CLASSES, 4, seed=0)
    assert few.tolist() == draw_shots(shards, "cls", None, 4, seed=0).tolist()
    assert set(few.tolist()) <= set(kept)
    assert selected(shards, few).num_samples == 12


def test_shots_of_unlabelled_samples_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = make_samples(4)
    with pytest.raises(ValueError, match=r"no sample of .* has a label; of the first: "):
        draw_shots(Shards([write_tar(tmp_path / "0.tar", samples)]), "cls", None, 1, seed=0)
    samples[0]["cls"] = b"1"
    assert draw_shots(Shards([write_tar(tmp_path / "1.tar", samples)]), "cls", None, 1, seed=0).tolist() == [0]
    assert "3 samples are left out, since they have no label" in caplog.text
