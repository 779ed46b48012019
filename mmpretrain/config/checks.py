"""Checks of a composed configuration: unknown keys, numbers out of range, durations and evaluators."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from mmpretrain.config.instantiate import accepts, check_targets
from mmpretrain.config.schema import EvalSetConfig, EvaluateConfig, SpikeAction, TrainConfig
from mmpretrain.errors import UsageError, check_number, nearest
from mmpretrain.schedules import Duration, ScheduledValue


def check_known(node: Any, path: str = "") -> None:
    """Raises: UsageError if `+key=value` added a key that is not in the schema."""
    if is_dataclass(node):
        known = [f.name for f in fields(node)]
        for name in vars(node):
            if name not in known:
                raise UsageError(f"unknown configuration key {path + name!r}; {nearest(name, known)}")
    if is_dataclass(node) or isinstance(node, dict):
        for name, value in (node if isinstance(node, dict) else vars(node)).items():
            check_known(value, f"{path}{name}.")


def _check_interval(text: str | None, name: str, wall_time: bool = False) -> None:
    if text is not None and not Duration.parse(text, name, wall_time).value > 0:
        raise UsageError(f"{name} is {text!r}; expected an interval above 0, such as 100steps, or a long one for never")


def _check_durations(config: TrainConfig) -> None:
    trainer = config.trainer
    duration = Duration.parse(trainer.duration, "trainer.duration")
    if duration.unit == "%":
        raise UsageError(
            f"trainer.duration is {trainer.duration!r}, a percentage of itself; expected epochs, samples or steps"
        )
    if not duration.value > 0:
        raise UsageError(f"trainer.duration is {trainer.duration!r}; expected a length above 0, such as 20epochs")
    for name in ("log_every", "eval_every", "diagnose_every"):
        _check_interval(getattr(trainer, name), f"trainer.{name}")
    _check_interval(config.checkpoint.every, "checkpoint.every", wall_time=True)
    for name, evaluator in config.eval.items():
        _check_interval(evaluator.get("every"), f"eval.{name}.every")
    for part, until in (trainer.freeze or {}).items():
        if until is not None:
            Duration.parse(until, f"trainer.freeze.{part}")


def check_ranges(config: TrainConfig) -> None:
    """Raises: UsageError if a number or a duration of a training configuration is out of range."""
    trainer, data = config.trainer, config.data
    check_number("trainer.batch_size", trainer.batch_size, at_least=1)
    if trainer.micro_batch_size is not None:
        check_number("trainer.micro_batch_size", trainer.micro_batch_size, at_least=1)
    if trainer.clip_grad_norm is not None:
        check_number("trainer.clip_grad_norm", trainer.clip_grad_norm, above=0)
    if not accepts(trainer.freeze, Mapping[str, str | None] | None):
        raise UsageError(
            f"trainer.freeze is {trainer.freeze!r}; expected parts of the model with a duration or null each: "
            "trainer.freeze={image: null, text: 10%}"
        )
    _check_durations(config)
    if trainer.ema_decay is not None:
        check_value("trainer.ema_decay", trainer.ema_decay, at_least=0, below=1)
    check_number("trainer.max_bad_steps", trainer.max_bad_steps, at_least=1)
    check_number("trainer.spike.threshold", trainer.spike.threshold, above=0)
    check_number("trainer.spike.window", trainer.spike.window, at_least=2)
    if trainer.spike.action == SpikeAction.rollback and str(config.checkpoint.every).endswith("min"):
        raise UsageError(
            f"trainer.spike.action is rollback, but checkpoint.every is {config.checkpoint.every}, and the run would depend "
            "on the time that its steps take; expected epochs, samples, steps or %"
        )
    check_number("checkpoint.keep_last", config.checkpoint.keep_last, at_least=0)
    if data.workers != "auto":
        if not accepts(data.workers, int):
            raise UsageError(f"data.workers is {data.workers!r}; expected auto or a number of processes, such as 4")
        check_number("data.workers", data.workers, at_least=0)
    check_number("data.val_batch_size", data.val_batch_size, at_least=1)
    check_number("data.timeout_seconds", data.timeout_seconds, above=0)
    check_number("parallel.timeout_seconds", config.parallel.timeout_seconds, above=0)
    check_number("data.max_image_bytes", data.max_image_bytes, at_least=1)
    check_number("data.max_bad_fraction", data.max_bad_fraction, at_least=0, at_most=1)
    for name, stream in data.train.items():
        for key in ("max_samples", "shots", "repeat_batches"):
            if (count := getattr(stream, key)) is not None:
                check_number(f"data.train.{name}.{key}", count, at_least=1)
        if stream.episodes.ways:
            check_number(f"data.train.{name}.episodes.ways", stream.episodes.ways, at_least=2)
            check_number(f"data.train.{name}.episodes.per_class", stream.episodes.per_class, at_least=2)
        for key, least in (("batch_size", 1), ("image_size", 1), ("text_length", 3)):
            if (value := getattr(stream, key)) is not None:
                check_value(f"data.train.{name}.{key}", value, is_whole=True, at_least=least)


def check_value(key: str, value: Any, is_whole: bool = False, **bounds: float) -> None:
    """Raises: UsageError for a value that is not a number or a schedule of numbers, or that is out of bounds."""
    numbers = ScheduledValue(value, key, in_stages=is_whole, **bounds).values
    if is_whole and not all(isinstance(number, int) for number in numbers):
        raise UsageError(f"{key} is {value!r}; expected whole numbers")


def check_evaluate_ranges(config: EvaluateConfig) -> None:
    """Raises: UsageError if a number of an evaluation's configuration is out of range."""
    check_number("data.workers", config.data.workers, at_least=0)
    if config.data.val_batch_size is not None:
        check_number("data.val_batch_size", config.data.val_batch_size, at_least=1)


def check_parts(config: TrainConfig) -> None:
    """Check the `_target_` and the arguments of each object of a training configuration. Raises: UsageError."""
    for path, part in (
        ("model", config.model),
        ("optimizer", config.optimizer),
        ("schedule", config.schedule),
        ("data.tokenizer", config.data.tokenizer),
    ):
        if "_target_" not in part:
            raise UsageError(f"{path} has no _target_; expected the full name of a class or function")
    check_targets(config.model, "model")
    check_targets(config.data.tokenizer, "data.tokenizer")
    for name, stream in config.data.train.items():
        check_targets(stream.transform, f"data.train.{name}.transform")
        check_targets(stream.augment, f"data.train.{name}.augment")
        check_targets(stream.mix, f"data.train.{name}.mix")
        check_source(stream.source, f"data.train.{name}.source")
        for source_name, source in stream.sources.items():
            check_source(source.source, f"data.train.{name}.sources.{source_name}.source")
    check_eval_sources(config.data.val)
    for name, node in config.objective.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(
                f"unknown objective {name!r} below `objective`: it has no _target_; "
                "choose objectives with objective=[...], then override their arguments"
            )
        check_value(f"objective.{name}.weight", node.get("weight", 1.0), at_least=0)
        check_targets(node, f"objective.{name}", ("model", "classes", "config_path"), ("weight",))
    check_targets(config.optimizer, "optimizer", ("parameters", "layers"))
    check_targets(config.schedule, "schedule")
    check_evaluators(config.eval)
    _check_named("writer", "metric writer", config.writer, runtime=("folder", "step", "samples"))


def check_eval_sources(sets: Mapping[str, EvalSetConfig]) -> None:
    """Check the sources of held-out data sets, as `check_source` does. Raises: UsageError."""
    for name, data in sets.items():
        check_source(data.source, f"data.val.{name}.source")
        check_source(data.train.source, f"data.val.{name}.train.source")


def check_source(node: Mapping[str, Any] | None, path: str) -> None:
    """Check the node of a `SampleSource`. Raises: UsageError."""
    if node is None:
        return
    if "_target_" not in node:
        raise UsageError(f"{path} has no _target_; expected the full name of a class or function that makes a source")
    check_targets(node, path, runtime=("root",))


def check_evaluators(nodes: Mapping[str, Any]) -> None:
    """Check each evaluator's node. Raises: UsageError."""
    _check_named("eval", "evaluator", nodes, beside=("every",))


def _check_named(
    group: str, noun: str, nodes: Mapping[str, Any], runtime: Sequence[str] = (), beside: Sequence[str] = ()
) -> None:
    """Check the nodes of a group of which several options are chosen (see `check_targets`). Raises: UsageError."""
    for name, node in nodes.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise UsageError(f"unknown {noun} {name!r} below `{group}`: it has no _target_; choose with {group}=[...]")
        check_targets(node, f"{group}.{name}", runtime, beside)
