"""Identity of a run: its derived name, its main settings, and the differences of two configurations of it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from mmpretrain.config.config_yaml import to_values
from mmpretrain.config.schema import TrainConfig

_MAX_NAME_LENGTH = 80

# Locations of the data may change when a run is resumed, since the checkpoint has a fingerprint of the data. Locations
# given on the command line are still part of the run's name, so that a sweep over data.root makes separate runs.
# `source` itself is a key where it is null, which leaves the data to `shards`; its other arguments may not change.
_PLACES = r"data\.root|data\.train\.[^.]+\.(sources\.[^.]+\.)?(shards|subset|source|source\.path)(\[.*)?"
# What a loss spike leads to may change too, for a run that has begun to diverge, and is part of the name like the places.
_NAMED = rf"{_PLACES}|trainer\.spike\..*"
# Keys that may change when a run is resumed. The others of them do not affect the results beyond rounding.
_FREE = re.compile(
    r"run\.(name|dir|sync_to)"
    r"|trainer\.(micro_batch_size|log_every|diagnose_every|eval_every|max_bad_steps|device|dry_run|profile_steps|detect_anomaly)|checkpoint\..*|eval(\..*)?|writer(\..*)?|parallel\..*"
    r"|data\.(workers|timeout_seconds|max_bad_fraction|val_batch_size|val(\..*)?)"
    r"|data\.(index_dir|cache_dir|cache_bytes|storage_seconds|on_missing_shard)|" + _NAMED
)


# Values that applied to runs made before these keys existed.
_BEFORE: Mapping[str, Any] = {
    "data.max_image_bytes": 1 << 29,
    "optimizer.groups": [],
    "optimizer.towers.image.layer_decay": None,
    "optimizer.towers.text.layer_decay": None,
    "trainer.lora.rank": 0,
    "trainer.lora.alpha": 16.0,
    "trainer.lora.dropout": 0.0,
    "trainer.lora.targets": ["*"],
}
_BEFORE_OF_STREAMS: Mapping[str, Any] = {
    "shuffle": "blocks",
    "label": None,
    "classes": None,
    "class_column": "label",
    "text_column": None,
    "templates": "openai",
    "shots": None,
    "episodes.ways": 0,
    "episodes.per_class": 8,
    "mix": None,
}


def _before(key: str) -> Any:
    """Return the value that applied to runs made before a key existed."""
    if of_stream := re.fullmatch(r"data\.train\.[^.]+\.(.+)", key):
        return _BEFORE_OF_STREAMS.get(of_stream[1], "absent")
    return _BEFORE.get(key, "absent")


def derived_name(overrides: Sequence[Override]) -> str:
    """Return a readable name made of the overrides that affect results or data. Long names end in a short hash.

    Args:
        overrides: parsed overrides of the command line.
    """
    values: dict[str, str] = {}
    # Parse the overrides, since a sweep writes values in canonical form: a job then has the same name in a sweep or alone.
    for override in overrides:
        key, value = override.key_or_group, override.get_value_element_as_str()
        # +data.train={images: ...} adds to an earlier override; any other override replaces it.
        values[key] = f"{values[key]}+{value}" if key in values and value.startswith("{") else value
    named = {k: v for k, v in values.items() if re.fullmatch(_NAMED, k) or not _FREE.fullmatch(k)}
    parts = [f"{key}={value}" for key, value in named.items() if key not in ("experiment", "sweep")]
    # [infonce,mae] becomes infonce+mae, since the name is a folder that is typed in shells.
    parts = [re.sub(r"[\[\]{}()'\" ]", "", part).replace(",", "+") for part in parts]
    name = ",".join(re.sub(r"[^\w.=+-]+", "_", part) for part in sorted(parts)) or "default"
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    return f"{name[: _MAX_NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def hparams(config: TrainConfig) -> dict[str, str | float | bool]:
    """Return the main settings of a run for TensorBoard's table, which needs the same keys for every run."""
    values = to_values(config)

    def shown(*place: str) -> Any:
        """Return the value at a path of keys, its unresolved text if it comes from the environment, or None if absent."""
        node: Any = values
        for i, key in enumerate(place, start=1):
            if text := config.from_environment.get(place[:i]):
                return text
            node = node.get(key)
        return node

    def named(part: str) -> str:
        return str(shown(part, "name") or shown(part, "_target_").rpartition(".")[2])

    weights = {name: shown("objective", name, "weight") for name in values["objective"]}
    return {
        "name": str(shown("run", "name")),
        "seed": shown("run", "seed"),
        "objective": "+".join(
            f"{_shown(1.0 if weight is None else weight)} {name}" for name, weight in weights.items()
        ),
        "model": named("model"),
        "batch_size": shown("trainer", "batch_size"),
        "duration": shown("trainer", "duration"),
        "precision": shown("trainer", "precision"),
        "optimizer": named("optimizer"),
        "lr": _number(shown("optimizer", "lr") or 0.0),
        "weight_decay": _number(shown("optimizer", "weight_decay") or 0.0),
        "schedule": shown("schedule", "_target_").rpartition(".")[2],
        "ema_decay": _shown(shown("trainer", "ema_decay") or 0.0),
        "init_from": shown("init_from") or "",
        "data": shown("data", "root"),
    }


def _number(value: Any) -> str | float:
    """Return a number as a float, and the text of a value from the environment unchanged."""
    return value if isinstance(value, str) else float(value)


def _shown(value: Any) -> str:
    """Return a scheduled value as a short text: the number, or the name of the schedule."""
    if isinstance(value, int | float):
        return f"{value:g}"
    return value if isinstance(value, str) else next(iter(value))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their full names."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()}
    return {path: value}


def identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a configuration by their full names, without keys that may change when a run is resumed."""
    return {key: value for key, value in {**_BEFORE, **flat(dict(plain))}.items() if not _FREE.fullmatch(key)}


def differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    free: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the differences of two configurations of a run as `key: saved -> now`, without keys that may change.

    Args:
        saved, now: configurations in the form of `to_plain`.
        free: further keys that may change.
        values: `now` in the form of `to_values`, which earlier versions saved.
    """
    flats = [flat(dict(plain)) for plain in (saved, now, values or now)]
    all_three = {key: [flat.get(key, _before(key)) for flat in flats] for key in sorted({**flats[0], **flats[1]})}
    return [
        f"{key}: {json.dumps(before)} -> {json.dumps(after)}"
        for key, (before, after, value) in all_three.items()
        if before not in (after, value) and key not in free and not _FREE.fullmatch(key)
    ]
