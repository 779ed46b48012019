"""Held-out data as embeddings: what stays, in which order, and what is said about the rest."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpretrain.data.classes import Classes
from mmpretrain.evals.embeddings import Embedded, embed, embed_texts
from tests.evals.held_out import (
    BROKEN,
    LABELS,
    NUM_SAMPLES,
    TOKENIZER,
    WITHOUT_CAPTION,
    captions,
    make_model,
    make_set,
    pixels,
    samples,
)
from tests.tars import write_tar

KEPT = [number for number in range(NUM_SAMPLES) if number not in (BROKEN, WITHOUT_CAPTION)]
CLASSES = Classes(LABELS, [[name] for name in LABELS])


def embed_set(folder: Path, batch_size: int = 4, workers: int = 0, **fields: Any) -> Embedded:
    return embed(make_model(), TOKENIZER, make_set(folder, **fields), batch_size, workers)


@torch.no_grad()
def test_images_stand_in_the_datas_order_and_each_belongs_to_its_captions(tmp_path: Path) -> None:
    model = make_model()
    result = embed_set(tmp_path)
    assert result.images.shape == (len(KEPT), 12) and result.images.dtype == torch.float32
    for row, number in enumerate(KEPT):
        image = torch.from_numpy(pixels(number)).permute(2, 0, 1)[None]
        torch.testing.assert_close(result.images[row], model.project_image(model.encode_image(image).pooled)[0])
        texts = result.pairs[result.pairs[:, 0] == row, 1]
        assert len(texts) == len(captions(number))
        for text, caption in zip(texts.tolist(), captions(number), strict=True):
            ids, lengths = TOKENIZER([caption])
            expected = model.project_text(model.encode_text(ids, lengths).pooled)[0]
            torch.testing.assert_close(result.texts[text], expected, rtol=1e-4, atol=1e-5)


def test_a_caption_of_many_images_is_one_text(tmp_path: Path) -> None:
    result = embed_set(tmp_path)
    assert len(result.texts) == len({caption for number in KEPT for caption in captions(number)})
    assert len(result.pairs) == sum(len(captions(number)) for number in KEPT)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 2), (100, 1)])
def test_batch_size_and_workers_change_nothing(tmp_path: Path, batch_size: int, workers: int) -> None:
    expected, result = embed_set(tmp_path), embed_set(tmp_path, batch_size, workers, label="cls")
    torch.testing.assert_close(result.images, expected.images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.texts, expected.texts, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.pairs, expected.pairs)
    assert result.labels.tolist() == [number % 3 for number in KEPT]
    assert [each.key for each in result.refused] == [each.key for each in expected.refused]


def test_samples_that_cannot_be_used_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        refused = embed_set(tmp_path).refused
    assert [(each.stream, each.key, Path(each.shard).name) for each in refused] == [
        ("val", f"{BROKEN:06d}", "000.tar"),
        ("val", f"{WITHOUT_CAPTION:06d}", "001.tar"),
    ]
    assert "no readable image" in refused[0].reason
    assert "'json.captions' is empty" in refused[1].reason
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("mmpretrain.")]
    assert message.startswith(f"2 of the {NUM_SAMPLES} samples of data.val.val cannot be used and are left out: ")
    for each in refused:
        assert f"{each.key} of {each.shard}: {each.reason}" in message


def test_nothing_is_said_about_a_set_without_bad_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_set(tmp_path)
    good = replace(data, shards=type(data.shards)([data.shards.location(NUM_SAMPLES - 1)]))
    assert not embed(make_model(), TOKENIZER, good, 4, 0).refused
    assert not caplog.records


def test_a_set_of_which_nothing_can_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^23 of the 23 samples of data.val.val cannot be used.*'capt'") as error:
        embed_set(tmp_path, caption="json.capt")
    assert "\n" not in str(error.value)


def test_a_set_without_captions_has_images_alone(tmp_path: Path) -> None:
    result = embed_set(tmp_path, caption=None)
    assert len(result.images) == NUM_SAMPLES - 1
    assert result.texts.shape == (0, 12) and result.pairs.shape == (0, 2)
    assert result.labels.tolist() == [-1] * len(result.images)


@pytest.mark.parametrize("label", ["cls", "json.label", "json.number"])
def test_labels_are_integers_or_names_of_classes(tmp_path: Path, label: str) -> None:
    result = embed_set(tmp_path, label=label, classes=CLASSES)
    assert result.labels.dtype == torch.int64
    assert result.labels.tolist() == [number % 3 for number in KEPT]


@pytest.mark.parametrize(("label", "expected"), [("cls", [0, 1, 2]), ("json.number", [1, 2, 0])])
def test_cls_is_an_index_also_where_classes_are_named_by_numbers(
    tmp_path: Path, label: str, expected: list[int]
) -> None:
    classes = Classes(["2", "0", "1"], [["two"], ["zero"], ["one"]])
    result = embed_set(tmp_path, label=label, classes=classes)
    assert result.labels.tolist() == [expected[number % 3] for number in KEPT]


@pytest.mark.parametrize(
    ("label", "names", "reason"),
    [
        ("json.number", ["cat", "dog"], "its label 2 is none of the 2 classes"),
        ("cls", ["cat", "dog"], "its label 2 is none of the 2 classes"),
        ("json.label", ["cat", "dog"], "its label 'ant' is neither an integer nor the name of a class"),
    ],
)
def test_labels_that_are_no_class_are_refused(tmp_path: Path, label: str, names: list[str], reason: str) -> None:
    result = embed_set(tmp_path, label=label, classes=Classes(names, [[name] for name in names]))
    assert result.labels.tolist() == [number % 3 for number in KEPT if number % 3 != 2]
    assert [each.reason for each in result.refused].count(reason) == len([n for n in KEPT if n % 3 == 2])


def test_a_label_that_is_no_text_is_refused_and_does_not_end_the_run(tmp_path: Path) -> None:
    some = samples()[:3]
    some[1]["cls"] = b"\xff\xfe"
    data = make_set(tmp_path, label="cls")
    data = replace(data, shards=type(data.shards)([write_tar(tmp_path / "other.tar", some)]))
    result = embed(make_model(), TOKENIZER, data, 4, 0)
    assert result.labels.tolist() == [0, 2]
    assert [each.key for each in result.refused] == ["000001"]


@torch.no_grad()
def test_texts_keep_their_order_whatever_their_lengths(tmp_path: Path) -> None:
    model = make_model()
    texts = ["a text of a good many words", "a", "two words", "a text of some words", "b"]
    together = embed_texts(model, TOKENIZER, texts, 3)
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], embed_texts(model, TOKENIZER, [text], 1)[0], rtol=1e-4, atol=1e-5)
