"""Durations are exact, and learning rates are open_clip's step for step."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr

from mmpretrain.schedules import (
    Clock,
    Duration,
    Schedule,
    Scheduled,
    ScheduledValue,
    TrainingProgress,
    WarmupConstant,
    WarmupCosine,
    WarmupRsqrt,
    first_difference,
    scheduled_values,
)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("20epochs", 20, "epochs"),
        ("1epoch", 1, "epochs"),
        ("0.5 epochs", Fraction(1, 2), "epochs"),
        (" 2000steps ", 2000, "steps"),
        ("1step", 1, "steps"),
        ("10ksteps", 10_000, "steps"),
        ("10Msamples", 10_000_000, "samples"),
        ("1.1Msamples", 1_100_000, "samples"),
        ("12.8Gsamples", 12_800_000_000, "samples"),
        ("1sample", 1, "samples"),
        ("5%", 5, "%"),
        (".5%", Fraction(1, 2), "%"),
        ("0steps", 0, "steps"),
    ],
)
def test_a_duration_is_read_exactly(text: str, value: Fraction, unit: str) -> None:
    assert Duration.parse(text, "key") == Duration(Fraction(value), unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["20", 20, 1.5, "", "epochs", "-1steps", "10 Ksamples", "5 parsecs", "1e3steps", "1.steps"]
)
def test_what_is_no_duration_is_named_with_its_key(text: str | int | float) -> None:
    with pytest.raises(ValueError, match=r"^trainer\.duration is .*expected a number with a unit") as error:
        Duration.parse(text, "trainer.duration")
    assert repr(text) in str(error.value) and "min" not in str(error.value).split("such as")[0]


def test_wall_time_only_where_it_makes_sense() -> None:
    assert Duration.parse("30min", "checkpoint.every", wall_time=True) == Duration(Fraction(30), "min")
    with pytest.raises(ValueError, match=r"trainer\.duration is '30min'; wall time makes no sense here"):
        Duration.parse("30min", "trainer.duration")
    with pytest.raises(ValueError, match=r"checkpoint\.every is '30h'; .*or min"):
        Duration.parse("30h", "checkpoint.every", wall_time=True)
    with pytest.raises(ValueError, match="30min has no length in samples"):
        Clock(128, 1000).samples(Duration(Fraction(30), "min"))


@pytest.mark.parametrize(
    ("text", "samples"),
    [("3epochs", 3000), ("300samples", 300), ("7steps", 7 * 128), ("7%", 700), ("0.1epochs", 100), ("33%", 3300)],
)
def test_a_clock_measures_every_unit_in_samples(text: str, samples: int) -> None:
    assert Clock(128, 1000, 10_000).samples(Duration.parse(text, "key")) == samples


def due_steps(every: str, clock: Clock) -> list[int]:
    """After which steps something is due, in a whole run."""
    duration = Duration.parse(every, "key")
    ends = range(clock.batch_size, clock.total_samples + 1, clock.batch_size)
    return [end // clock.batch_size for end in ends if clock.is_due(duration, end - clock.batch_size, end)]


def test_due_at_the_step_that_reaches_a_multiple() -> None:
    clock = Clock(batch_size=100, epoch_samples=250, total_samples=1000)
    assert due_steps("1step", clock) == list(range(1, 11))
    assert due_steps("3steps", clock) == [3, 6, 9]
    assert due_steps("1epoch", clock) == [3, 5, 8, 10]
    assert due_steps("50%", clock) == [5, 10]
    assert due_steps("99samples", clock) == list(range(1, 11))
    assert due_steps("0steps", clock) == []
    assert due_steps("2epochs", clock) == [5, 10]


@pytest.mark.parametrize("percent", range(1, 100))
def test_percentages_are_due_at_their_exact_sample(percent: int) -> None:
    """In floats 7 / 100 * 100 is more than 7."""
    clock = Clock(batch_size=1, epoch_samples=100, total_samples=100)
    assert due_steps(f"{percent}%", clock) == list(range(percent, 101, percent))
    assert due_steps(f"{percent / 100}epochs", clock) == list(range(percent, 101, percent))


def open_clip_rates(
    make: Callable[..., Callable[[int], float]], steps: int, *args: float, **kwargs: float
) -> list[float]:
    adjust = make(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1.0, *args, **kwargs)
    return [adjust(step) for step in range(steps)]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 17), (1, 17), (5, 40), (40, 40)])
def test_cosine_is_open_clips(warmup: int, steps: int) -> None:
    clock = Clock(batch_size=96, epoch_samples=1000, total_samples=96 * steps)
    schedule = WarmupCosine(f"{warmup}steps")
    ours = [schedule(96 * step, clock) for step in range(steps)]
    assert ours == pytest.approx(open_clip_rates(cosine_lr, steps, warmup, steps), abs=1e-12)


def test_cosine_ends_at_its_final_factor() -> None:
    clock = Clock(10, 100, 1000)
    schedule = WarmupCosine("10%", final=0.1)
    assert schedule(90, clock) == pytest.approx(1)
    assert schedule(550, clock) == pytest.approx((1 + 0.1) / 2)
    assert schedule(1000, clock) == pytest.approx(0.1)
    assert schedule(5000, clock) == pytest.approx(0.1)


def test_constant_is_open_clips() -> None:
    clock = Clock(batch_size=32, epoch_samples=100, total_samples=32 * 30)
    schedule = WarmupConstant("7steps")
    ours = [schedule(32 * step, clock) for step in range(30)]
    assert ours == pytest.approx(open_clip_rates(const_lr, 30, 7, 30), abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_constant_with_cool_down_is_open_clips(final: float) -> None:
    clock = Clock(batch_size=32, epoch_samples=100, total_samples=32 * 30)
    schedule = WarmupConstant("7steps", "12steps", final)
    ours = [schedule(32 * step, clock) for step in range(30)]
    expected = open_clip_rates(const_lr_cooldown, 30, 7, 30, 12, cooldown_end_lr=final)
    assert ours == pytest.approx(expected, abs=1e-12)


def test_the_rate_is_a_function_of_samples_not_of_steps() -> None:
    """A run whose batch doubles sees, beyond the warm-up, the same rate at the same number of samples."""
    schedule = WarmupCosine("100samples")
    small, large = Clock(10, 100, 1000), Clock(20, 100, 1000)
    for samples in range(100, 1000, 20):
        assert schedule(samples, small) == schedule(samples, large)


def test_wsd_decays_as_one_minus_the_square_root() -> None:
    """Hägele et al. 2024, equation 1: 1 - sqrt((n - (N - N_decay)) / N_decay)."""
    clock = Clock(batch_size=32, epoch_samples=100, total_samples=32 * 30)
    schedule = WarmupConstant("7steps", "40%", 0.0, "1-sqrt")
    expected = [min(1.0, (n + 1) / 7) if n <= 18 else 1 - ((n - 18) / 12) ** 0.5 for n in range(31)]
    assert [schedule(32 * n, clock) for n in range(31)] == pytest.approx(expected, abs=1e-12)
    assert WarmupConstant("7steps", "40%", 0.1, "1-sqrt")(32 * 30, clock) == pytest.approx(0.1)


def test_rsqrt_with_the_warm_up_as_timescale_is_that_of_the_transformer() -> None:
    """Vaswani et al. 2017, equation 3, relative to its largest value: min(n^-1/2, n w^-3/2) w^1/2."""
    clock = Clock(batch_size=8, epoch_samples=100, total_samples=0)
    schedule = WarmupRsqrt("10steps", timescale=None)
    assert [schedule(8 * n, clock) for n in range(10, 100)] == pytest.approx(
        [min(n**-0.5, n * 10**-1.5) * 10**0.5 for n in range(10, 100)], abs=1e-12
    )
    assert [schedule(8 * n, clock) for n in range(10)] == pytest.approx([(n + 1) / 10 for n in range(10)])


def test_rsqrt_with_a_timescale_and_a_cool_down_is_big_visions() -> None:
    """utils.create_learning_rate_schedule(decay_type="rsqrt", warmup_steps, cooldown_steps, timescale) in big_vision."""
    clock = Clock(batch_size=8, epoch_samples=100, total_samples=8 * 50)
    schedule = WarmupRsqrt("10steps", "20steps", "15steps")
    theirs = [(1 + (n - 10) / 20) ** -0.5 * min(1.0, (50 - n) / 15) for n in range(10, 51)]
    assert [schedule(8 * n, clock) for n in range(10, 51)] == pytest.approx(theirs, abs=1e-12)
    with pytest.raises(ValueError, match=r"^schedule.timescale is None and schedule.warmup '0steps'; expected"):
        WarmupRsqrt(timescale=None)


def first_difference_of(schedule: Schedule, num_steps: int) -> int | None:
    short, long = Clock(10, 100, 1000), Clock(10, 100, 2000)
    return first_difference(lambda progress: schedule(progress.samples, progress.clock), num_steps, short, long)


@pytest.mark.parametrize(
    ("schedule", "step"),
    [
        (WarmupCosine("5steps"), 7),  # the step that begins after the warm-up is 1 in both
        (WarmupCosine("5%"), 1),
        (WarmupConstant("5steps"), None),
        (WarmupConstant("5%"), 1),
        (WarmupConstant("5steps", "10%"), 92),  # step 91 begins with the cool-down, at a factor of 1
        (WarmupConstant("5steps", "20steps", shape="1-sqrt"), 82),
        (WarmupRsqrt("5steps"), None),
        (WarmupRsqrt("5steps", cooldown="10%"), 92),
    ],
)
def test_the_first_step_that_depends_on_the_length_of_the_run(schedule: Schedule, step: int | None) -> None:
    assert first_difference_of(schedule, 100) == step
    if step is not None:
        assert first_difference_of(schedule, step - 1) is None


def test_a_constant_rate_is_the_same_in_a_longer_run() -> None:
    short, long = Clock(10, 100, 1000), Clock(10, 100, 2000)
    schedule = WarmupConstant("5steps")
    assert [schedule(s, short) for s in range(0, 1000, 10)] == [schedule(s, long) for s in range(0, 1000, 10)]


def test_a_schedule_names_its_key_in_an_error() -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup is '5'"):
        WarmupCosine("5")
    with pytest.raises(ValueError, match=r"schedule\.cooldown is '1min'"):
        WarmupConstant(cooldown="1min")


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, [0.5] * 6),
        ({"piecewise": {"0%": 0.5, "40%": 1, "800samples": 0}}, [0.5, 0.5, 1, 1, 0, 0]),
        ({"piecewise": {"2steps": 3, "3steps": 4}}, [3, 3, 4, 4, 4, 4]),
        ({"linear": {"20%": 1.0, "60%": 0.0}}, [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]),
        ({"linear": {"0%": 0.0, "400samples": 4.0, "100%": 1.0}}, [0.0, 2.0, 4.0, 3.0, 2.0, 1.0]),
        ({"cosine": {"0%": 1.0, "80%": 0.0}}, [1.0, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0.0, 0.0]),
    ],
)
def test_a_value_is_a_function_of_the_samples_seen(value: Scheduled, expected: list[float]) -> None:
    clock = Clock(100, 250, 1000)
    scheduled = ScheduledValue(value, "x")
    assert [scheduled(TrainingProgress(samples, clock)) for samples in range(0, 1001, 200)] == pytest.approx(expected)


def test_a_value_does_not_change_inside_a_stage() -> None:
    scheduled = ScheduledValue({"piecewise": {"0%": 64, "150samples": 128}}, "x", in_stages=True)
    clock = Clock(100, 250, 1000)
    assert [scheduled(TrainingProgress(samples, clock)) for samples in (0, 100, 149, 150, 200)] == [
        64,
        64,
        64,
        128,
        128,
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "x is 'x'; expected a number or a schedule"),
        (True, "expected a number or a schedule"),
        ({}, "expected a number or a schedule"),
        ({"piecewise": {}}, "expected a number or a schedule"),
        ({"steps": {"0%": 1}}, "expected a number or a schedule (piecewise, linear, cosine)"),
        ({"linear": {"0%": "a"}}, "expected finite numbers"),
        (float("nan"), "expected finite numbers"),
        ({"linear": {"soon": 1.0}}, "a breakpoint of x is 'soon'; expected a number with a unit"),
        ({"linear": {"0%": 0.5, "10%": 1.5}}, "x is 1.5; expected a number at most 1"),
    ],
)
def test_what_is_no_value_is_refused_in_one_line(value: Scheduled, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ScheduledValue(value, "x", at_most=1)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_changes_in_stages_takes_no_slope() -> None:
    with pytest.raises(ValueError, match=r"a schedule \(piecewise\)"):
        ScheduledValue({"linear": {"0%": 1, "100%": 2}}, "x", in_stages=True)


def test_knots_out_of_order_are_refused() -> None:
    scheduled = ScheduledValue({"linear": {"50%": 1.0, "2steps": 2.0}}, "x")
    with pytest.raises(
        ValueError, match="x has breakpoints at 500, 200 samples; expected each one after the previous one"
    ):
        scheduled(TrainingProgress(0, Clock(100, 100, 1000)))


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (1.0, None),
        ({"linear": {"0%": 0.0, "10steps": 1.0}}, None),
        ({"linear": {"0%": 0.0, "10%": 1.0}}, 2),
        ({"piecewise": {"0%": 1.0, "10%": 0.0}}, 11),
        ({"piecewise": {"0%": 1.0, "10%": 1.0}}, None),
    ],
)
def test_the_first_step_at_which_a_value_depends_on_the_length_of_the_run(value: Scheduled, step: int | None) -> None:
    assert first_difference(ScheduledValue(value, "x"), 100, Clock(10, 100, 1000), Clock(10, 100, 2000)) == step


def test_scheduled_values_are_found_wherever_they_stand() -> None:
    ramp = {"linear": {"0%": 0.0, "10%": 1.0}}
    node = {"objective": {"mae": {"weight": ramp, "mask_ratio": 0.75}}, "trainer": {"ema_decay": ramp}}
    assert [value.name for value in scheduled_values(node)] == ["objective.mae.weight", "trainer.ema_decay"]
