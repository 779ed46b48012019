"""Everything at once, killed."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests import runs


@pytest.mark.slow
def test_everything_at_once_is_resumed_bit_for_bit(pairs: Path, tmp_path: Path) -> None:
    settings = (
        "trainer.duration=10steps", "trainer.ema_decay=0.9", "trainer.precision=fp16", "checkpoint.every=2steps",
        "trainer.freeze={text: 5steps}", "optimizer=timm", "optimizer.name=lamb",
        "checkpoint.best=eval-val/image_retrieval_recall@5",
        "objective.infonce.positives=group", "data.train.pairs.group=json.label", "augmentation=color_jitter",
        "data.train.pairs.caption={txt: 1, json.caption: 3}",
    )  # fmt: skip
    outcomes: list[dict[str, Any]] = []
    for name, stop in (("whole", None), ("killed", 5)):
        folder = tmp_path / name
        folder.mkdir()
        if stop is not None:
            command = runs.start_train(folder, f"data.root={pairs}", *settings)
            run = folder / "run"
            command.wait_for(lambda run=run: len(runs.checkpoints(run)) >= 2, "two checkpoints")
            command.send(signal.SIGKILL)
            command.wait()
        runs.trained(folder, pairs, *settings)
        outcomes.append({**runs.exact_outcome(folder / "run"), "ema": runs.tensors(folder / "run", "ema.safetensors")})
    assert outcomes[0] == outcomes[1]
