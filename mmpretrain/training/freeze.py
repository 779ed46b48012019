"""Which parameters are trained, as a function of the samples seen: what some objective reaches and nothing freezes."""

from collections.abc import Mapping, Set
from fractions import Fraction

from mmpretrain.errors import nearest
from mmpretrain.schedules import Clock, Duration, ScheduledValue, TrainingProgress
from mmpretrain.training.task import Task


class Freeze:
    """Freezes what no objective reaches, and parts of the model for ever or for a time (LiT, Zhai et al. 2022).

    What will be trained at some time is trainable after `__init__`, so that an optimiser made then holds it.

    Args:
        task: whose parameters are frozen.
        until: by the part's name inside the model (`image`, `text.transformer.resblocks.0`), how long it is frozen;
            None is for ever.
        reached: the parameters that each objective's gradient reaches (see `parallel.reached_parameters`).

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
        """What no objective reaches, though the model would train it."""
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        # Names, since FSDP2 puts other parameters in the places of these.
        self._trainable = frozenset(name for name, parameter in task.named_parameters() if parameter.requires_grad)
        self._trained = self._trainable

    def check_trains(self, weights: Mapping[str, ScheduledValue], clock: Clock) -> None:
        """Raises: ValueError if at some step of the run nothing would be trained."""
        breakpoints = [place for weight in weights.values() for place in weight.breakpoint_samples(clock)]
        thaws = [clock.samples(until) for until in self._until.values()]
        # Between breakpoints no weight comes to 0: a step that begins at one or just behind it tells.
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
        """Freeze and thaw for the step that starts at `progress`, an objective of weight 0 reaching nothing.

        Returns: whether anything changed.
        """
        trained = frozenset(name for name in self._trainable if self._is_trained(name, progress, weights))
        if trained == self._trained:
            return False
        for name, parameter in self._task.named_parameters():
            parameter.requires_grad_(name in trained)
        self._trained = trained
        return True
