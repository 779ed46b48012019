"""Everything that changes over a run is f(samples seen): durations, and the learning rate's schedules."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from mmpretrain.usage import check_number

Unit = Literal["epochs", "samples", "steps", "%", "min"]

_PATTERN = re.compile(r"([0-9]*\.?[0-9]+)\s*([kMG]?)(epochs?|samples?|steps?|%|min)")
_UNITS: dict[str, Unit] = {
    "epoch": "epochs", "epochs": "epochs", "sample": "samples", "samples": "samples",
    "step": "steps", "steps": "steps", "%": "%", "min": "min",
}  # fmt: skip
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Duration:
    """A length of training: `20epochs`, `10Msamples`, `2000steps`, `5%` (of the run) or `30min` (of wall time).

    The value is exact: in floats 7% of 100 samples lie beyond sample 7, and 1.1Msamples beyond 1,100,000.
    """

    value: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: str | int | float, name: str, wall_time: bool = False) -> "Duration":
        """Read a duration.

        Args:
            text: what the user wrote.
            name: the configuration key it stands under, for the message.
            wall_time: whether `min` makes sense here.

        Raises: ValueError if it is no duration, or a wall time where none makes sense.
        """
        match = _PATTERN.fullmatch(str(text).strip())
        units = "epochs, samples, steps, %" + (" or min" if wall_time else "")
        if match is None:
            raise ValueError(
                f"{name} is {text!r}; expected a number with a unit ({units}), such as 20epochs, 10Msamples or 2000steps"
            )
        number, prefix, unit = match.groups()
        if unit == "%" and float(number) > 100:
            raise ValueError(f"{name} is {text!r}; expected at most 100%, the whole run")
        if _UNITS[unit] == "min" and not wall_time:
            raise ValueError(f"{name} is {text!r}; wall time makes no sense here: use one of {units}")
        return cls(Fraction(number) * _PREFIXES[prefix], _UNITS[unit])


@dataclass(frozen=True)
class Clock:
    """What a duration is measured against: the run's batch size, epoch and length, in samples of its first stream."""

    batch_size: int
    epoch_samples: int
    total_samples: int = 0

    def samples(self, duration: Duration) -> Fraction:
        """A duration in samples. Raises: ValueError for a wall time."""
        if duration.unit == "samples":
            return duration.value
        if duration.unit == "steps":
            return duration.value * self.batch_size
        if duration.unit == "epochs":
            return duration.value * self.epoch_samples
        if duration.unit == "%":
            return duration.value / 100 * self.total_samples
        raise ValueError(f"{float(duration.value):g}min has no length in samples; use epochs, samples, steps or %")

    def is_due(self, every: Duration, before: int, after: int) -> bool:
        """Whether a multiple of `every` lies in (before, after], in samples seen; never if it is zero."""
        period = self.samples(every)
        return period > 0 and after // period > before // period


class Schedule(Protocol):
    """A learning rate's factor as a function of the samples seen."""

    def __call__(self, samples: int, clock: Clock) -> float: ...

    def depends_on_total(self) -> bool:
        """Whether a longer run would have had other values so far."""
        ...


def _warmup_factor(samples: int, clock: Clock, warmup: Duration) -> float:
    """Linear from one batch's share up to 1; it counts the batch at hand, so that the first step moves."""
    length = float(clock.samples(warmup))
    return min(1.0, (samples + clock.batch_size) / length) if length > 0 else 1.0


class WarmupCosine:
    """Linear warm-up, then half a cosine down to `final`.

    factor = final + (1 - final) (1 + cos(pi (s - W) / (S - W))) / 2   for s >= W

    Args:
        warmup: W, a duration.
        final: the factor at the run's end.
    """

    def __init__(self, warmup: str = "0steps", final: float = 0.0) -> None:
        self.warmup = Duration.parse(warmup, "schedule.warmup")
        check_number("schedule.final", final, at_least=0)
        self.final = final

    def __call__(self, samples: int, clock: Clock) -> float:
        """The factor of the step that starts after `samples`."""
        warmup = float(clock.samples(self.warmup))
        if samples < warmup:
            return _warmup_factor(samples, clock, self.warmup)
        progress = min(1.0, (samples - warmup) / max(1.0, clock.total_samples - warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def depends_on_total(self) -> bool:
        return True


class WarmupConstant:
    """Linear warm-up, a constant, and at the end a linear cool-down to `final`.

    Args:
        warmup, cooldown: durations.
        final: the factor at the end of the cool-down.
    """

    def __init__(self, warmup: str = "0steps", cooldown: str = "0steps", final: float = 0.0) -> None:
        self.warmup = Duration.parse(warmup, "schedule.warmup")
        self.cooldown = Duration.parse(cooldown, "schedule.cooldown")
        check_number("schedule.final", final, at_least=0)
        self.final = final

    def __call__(self, samples: int, clock: Clock) -> float:
        """The factor of the step that starts after `samples`."""
        cooldown = float(clock.samples(self.cooldown))
        left = clock.total_samples - samples
        if cooldown > 0 and left < cooldown:
            return self.final + (1 - self.final) * max(0.0, left / cooldown)
        return _warmup_factor(samples, clock, self.warmup)

    def depends_on_total(self) -> bool:
        return self.cooldown.value > 0 or self.warmup.unit == "%"
