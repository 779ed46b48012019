"""How far a run is, and how it goes on from its newest checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from mmpretrain import distributed, files, optim
from mmpretrain.checkpoints import store
from mmpretrain.config.instantiate import accepts
from mmpretrain.data.shards import Fingerprint
from mmpretrain.training.ema import EMA
from mmpretrain.training.task import Task

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

    def is_evaluated(self, num_steps: int) -> bool:
        """Whether the run has taken `num_steps`, and evaluated the last one."""
        return self.step >= num_steps and self.pending is None

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
    """How far a checkpoint's run was. Raises: ValueError if its state.json is not what a run writes."""
    state = store.load_state(path)
    known = get_type_hints(TrainState)
    for key in ("step", "samples", "fingerprint", "optimizer"):
        if key not in state:
            raise ValueError(f"{path / 'state.json'} has no {key!r}; expected it as the run wrote it")
    for key, value in state.items():
        annotation = known.get(key, dict if key in ("fingerprint", "optimizer") else None)
        if not accepts(value, annotation):
            raise ValueError(f"{path / 'state.json'}: {key} is {str(value)[:40]}; expected it as the run wrote it")
    if path != store.path_of(path.parent, state["step"]):
        raise ValueError(f"{path / 'state.json'}: step is {state['step']}; expected that of its folder")
    scores = path / "scores.json"
    if scores.exists():  # of the step's evaluation, which came after the checkpoint
        found = files.read_json(scores)
        if set(found) != {"results", "best"} or not all(accepts(found[key], known[key]) for key in found):
            raise ValueError(f"{scores} does not hold results and best; expected it as the run wrote it: remove it")
        state |= {**found, "pending": None}
    return TrainState(**{key: value for key, value in state.items() if key in known})


def check_fingerprint(path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raises: ValueError if a checkpoint was made on other data than `fingerprint` is of."""
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


def load_task(path: Path, task: Task) -> None:
    """Fill the task from a checkpoint. Raises: ValueError if it holds the weights of another one."""
    try:
        task.load_state_dict(store.load_tensors(path, "model.safetensors"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights of this run ({reason}); start a new one") from error


def load(path: Path, optimizer: torch.optim.Optimizer, ema: EMA | None) -> TrainState:
    """Fill the optimiser and the average from a checkpoint, whose weights the task has already; how far it is.

    Raises: ValueError if it holds another optimiser's state, or no average.
    """
    state = read_state(path)
    moments, numbers = store.load_tensors(path, "optimizer.safetensors"), store.load_state(path)["optimizer"]
    if not all(isinstance(number, bool | int | float | list | None) for number in numbers.values()):
        raise ValueError(f"{path / 'state.json'}: the optimiser's state has more than numbers; start a new run")
    try:
        optim.load_optimizer_state(optimizer, moments, numbers)
        if ema is not None:
            ema.load(store.load_tensors(path, "ema.safetensors"))
    except (OSError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the state of this run ({reason}); start a new one") from error
    log.info("resumed from %s at step %d", path, state.step)
    return state
