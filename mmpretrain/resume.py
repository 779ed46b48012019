"""How far a run is, and how it goes on from its newest checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmpretrain import checkpoint, distributed, optim
from mmpretrain.data.shards import Fingerprint
from mmpretrain.ema import EMA

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """How far the run is: what a checkpoint keeps beside tensors."""

    step: int = 0
    samples: int = 0
    bad_steps: float = 0.0
    num_refused: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    loss_scale: float | None = None
    good_steps: int = 0
    best: float | None = None
    results: dict[str, float] = field(default_factory=dict)
    pending: dict[str, float] | None = None
    """What the step logs, until its evaluation is done."""

    def summary(self) -> dict[str, float]:
        """The content of results.json."""
        speed = self.samples / self.train_seconds if self.train_seconds else 0.0
        length = {"steps": self.step, "samples": self.samples}
        return {**self.results, **length, "wall_seconds": self.wall_seconds, "pairs_per_second": speed}


def find_checkpoint(folder: Path, num_steps: int, fingerprint: Mapping[str, Any]) -> Path | None:
    """The newest checkpoint of a run's directory that verifies, every process the one that process 0 chose.

    Args:
        folder: the run's directory.
        num_steps: how many the run is to take.
        fingerprint: of the data that it is trained on.

    Raises: ValueError if the checkpoint is of other data, or of a later step than `num_steps`.
    """
    checkpoints = folder / "checkpoints"
    if distributed.is_main():
        checkpoint.clean(checkpoints)
    path = distributed.from_main(lambda: checkpoint.find_latest(checkpoints, set_aside=True))
    if path is not None:
        check_fingerprint(path, fingerprint)
        if (step := checkpoint.load_state(path)["step"]) > num_steps:
            raise ValueError(
                f"trainer.duration ends at step {num_steps}, but {folder} is at step {step} already; "
                "expected at least that, or a new run: run.name=..."
            )
    return path


def check_fingerprint(path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raises: ValueError if a checkpoint was made on other data than `fingerprint` is of."""
    known = checkpoint.load_state(path)["fingerprint"]
    changed = [
        f"{name} has other shards or samples{change}"
        for name in {**known, **fingerprint}
        if (change := _change(known.get(name, {}), fingerprint.get(name, {}))) is not None
    ]
    if changed:
        raise ValueError(
            f"the data changed since {path} was saved: {'; '.join(changed)}; "
            "expected the same data to go on: restore it, or start a new run (run.name=...)"
        )


def _change(known: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """What changed in one stream's sources, in brackets where that can be told; None if nothing did."""
    changes: list[str] = []
    for source in {**known, **now}:
        saved, current = known.get(source), now.get(source)
        if saved is None or current is None:
            changes.append(f"source {source!r} is {'new' if saved is None else 'gone'}")
        elif isinstance(current, Fingerprint):
            if not current.is_of(saved):
                changes.append(current.changes_since(saved))
        elif saved != current:
            changes.append("")
    if not changes:
        return None
    told = "; ".join(change for change in changes if change)
    return f" ({told})" if told else ""


def load(path: Path, optimizer: torch.optim.Optimizer, ema: EMA | None) -> TrainState:
    """Fill the optimiser and the average from a checkpoint, whose weights the task has already; how far it is."""
    state = checkpoint.load_state(path)
    del state["fingerprint"]
    moments = checkpoint.load_tensors(path, "optimizer.safetensors")
    optim.load_optimizer_state(optimizer, moments, state.pop("optimizer"))
    if ema is not None:
        ema.load(checkpoint.load_tensors(path, "ema.safetensors"))
    log.info("resumed from %s at step %d", path, state["step"])
    if (scores := checkpoint.load_scores(path)) is not None:
        state |= {**scores, "pending": None}
    return TrainState(**state)


def is_evaluated(path: Path, num_steps: int) -> bool:
    """Whether a checkpoint is of the run's last step, and that step's evaluation is done."""
    state = checkpoint.load_state(path)
    is_pending = state.get("pending") is not None and checkpoint.load_scores(path) is None
    return bool(state["step"] >= num_steps) and not is_pending
