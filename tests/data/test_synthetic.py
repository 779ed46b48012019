"""Data of noise: each sample its own, whoever computes it."""

from pathlib import Path

import numpy as np
import torch

from mmpretrain.data.order import step_positions
from mmpretrain.data.synthetic import SyntheticStream
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.schedules import TrainingProgress
from tests import runs


def test_a_sample_is_the_same_in_any_micro_batch() -> None:
    stream = SyntheticStream("pairs", 12, seed=3, image_size=9, text_length=(4, 20))
    tokenizer = ClipTokenizer(20)

    def samples(world_size: int, num_micro_batches: int) -> dict[int, tuple[torch.Tensor, list[int]]]:
        found = {}
        for rank in range(world_size):
            for item in step_positions(stream.order, range(24, 36), rank, world_size, num_micro_batches):
                read, _ = stream.read(item, tokenizer, TrainingProgress())
                assert read.images is not None and read.text is not None and read.lengths is not None
                for position, image, text, length in zip(
                    read.positions.tolist(), read.images, read.text, read.lengths.tolist(), strict=True
                ):
                    found[position] = (image, text[:length].tolist())
        return found

    whole, parts = samples(1, 1), samples(2, 3)
    assert whole.keys() == parts.keys() == set(range(24, 36))
    for position, (image, text) in whole.items():
        assert torch.equal(image, parts[position][0]) and text == parts[position][1]
    pixels = torch.stack([image for image, _ in whole.values()]).double()
    assert abs(float(pixels.mean()) - 127.5) < 4 and float(pixels.std()) > 70
    assert len({tuple(text) for _, text in whole.values()}) == 12
    assert {len(text) for _, text in whole.values()} <= set(np.arange(4, 21).tolist())


def test_synthetic_data_needs_no_files(tmp_path: Path) -> None:
    finished = runs.train(tmp_path, "data=synthetic", "trainer.duration=3steps", "eval=[]", "data.root=/nowhere")
    assert finished.code == 0, finished.stderr
    assert runs.results(tmp_path / "run")["steps"] == 3
    again = tmp_path / "again"
    again.mkdir()
    assert runs.train(again, "data=synthetic", "trainer.duration=3steps", "eval=[]", "data.workers=2").code == 0
    assert runs.tensors(tmp_path / "run", "model.safetensors") == runs.tensors(again / "run", "model.safetensors")
