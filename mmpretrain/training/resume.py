"""State of a run, and resumption from its newest checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from mmpretrain import distributed, optim
from mmpretrain.checkpoints import store
from mmpretrain.config.instantiate import accepts
from mmpretrain.data.source import Fingerprint
from mmpretrain.training.ema import Average
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)

_MAX_REASON = 300


@dataclass
class TrainState:
    """Progress of a run: the part of a checkpoint that is not tensors."""

    step: int = 0
    samples: int = 0
    bad_steps: float = 0.0
    num_refused: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    loss_scale: float | None = None
    good_steps: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Losses that `LossSpikes` compares with, by objective."""
    spike: dict[str, float] = field(default_factory=dict)
    """z-score of each objective whose loss was a spike in the last step."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Number of each stream's positions that rollbacks passed over."""
    due_step: int = 0
    """Step of the last checkpoint that was due, to which a rollback goes; 0 if there is none, or no rollbacks."""
    num_rollbacks: int = 0
    """Number of rollbacks to that checkpoint."""
    best: float | None = None
    results: dict[str, float] = field(default_factory=dict)
    pending: dict[str, float] | None = None
    """Values that the step will log when its evaluation is done; None if no evaluation is pending."""

    def is_evaluated(self, num_steps: int) -> bool:
        """Return True if the run has taken `num_steps` steps and evaluated the last one."""
        return self.step >= num_steps and self.pending is None

    def summary(self) -> dict[str, float]:
        """Return the content of results.json."""
        speed = self.samples / self.train_seconds if self.train_seconds else 0.0
        length = {"steps": self.step, "samples": self.samples}
        return {**self.results, **length, "wall_seconds": self.wall_seconds, "pairs_per_second": speed}


def find_checkpoint(folder: Path, num_steps: int, fingerprint: Mapping[str, Any]) -> Path | None:
    """Return rank 0's newest valid checkpoint, broadcast to all ranks, or None.

    Args:
        folder: the run's directory.
        num_steps: number of steps of the whole run.
        fingerprint: fingerprints of the training data.

    Raises: ValueError if the checkpoint was made on other data or at a later step than `num_steps`.
    """
    checkpoints = folder / "checkpoints"
    if distributed.is_main():
        store.clean(checkpoints)
    path = distributed.from_main(lambda: store.find_latest(checkpoints, set_aside=True))
    if path is not None:
        check_fingerprint(path, fingerprint)
        if (step := read_state(path).step) > num_steps:
            raise ValueError(
                f"trainer.duration ends at step {num_steps}, but {folder} is at step {step} already; "
                "expected at least that, or a new run: run.name=..."
            )
    return path


def read_state(path: Path) -> TrainState:
    """Read the state of a checkpoint, with its scores. Raises: ValueError if state.json is not as a run writes it."""
    state = store.load_state(path)
    known = get_type_hints(TrainState)
    for key in ("step", "samples", "fingerprint", "optimizer"):
        if key not in state:
            raise ValueError(f"{path / 'state.json'} has no {key!r}; expected it as the run wrote it")
    for key, value in state.items():
        annotation = known.get(key, dict if key in ("fingerprint", "optimizer", "shards") else None)
        if not accepts(value, annotation):
            raise ValueError(f"{path / 'state.json'}: {key} is {str(value)[:40]}; expected it as the run wrote it")
    if path != store.path_of(path.parent, state["step"]):
        raise ValueError(f"{path / 'state.json'}: step is {state['step']}; expected the step in its folder's name")
    if (scores := store.read_scores(path)) is not None:
        if not all(accepts(scores[key], known[key]) for key in scores):
            raise ValueError(f"{path / 'scores.json'} holds other values than a run writes; expected none: remove it")
        state |= {**scores, "pending": None}
    return TrainState(**{key: value for key, value in state.items() if key in known})


def check_fingerprint(path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raises: ValueError if a checkpoint was made on data with another fingerprint."""
    read_state(path)
    known = store.load_state(path)["fingerprint"]
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
    """Describe the change of one stream's sources in parentheses; empty if no description is known, None if unchanged."""
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


def load_task(path: Path, task: Task) -> None:
    """Load a checkpoint's weights into the task, which may be sharded. Raises: ValueError if they do not fit the task."""
    try:
        task.load_state_dict(store.load_tensors(path, "model", task.state_dict().get))
    except RuntimeError as error:
        told = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        reason = next(iter(told[1:]), told[0])[:_MAX_REASON]
        more = f" and {len(told) - 2} more" if len(told) > 2 else ""
        raise ValueError(f"{path} does not hold the weights of this run ({reason}{more}); start a new one") from error


def load(path: Path, optimizer: torch.optim.Optimizer, average: Average | None) -> TrainState:
    """Load the optimiser's state and the averaged weights from a checkpoint.

    The task must have the checkpoint's weights already.

    Returns: the state of the run.
    Raises: ValueError if the checkpoint has another optimiser's state, or lacks averaged weights that are needed.
    """
    state = read_state(path)
    parameters: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        parameters |= zip(group["names"], group["params"], strict=True)
    moments = store.load_tensors(path, "optimizer", lambda name: parameters.get(name.rpartition("/")[0]))
    numbers = store.load_state(path)["optimizer"]
    if not all(isinstance(number, bool | int | float | list | None) for number in numbers.values()):
        raise ValueError(f"{path / 'state.json'}: the optimiser's state has more than numbers; start a new run")
    try:
        optim.load_optimizer_state(optimizer, moments, numbers)
        if average is not None:
            average.load(partial(store.load_tensors, path, "ema"))
    except (OSError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the state of this run ({reason}); start a new one") from error
    log.info("resumed from %s at step %d", path, state.step)
    return state
