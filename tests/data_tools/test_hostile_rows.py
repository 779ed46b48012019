"""No row of a table, and no file behind one, ends a build: whatever they are, the good row is built."""

import csv
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.build import BuildOptions, build
from data_tools.images import ImageOptions
from mmpretrain.data.pairs import read_pairs
from mmpretrain.data.shards import Shards, expand_shards
from tests.tars import encode

COLUMNS = ("image", "caption", "label")
GOOD = {"image": "good.png", "caption": "good", "label": "cat"}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
IMAGES = [encode(PIXELS, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
IMAGES += [encode(Image.fromarray(PIXELS).convert(mode), "TIFF") for mode in ("RGBA", "CMYK", "1", "I;16")]

texts = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates, too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
paths = st.sampled_from(
    [
        "0",
        "1",
        "good.png",
        "pipe",
        "loop",
        "zero",
        "broken",
        ".",
        "..",
        "/",
        "../out",
        "x" * 256,
        "0/1",
        "a\0",
        "\udcff",
    ]
)
rows = st.lists(
    st.dictionaries(texts, values, max_size=2).flatmap(
        lambda more: st.fixed_dictionaries(
            {"image": paths | values, "caption": st.just("c") | values, "label": st.just("1") | values}
        ).map(lambda row: {**more, **row})
    ),
    max_size=6,
)
changes = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 6), st.binary(max_size=6)), max_size=3)
files = st.lists(st.tuples(st.sampled_from(IMAGES), changes), min_size=2, max_size=2)


def changed(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Bytes with some of them replaced: (position, how many, by what)."""
    for position, length, replacement in edits:
        data = data[:position] + replacement + data[position + length :]
    return data


def written(table: list[dict[str, object]], suffix: str, edits: list[tuple[int, int, bytes]]) -> bytes:
    """A table of a good row and others, whose bytes behind the good one are changed."""
    buffer = io.StringIO()
    if suffix == "jsonl":
        lines = [json.dumps(row, ensure_ascii=len(row) % 2 == 0) for row in [GOOD, *table]]
        head, rest = lines[0] + "\n", "\n".join(lines[1:])
    else:
        writer = csv.writer(buffer, delimiter="\t" if suffix == "tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([COLUMNS, GOOD.values()])
        head = buffer.getvalue()
        writer.writerows([[str(row[column]) for column in COLUMNS] for row in table])
        rest = buffer.getvalue()[len(head) :]
    return head.encode() + changed(rest.encode("utf-8", "surrogatepass"), edits)


def members(shards: Shards, extension: str) -> list[bytes]:
    samples = [sample for sample in range(shards.num_samples) if shards.member(sample, (extension,))]
    return [shards.read(sample, (extension,)) for sample in samples]


@pytest.mark.filterwarnings("ignore")  # of Pillow's, about the images
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_any_row_is_built_or_refused(suffix: str) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(rows, changes, files, st.sampled_from([None, "label"]), st.sampled_from([None, "jpg", "png", "webp"]))
    def check(
        table: list[dict[str, object]],
        edits: list[tuple[int, int, bytes]],
        images: list[tuple[bytes, list[tuple[int, int, bytes]]]],
        label: str | None,
        format: str | None,
    ) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "raw"
            folder.mkdir()
            os.mkfifo(folder / "pipe")
            for link, target in {"loop": "loop", "zero": "/dev/zero", "broken": "/proc/self/mem"}.items():
                (folder / link).symlink_to(target)
            for number, (data, image_edits) in enumerate(images):
                (folder / str(number)).write_bytes(changed(data, image_edits))
            (folder / "good.png").write_bytes(IMAGES[1])
            pairs = folder / f"pairs.{suffix}"
            pairs.write_bytes(written(table, suffix, edits))
            output = Path(name) / "out"
            options = BuildOptions(label_column=label, samples_per_shard=2, image=ImageOptions(4, format))
            result = build(pairs, output, options, workers=1)

            read = read_pairs(pairs)
            assert result.num_samples + result.num_refused == len(read.rows) + len(read.refused)
            refused = [json.loads(line) for line in (output / "refused.jsonl").read_bytes().splitlines()]
            assert len(refused) == result.num_refused and all(refusal["reason"] for refusal in refused)
            shards = Shards(expand_shards(str(output)))
            assert shards.problems == [] and shards.num_samples == result.num_samples >= 1
            assert all(text.decode().strip() for text in members(shards, "txt"))
            assert GOOD in [json.loads(data.decode()) for data in members(shards, "json")]

    check()
