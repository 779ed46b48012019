"""Freezing of parameters that no objective reaches or that `trainer.freeze` names, as a function of the samples seen."""

from collections.abc import Mapping, Set
from fractions import Fraction

from mmpretrain.errors import nearest
from mmpretrain.schedules import Clock, Duration, ScheduledValue, TrainingProgress
from mmpretrain.training.task import Task


class Freeze:
    """Freeze unreached parameters, and parts of the model permanently or for a duration (LiT, Zhai et al. 2022).

    Parameters that are trained at any time of the run have `requires_grad` after `__init__`, so that an optimiser
    built then holds all of them.

    Args:
        task: module whose parameters are frozen.
        until: duration for which each part stays frozen, by the part's name inside the model (`image`,
            `text.transformer.resblocks.0`); None freezes it permanently.
        reached: names of the parameters that each objective's gradient reaches (see `probe.reached_parameters`).

    Raises: ValueError if the model has no such part.
    """

    def __init__(self, task: Task, until: Mapping[str, Duration | None], reached: Mapping[str, Set[str]]) -> None:
        self._task, self._reached = task, reached
        self._until: dict[str, Duration] = {}
        unreached = [
            name for name, _ in task.named_parameters() if not any(name in names for names in reached.values())
        ]
        frozen = set(unreached)
        for part, duration in until.items():
            prefix = f"model.{part}"
            members = [name for name, _ in task.named_parameters() if f"{name}.".startswith(f"{prefix}.")]
            if not members:
                parts = [name.removeprefix("model.") for name, _ in task.named_modules() if name.startswith("model.")]
                raise ValueError(f"trainer.freeze has {part!r}, which is no part of the model; {nearest(part, parts)}")
            if duration is None:
                frozen.update(members)
            else:
                self._until.update(dict.fromkeys(members, duration))
        self.unreached = [name for name, p in task.named_parameters() if p.requires_grad and name in unreached]
        """Names of trainable parameters that no objective reaches."""
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        # Names, because FSDP2 replaces the parameter objects.
        self._trainable = frozenset(name for name, parameter in task.named_parameters() if parameter.requires_grad)
        self._trained = self._trainable

    def reset(self) -> None:
        """Set `requires_grad` as before the first step, for an optimiser of all parameters that will be trained."""
        for name, parameter in self._task.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        self._trained = self._trainable

    def check_trains(self, weights: Mapping[str, ScheduledValue], clock: Clock) -> None:
        """Raises: ValueError if no parameter would be trained at some step of the run."""
        breakpoints = [place for weight in weights.values() for place in weight.breakpoint_samples(clock)]
        thaws = [clock.samples(until) for until in self._until.values()]
        # Weights become zero only at breakpoints: it suffices to check the first step at or after each of them.
        begins = {-(-place // clock.batch_size) * clock.batch_size for place in [Fraction(0), *breakpoints, *thaws]}
        for samples in sorted(int(place) for place in begins if place < clock.total_samples):
            progress = TrainingProgress(samples, clock)
            at = {name: weight(progress) for name, weight in weights.items()}
            if not any(self._is_trained(name, progress, at) for name in self._trainable):
                shown = ", ".join(f"objective.{name}.weight {value:g}" for name, value in at.items())
                frozen = f", trainer.freeze of {len(self._until)} parameters" if self._until else ""
                raise ValueError(
                    f"nothing would be trained at sample {samples} ({shown}{frozen}); expected an objective with a weight "
                    "above 0 that reaches what is not frozen: change that schedule, or trainer.freeze"
                )

    def _is_trained(self, name: str, progress: TrainingProgress, weights: Mapping[str, float]) -> bool:
        is_reached = any(weights[objective] and name in names for objective, names in self._reached.items())
        until = self._until.get(name)
        return is_reached and (until is None or progress.samples >= progress.clock.samples(until))

    def apply(self, progress: TrainingProgress, weights: Mapping[str, float]) -> bool:
        """Set `requires_grad` for the step that starts at `progress`. Objectives of weight 0 reach no parameter.

        Returns: True if the set of trained parameters changed.
        """
        trained = frozenset(name for name in self._trainable if self._is_trained(name, progress, weights))
        if trained == self._trained:
            return False
        for name, parameter in self._task.named_parameters():
            parameter.requires_grad_(name in trained)
        self._trained = trained
        return True
