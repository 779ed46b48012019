"""Durations, scheduled values and learning-rate schedules, all as functions of the number of samples seen."""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
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
    """Length of training: `20epochs`, `10Msamples`, `2000steps`, `5%` (of the run) or `30min` (of wall time).

    The value is an exact fraction. As floats, 7% of 100 samples would be more than 7, and 1.1Msamples more than 1,100,000.
    """

    value: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: str | int | float, name: str, wall_time: bool = False) -> "Duration":
        """Parse a duration.

        Args:
            text: value from the configuration.
            name: configuration key of the value, for error messages.
            wall_time: accept the unit `min`.

        Raises: UsageError if `text` is not a duration, exceeds 100%, or is a wall time and `wall_time` is False.
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
    """Batch size, epoch and length of a run in samples of its first stream, which convert durations to samples."""

    batch_size: int
    epoch_samples: int
    total_samples: int = 0

    def samples(self, duration: Duration) -> Fraction:
        """Convert a duration to samples.

        Raises: ValueError for a wall time.
        """
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
        """Return True if a multiple of `every` lies in (before, after], in samples seen. Always False if `every` is zero."""
        period = self.samples(every)
        return period > 0 and after // period > before // period


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a run before a step: the number of samples seen, and the clock of the run."""

    samples: int = 0
    clock: Clock = Clock(1, 1)


Scheduled = float | Mapping[str, Mapping[str, float]]
"""A number, or a schedule such as {piecewise: {0%: .5, 90%: 0}}, {linear: {...}} or {cosine: {...}}."""
_KINDS = ("piecewise", "linear", "cosine")
SCHEDULE_TEXT = re.compile(rf"\{{\s*({'|'.join(_KINDS)})\s*:")
"""Beginning of a schedule on the command line."""


class ScheduledValue:
    """A number that may change over a run, as a function of the samples seen.

    A schedule has breakpoints (s_0, v_0), (s_1, v_1), ..., where s_i is a duration from the start of the run. Its value at
    s_i <= s < s_{i+1}, with p = (s - s_i) / (s_{i+1} - s_i), is

        piecewise   v_i
        linear      v_i + (v_{i+1} - v_i) p
        cosine      v_i + (v_{i+1} - v_i) (1 - cos(pi p)) / 2

    Before the first breakpoint it is v_0, from the last one on v_n.

    Args:
        value: a number, or a schedule of one of the three kinds, such as `{piecewise: {0%: .5, 90%: 0}}`.
        name: configuration key of the value, for error messages.
        in_stages: accept only the kind `piecewise`, for values of the data path, which are constant between breakpoints.
        bounds: bounds of all values (see `errors.check_number`).

    Raises: UsageError if `value` is neither a number nor a schedule, a breakpoint is not a duration, or a value is out of
        bounds.
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
                f"{name} is {value!r}; expected a number or a schedule ({', '.join(kinds)}), such as "
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
        """Values at the breakpoints, which include the minimum and maximum of the schedule."""
        return [number for _, number in self.breakpoints]

    @property
    def is_constant(self) -> bool:
        return len(set(self.values)) == 1

    def __call__(self, progress: TrainingProgress) -> float:
        """Return the value for the step that starts at `progress`.

        Raises: UsageError if the breakpoints are not in ascending order.
        """
        breakpoint_samples = self.breakpoint_samples(progress.clock)
        i = bisect_right(breakpoint_samples, progress.samples) - 1
        if i < 0 or i == len(breakpoint_samples) - 1 or self.kind == "piecewise":
            return self.breakpoints[max(i, 0)][1]
        part = float((progress.samples - breakpoint_samples[i]) / (breakpoint_samples[i + 1] - breakpoint_samples[i]))
        if self.kind == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.breakpoints[i][1] + (self.breakpoints[i + 1][1] - self.breakpoints[i][1]) * part

    def breakpoint_samples(self, clock: Clock) -> list[Fraction]:
        """Return the breakpoints in samples.

        Raises: UsageError if they are not in ascending order.
        """
        breakpoint_samples = [clock.samples(duration) for duration, _ in self.breakpoints]
        if breakpoint_samples != sorted(set(breakpoint_samples)):
            raise UsageError(
                f"{self.name} has breakpoints at {', '.join(f'{float(place):g}' for place in breakpoint_samples)} samples; "
                "expected each one after the previous one"
            )
        return breakpoint_samples


def scheduled_values(node: Any, path: str = "") -> Iterator[ScheduledValue]:
    """Yield all schedules in a part of the configuration, searched recursively."""
    if isinstance(node, Mapping):
        if len(node) == 1 and next(iter(node)) in _KINDS:
            yield ScheduledValue(node, path)
        for key, child in node.items():
            yield from scheduled_values(child, f"{path}.{key}" if path else str(key))


class Schedule(Protocol):
    """Factor of the learning rate as a function of the samples seen and the clock of the run, without state."""

    def __call__(self, samples: int, clock: Clock) -> float:
        """Return the factor of the step that starts after `samples` samples."""
        ...


def first_difference(
    value: Callable[[TrainingProgress], object], num_steps: int, clock: Clock, other: Clock
) -> int | None:
    """Return the first step at which a value depends on the length of the run, or None.

    If it returns None for the steps that a run has taken, a run of the other length would have used the same values, so that
    training can continue with that length. The values themselves are compared, so that this holds for every schedule.

    Args:
        value: function of the progress before a step.
        num_steps: number of steps that are compared, from the start of the run.
        clock, other: clocks of the run with its two lengths; their batch size is the same.

    Returns: the number of the step, counted from 1; None if all values are equal.
    """
    for step in range(num_steps):
        samples = step * clock.batch_size
        if value(TrainingProgress(samples, clock)) != value(TrainingProgress(samples, other)):
            return step + 1
    return None


def _warmup_factor(samples: int, clock: Clock, warmup: Duration) -> float:
    """Return the factor of a linear warm-up.

    The current batch is included in the samples seen, so that the factor of the first step is not zero.
    """
    length = float(clock.samples(warmup))
    return min(1.0, (samples + clock.batch_size) / length) if length > 0 else 1.0


def _cooldown_factor(samples: int, clock: Clock, cooldown: Duration, final: float, shape: str) -> float | None:
    """Return the factor of a cool-down at the end of the run, or None before it begins (see `WarmupConstant`)."""
    length = float(clock.samples(cooldown))
    left = clock.total_samples - samples
    if not (length > 0 and left < length):
        return None
    part = max(0.0, left / length)
    return final + (1 - final) * (part if shape == "linear" else 1 - math.sqrt(1 - part))


class WarmupCosine:
    """Linear warm-up, then cosine decay to `final` (Loshchilov and Hutter 2017).

    factor = final + (1 - final) (1 + cos(pi (s - W) / (S - W))) / 2   for W <= s <= S, the length of the run

    Args:
        warmup: W, duration of the warm-up.
        final: factor at the end of the run.
    """

    def __init__(self, warmup: str = "0steps", final: float = 0.0) -> None:
        self.warmup = Duration.parse(warmup, "schedule.warmup")
        check_number("schedule.final", final, at_least=0)
        self.final = final

    def __call__(self, samples: int, clock: Clock) -> float:
        """Return the factor of the step that starts after `samples` samples."""
        warmup = float(clock.samples(self.warmup))
        if samples < warmup:
            return _warmup_factor(samples, clock, self.warmup)
        part = min(1.0, (samples - warmup) / max(1.0, clock.total_samples - warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * part)) / 2


class WarmupConstant:
    """Linear warm-up, then a constant factor of 1, then a cool-down to `final` at the end of the run.

    With a cool-down it is warm-up-stable-decay (WSD; MiniCPM, Hu et al. 2024). At s samples of S, with a cool-down of C,

        linear   factor = final + (1 - final) (S - s) / C               for s > S - C
        1-sqrt   factor = final + (1 - final) (1 - sqrt((s - (S - C)) / C))   (Hägele et al. 2024)

    A run can be extended, or branched, from any checkpoint before the cool-down, if `warmup` is not in %.

    Args:
        warmup: duration of the warm-up.
        cooldown: C, duration of the cool-down.
        final: factor at the end of the cool-down.
        shape: `linear` or `1-sqrt`, the form of the cool-down.
    """

    def __init__(
        self,
        warmup: str = "0steps",
        cooldown: str = "0steps",
        final: float = 0.0,
        shape: Literal["linear", "1-sqrt"] = "linear",
    ) -> None:
        self.warmup = Duration.parse(warmup, "schedule.warmup")
        self.cooldown = Duration.parse(cooldown, "schedule.cooldown")
        check_number("schedule.final", final, at_least=0)
        self.final, self.shape = final, shape

    def __call__(self, samples: int, clock: Clock) -> float:
        """Return the factor of the step that starts after `samples` samples."""
        cooldown = _cooldown_factor(samples, clock, self.cooldown, self.final, self.shape)
        return _warmup_factor(samples, clock, self.warmup) if cooldown is None else cooldown


class WarmupRsqrt:
    """Linear warm-up, then decay with the inverse square root, which needs no length of the run (big_vision).

    At s samples, with a warm-up of W and a timescale of T,

        factor = 1 / sqrt(1 + (s - W) / T)   for s >= W

    T = W is the schedule of the Transformer, factor = sqrt(W / s) (Vaswani et al. 2017). A cool-down of C at the end of a
    run of S samples multiplies the factor by a line from 1 at S - C to `final` at S.

    Args:
        warmup: W, duration of the warm-up.
        timescale: T, duration of the decay to 1 / sqrt(2); null: W.
        cooldown: C, duration of the cool-down.
        final: factor of the cool-down at the end of the run.

    Raises: UsageError if the timescale is zero.
    """

    def __init__(
        self,
        warmup: str = "0steps",
        timescale: str | None = "10ksteps",
        cooldown: str = "0steps",
        final: float = 0.0,
    ) -> None:
        self.warmup = Duration.parse(warmup, "schedule.warmup")
        self.timescale = self.warmup if timescale is None else Duration.parse(timescale, "schedule.timescale")
        self.cooldown = Duration.parse(cooldown, "schedule.cooldown")
        check_number("schedule.final", final, at_least=0)
        self.final = final
        if not self.timescale.value > 0:
            raise UsageError(
                f"schedule.timescale is {timescale!r} and schedule.warmup {warmup!r}; expected a timescale above 0: "
                "schedule.timescale=10ksteps"
            )

    def __call__(self, samples: int, clock: Clock) -> float:
        """Return the factor of the step that starts after `samples` samples."""
        seen = max(0.0, samples - float(clock.samples(self.warmup)))
        factor = _warmup_factor(samples, clock, self.warmup) / math.sqrt(
            1 + seen / float(clock.samples(self.timescale))
        )
        cooldown = _cooldown_factor(samples, clock, self.cooldown, self.final, "linear")
        return factor if cooldown is None else factor * cooldown
