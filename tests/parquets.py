"""Parquet files and data sets of `datasets` with the samples of tars."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmpretrain.data.shards import Shards
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Type of an image in Hugging Face's format."""


def rows_of(tars: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The samples of tars as rows: image, caption and key, and the fields of their json."""
    shards, rows = Shards([str(tar) for tar in tars]), []
    for i in range(shards.num_samples):
        image = {"bytes": shards.read(i, IMAGE_EXTENSIONS), "path": None}
        row = {"image": image, "caption": shards.read(i, ("txt",)).decode(), "key": shards.key(i)}
        rows.append({**json.loads(shards.read(i, ("json",))), **row})
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table; the image is a struct or bytes, as it is in the rows."""
    table = pa.Table.from_pylist(list(rows))
    images = [row["image"] for row in rows]
    if any(isinstance(image, dict) for image in images):
        table = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, IMAGE))
    return table


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 7) -> str:
    """Write rows to a Parquet file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(rows), path, row_group_size=row_group_size)
    return str(path)


def write_like(tars: Path, root: Path) -> Path:
    """`root/train/*.parquet` and `root/val/*.parquet` with the samples of `tars/train` and `tars/val`, file for file."""
    for tar in sorted(tars.glob("*/*.tar")):
        write_parquet(root / tar.parent.name / f"{tar.stem}.parquet", rows_of([tar]))
    return root
