"""Folders of shards that come from others: what does not make up whole tensors is refused in one line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmpretrain.checkpoints import tensor_files

ROWS = torch.arange(12.0).view(4, 3)


def write(folder: Path, *shards: tuple[slice, Any]) -> Path:
    """A folder with `w` in shards, each some rows of it and where it says that they belong."""
    for number, (rows, info) in enumerate(shards):
        (folder / "model").mkdir(exist_ok=True)
        metadata = {"DCP_SHARDING_INFO": info if isinstance(info, str) else json.dumps(info)}
        save_file({"w": ROWS[rows].clone()}, folder / "model" / f"shard-{number:05d}.safetensors", metadata)
    return folder / "model"


def at(*offsets: Any) -> dict[str, Any]:
    return {"w": {"saved_offsets": offsets}}


def test_shards_are_put_together_in_the_order_of_their_rows(tmp_path: Path) -> None:
    path = write(tmp_path, (slice(3, 4), at(3, 0)), (slice(0, 3), at(0, 0)))
    assert torch.equal(tensor_files.load(path)["w"], ROWS)


@pytest.mark.parametrize(
    "shards",
    [
        pytest.param([(slice(0, 3), at(0, 0)), (slice(3, 4), at(10**12, 0))], id="far away"),
        pytest.param([(slice(0, 3), at(1, 0))], id="the first rows are missing"),
        pytest.param([(slice(0, 2), at(0, 0)), (slice(3, 4), at(3, 0))], id="rows between are missing"),
        pytest.param([(slice(0, 3), at(0, 0)), (slice(2, 4), at(2, 0))], id="rows twice"),
        pytest.param([(slice(0, 4), at(0, 10**9))], id="columns"),
        pytest.param([(slice(0, 4), at(0))], id="fewer dimensions"),
        pytest.param([(slice(0, 4), at())], id="none"),
        pytest.param([(slice(0, 4), at("0", "0"))], id="text"),
        pytest.param([(slice(0, 4), at(-1, 0)), (slice(0, 1), at(3, 0))], id="before the first"),
        pytest.param([(slice(0, 4), at(None, 0.5))], id="no numbers"),
        pytest.param([(slice(0, 4), {})], id="of another tensor"),
        pytest.param([(slice(0, 4), [])], id="a list"),
        pytest.param([(slice(0, 4), "{")], id="no JSON"),
        pytest.param([(slice(0, 4), "[" * 100_000)], id="nested"),
    ],
)
def test_shards_that_are_no_whole_tensor_are_refused_in_one_line(
    shards: list[tuple[slice, Any]], tmp_path: Path
) -> None:
    path = write(tmp_path, *shards)
    with pytest.raises(ValueError, match="model holds no tensors") as refused:
        tensor_files.load(path)
    assert "\n" not in str(refused.value)


def test_a_pipe_among_the_shards_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, (slice(0, 4), at(0, 0)))
    os.mkfifo(path / "shard-00002.safetensors")
    with pytest.raises(ValueError, match="model holds no tensors"):
        tensor_files.load(path)
