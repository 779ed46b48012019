"""Everything that changes over a run is f(samples seen): durations, scheduled values, and the learning rate's schedules."""

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

from mmpretrain.errors import UsageError, check_number

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

        Raises: UsageError if it is no duration, or a wall time where none makes sense.
        """
        match = _PATTERN.fullmatch(str(text).strip())
        units = "epochs, samples, steps, %" + (" or min" if wall_time else "")
        if match is None:
            raise UsageError(
                f"{name} is {text!r}; expected a number with a unit ({units}), such as 20epochs, 10Msamples or 2000steps"
            )
        number, prefix, unit = match.groups()
        if unit == "%" and float(number) > 100:
            raise UsageError(f"{name} is {text!r}; expected at most 100%, the whole run")
        if _UNITS[unit] == "min" and not wall_time:
            raise UsageError(f"{name} is {text!r}; wall time makes no sense here: use one of {units}")
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


@dataclass(frozen=True)
class TrainingProgress:
    """A moment of a run: the samples seen before a step, and what durations are measured against."""

    samples: int = 0
    clock: Clock = Clock(1, 1)


Scheduled = float | Mapping[str, Mapping[str, float]]
"""A number, or how it changes: {piecewise: {0%: .5, 90%: 0}}, {linear: {...}} or {cosine: {...}}."""
_KINDS = ("piecewise", "linear", "cosine")
SCHEDULE_TEXT = re.compile(rf"\{{\s*({'|'.join(_KINDS)})\s*:")
"""How a schedule begins where it is written on a command line."""


class ScheduledValue:
    """A number that may change over a run, as a function of the samples seen.

    Between the breakpoints (s_0, v_0), (s_1, v_1), ..., durations from the run's start, with p = (s - s_i) / (s_{i+1} - s_i):

        piecewise   v_i
        linear      v_i + (v_{i+1} - v_i) p
        cosine      v_i + (v_{i+1} - v_i) (1 - cos(pi p)) / 2

    Before the first breakpoint it is v_0, after the last one v_n.

    Args:
        value: a number, or `{piecewise: {0%: .5, 90%: 0}}` with one of the three kinds.
        name: the configuration key it stands under, for messages.
        bounds: what each of its values has to keep to (see `usage.check_number`).
        in_stages: it stays the same between breakpoints (the data path's values do): linear and cosine are refused.

    Raises: UsageError if it is neither, for breakpoints that are no durations, and for values out of bounds.
    """

    def __init__(self, value: Scheduled, name: str, in_stages: bool = False, **bounds: float) -> None:
        self.kind = "constant"
        breakpoints: Mapping[str, float] = (
            {"0%": value} if isinstance(value, int | float) and not isinstance(value, bool) else {}
        )
        if isinstance(value, Mapping) and len(value) == 1:
            ((self.kind, breakpoints),) = value.items()
        kinds = _KINDS[:1] if in_stages else _KINDS
        if not breakpoints or not isinstance(breakpoints, Mapping) or self.kind not in ("constant", *kinds):
            raise UsageError(
                f"{name} is {value!r}; expected a number, or how it changes ({', '.join(kinds)}), such as "
                "{piecewise: {0%: 1, 90%: 0}}"
            )
        self.name = name
        self.breakpoints = [
            (Duration.parse(at, f"a breakpoint of {name}"), number) for at, number in breakpoints.items()
        ]
        for _, number in self.breakpoints:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise UsageError(f"{name} is {value!r}; expected finite numbers")
            check_number(name, number, **bounds)

    @property
    def values(self) -> list[float]:
        """What it is at its breakpoints: its extremes are among them."""
        return [number for _, number in self.breakpoints]

    @property
    def is_constant(self) -> bool:
        return len(set(self.values)) == 1

    def __call__(self, progress: TrainingProgress) -> float:
        """Its value for the step that starts at `progress`. Raises: UsageError if the breakpoints are not in order."""
        breakpoint_samples = self.breakpoint_samples(progress.clock)
        i = bisect_right(breakpoint_samples, progress.samples) - 1
        if i < 0 or i == len(breakpoint_samples) - 1 or self.kind == "piecewise":
            return self.breakpoints[max(i, 0)][1]
        part = float((progress.samples - breakpoint_samples[i]) / (breakpoint_samples[i + 1] - breakpoint_samples[i]))
        if self.kind == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.breakpoints[i][1] + (self.breakpoints[i + 1][1] - self.breakpoints[i][1]) * part

    def breakpoint_samples(self, clock: Clock) -> list[Fraction]:
        """Where its breakpoints lie, in samples. Raises: UsageError if they are not in order."""
        breakpoint_samples = [clock.samples(duration) for duration, _ in self.breakpoints]
        if breakpoint_samples != sorted(set(breakpoint_samples)):
            raise UsageError(
                f"{self.name} has breakpoints at {', '.join(f'{float(place):g}' for place in breakpoint_samples)} samples; "
                "expected each after the one before"
            )
        return breakpoint_samples

    def depends_on_total(self) -> bool:
        """Whether a longer run would have had other values so far."""
        return not self.is_constant and any(at.unit == "%" and at.value > 0 for at, _ in self.breakpoints)


def scheduled_values(node: Any, path: str = "") -> Iterator[ScheduledValue]:
    """The values below a part of the configuration that change over the run."""
    if isinstance(node, Mapping):
        if len(node) == 1 and next(iter(node)) in _KINDS:
            yield ScheduledValue(node, path)
        for key, child in node.items():
            yield from scheduled_values(child, f"{path}.{key}" if path else str(key))


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
        warmup: W, the length of the warm-up, a duration.
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
        part = min(1.0, (samples - warmup) / max(1.0, clock.total_samples - warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * part)) / 2

    def depends_on_total(self) -> bool:
        return True


class WarmupConstant:
    """Linear warm-up, a constant, and at the end a linear cool-down to `final`.

    Args:
        warmup: length of the warm-up, a duration.
        cooldown: length of the cool-down at the run's end, a duration.
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
