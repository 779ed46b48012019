"""Embeddings on disk: found again for the same weights and data alone, bounded, and never a reason to fail."""

import logging
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpretrain.data.classes import Classes
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.evals.base import Context
from mmpretrain.evals.embedding_cache import EmbeddingCache
from mmpretrain.evals.embeddings import Embedded
from tests import runs
from tests.evals.held_out import LABELS, make_context, make_model, make_set

FIELDS: dict[str, Any] = {
    "label": "json.label",
    "classes": Classes(LABELS, [["x"]] * 3),
    "fields": {"n": "json.number"},
}


class Unreadable(Preprocess):
    """Reads nothing: a data set that is embedded again fails."""

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("an image is read")


def context(folder: Path, cache: EmbeddingCache | None, **changes: Any) -> Context:
    return make_context(make_model(), make_set(folder, **{**FIELDS, **changes}), cache=cache)


def equal(a: Embedded, b: Embedded) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in ((getattr(a, each.name), getattr(b, each.name)) for each in fields(a))
    )


def test_embeddings_are_found_again_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = context(tmp_path, None).embedded("val")
    first = context(tmp_path, EmbeddingCache(tmp_path / "cache", "weights")).embedded("val")
    again = context(tmp_path, EmbeddingCache(tmp_path / "cache", "weights"))
    data = again.sets["val"]
    assert data.preprocess is not None
    unreadable = Unreadable(data.preprocess.image_size)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        found = replace(again, sets={"val": replace(data, preprocess=unreadable)}).embedded("val")
    assert equal(first, expected) and equal(found, expected)
    assert "were computed before" in caplog.text
    assert "cannot be used and are left out" in caplog.text  # refused samples are named each time


@pytest.mark.parametrize(
    "change",
    ["model", "sources", "caption", "label", "classes", "fields", "image_size", "batch_size", "data"],
)
def test_what_embeddings_depend_on_is_part_of_their_name(change: str, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache", "weights")
    context(tmp_path, cache).embedded("val")
    other = context(tmp_path, cache)
    changes: dict[str, Any] = {
        "caption": {"caption": None}, "label": {"label": None}, "classes": {"classes": Classes(LABELS[::-1], [["x"]] * 3)},
        "sources": {"sources": "[{path: a.tsv, caption: title}, null]"},
        "fields": {"fields": {}}, "image_size": {"preprocess": Preprocess(16)}, "data": {},
    }  # fmt: skip
    if change == "model":
        other = context(tmp_path, EmbeddingCache(tmp_path / "cache", "other weights"))
    elif change == "batch_size":
        other = replace(other, batch_size=5)
    elif change == "data":
        (tmp_path / "002.tar").unlink()
        other = context(tmp_path, cache)
    else:
        other = replace(other, sets={"val": replace(other.sets["val"], **changes[change])})
    other.embedded("val")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_file_is_named_and_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = EmbeddingCache(tmp_path / "cache", "weights")
    expected = context(tmp_path, cache).embedded("val")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    assert equal(context(tmp_path, cache).embedded("val"), expected)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert equal(context(tmp_path, cache).embedded("val"), expected)
    assert "is damaged" not in caplog.text


def test_files_unused_for_longest_make_room(tmp_path: Path) -> None:
    sizes: list[int] = []
    for number in range(4):
        cache = EmbeddingCache(tmp_path / "cache", f"weights {number}", max_bytes=3 * max(sizes, default=1 << 20))
        context(tmp_path, cache).embedded("val")
        newest = max((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        sizes.append(newest.stat().st_size)
        os.utime(newest, (number, number))
        if number == 1:
            first = newest
    assert len(list((tmp_path / "cache").iterdir())) == 3 and first.exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = EmbeddingCache(tmp_path / "file", "weights")
    assert len(context(tmp_path, cache).embedded("val").images) > 0
    assert "cannot be kept in" in caplog.text and "cache=none" in caplog.text


def test_the_command_embeds_once(pairs: Path, tmp_path: Path) -> None:
    runs.trained(tmp_path, pairs, "trainer.duration=1steps", "eval=[]")
    settings = ["checkpoint=run", "eval=[retrieval]", "cache=kept", "device=cpu", "data.workers=0"]
    first, second = (runs.run("mmpretrain.evaluate", settings, tmp_path) for _ in range(2))
    assert first.code == second.code == 0, second.stderr
    assert "were computed before" not in first.stderr and "were computed before" in second.stderr
    assert first.stdout == second.stdout
    assert len(list((tmp_path / "kept").iterdir())) == 1
    third = runs.run("mmpretrain.evaluate", [*settings, "cache=none"], tmp_path)
    assert third.stdout == first.stdout and "were computed before" not in third.stderr
