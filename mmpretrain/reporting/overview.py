"""Description of a run for its report: what was trained on what, and how."""

from collections.abc import Mapping
from typing import Any


def overview(config: Any, facts: Any, results: Mapping[str, float | None]) -> dict[str, str]:
    """Describe a run in a few rows.

    Args:
        config: content of config.yaml.
        facts: content of run.json (see `mmpretrain.training.run_dir.write_facts`); empty for a run of an earlier version.
        results: content of results.json.

    Returns: texts by the name of their row. What the arguments do not tell is left out.
    """
    rows = {
        "model": _model(config, facts),
        "objectives": " + ".join(
            f"{_short(node.get('weight', 1))} × {name}"
            for name, node in _mapping(config, "objective").items()
            if isinstance(node, dict)
        ),
        **{f"data, {name}": _stream(config, name, stream) for name, stream in _mapping(facts, "data").items()},
        "length": _length(config, results),
        "optimizer": _optimizer(config),
        "hardware": _hardware(config, facts),
    }
    return {name: text for name, text in rows.items() if text}


def _value(node: Any, *keys: str) -> Any:
    """Return the value at a path of keys, or None where there is none: the files may have been changed by hand."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _mapping(node: Any, *keys: str) -> dict[Any, Any]:
    value = _value(node, *keys)
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    """Return a number without needless digits, and a schedule as YAML writes it."""
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value).replace("'", "")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _name(node: Any) -> str:
    """Return the name of a `_target_` node: its argument `name`, else the last part of the target."""
    return str(_value(node, "name") or _value(node, "_target_") or "").rpartition(".")[2]


def _model(config: Any, facts: Any) -> str:
    towers = [f"{tower} {_name(_value(config, 'model', tower))}" for tower in ("image", "text")]
    named = ", ".join([_name(_value(config, "model")), *(tower for tower in towers if not tower.endswith(" "))])
    parameters = _mapping(facts, "parameters")
    counts = ", ".join(f"{tower} {_count(count)}" for tower, count in parameters.items())
    start = _value(config, "init_from")
    return named + (f"; parameters: {counts}" if counts else "") + (f"; weights from {start}" if start else "")


def _stream(config: Any, name: Any, stream: Any) -> str:
    num_files, samples = _value(stream, "files"), _value(stream, "samples")
    own = _mapping(config, "data", "train", str(name))
    sources = _mapping(own, "sources")
    nodes = [_mapping(node) for node in sources.values()] if sources else [own]
    places = [_value(node, "shards") or _value(_mapping(node, "source"), "path") for node in nodes]
    where = ", ".join(str(place) for place in places if place)
    within = f" of {where} in {_value(config, 'data', 'root')}" if where else ""
    if _value(own, "synthetic"):
        return f"{_count(samples)} samples of noise"
    return f"{_count(samples)} samples" + (f" in {_count(num_files)} files" if num_files else "") + within


def _length(config: Any, results: Mapping[str, float | None]) -> str:
    trainer = _mapping(config, "trainer")
    parts = [f"{trainer['duration']}" if "duration" in trainer else ""]
    if "batch_size" in trainer:
        parts.append(f"batches of {_short(trainer['batch_size'])}")
    parts += [f"{_count(results[key])} {key}" for key in ("steps", "samples") if results.get(key) is not None]
    if (seconds := results.get("wall_seconds")) is not None:
        minutes, rest = divmod(round(seconds), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h of wall time")
    if (speed := results.get("pairs_per_second")) is not None:
        parts.append(f"{speed:,.1f} pairs/s")
    return ", ".join(part for part in parts if part)


def _optimizer(config: Any) -> str:
    node = _mapping(config, "optimizer")
    parts = [
        _name(node),
        *(f"{key.replace('_', ' ')} {_short(node[key])}" for key in ("lr", "weight_decay") if key in node),
    ]
    if schedule := _name(_value(config, "schedule")):
        arguments = [f"{key} {_short(value)}" for key, value in _mapping(config, "schedule").items() if key[:1] != "_"]
        parts.append(f"schedule {schedule}" + (f" ({', '.join(arguments)})" if arguments else ""))
    return ", ".join(part for part in parts if part)


def _hardware(config: Any, facts: Any) -> str:
    processes, device, precision = (
        _value(facts, "processes"),
        _value(facts, "device"),
        _value(config, "trainer", "precision"),
    )
    where = f"{_count(processes)} × {device}" if device else ""
    return ", ".join(part for part in (where, str(precision or "")) if part)
