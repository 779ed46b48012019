"""Small tables of real images."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakePairs = Callable[..., Path]


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """Writes `num` noise images of `side` pixels and `pairs.tsv` (path, caption, kind) under `tmp_path / "raw"`."""

    def make(num: int = 23, side: int = 8, **columns: list[str]) -> Path:
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        rows = []
        for number in range(num):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            row = {"path": f"{number}.png", "caption": f"caption {number}", "kind": ["cat", "dog", "ant"][number % 3]}
            rows.append(row | {name: values[number] for name, values in columns.items()})
        with open(folder / "pairs.tsv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
            writer.writeheader()
            writer.writerows(rows)
        return folder / "pairs.tsv"

    return make
