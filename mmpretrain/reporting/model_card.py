"""Model card of a checkpoint, README.md as Hugging Face's hub shows it. Every value is read from the run's files."""

import html
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpretrain import files
from mmpretrain.config import config_yaml, instantiate
from mmpretrain.errors import printable
from mmpretrain.reporting import evaluations
from mmpretrain.reporting.energy import describe_energy
from mmpretrain.reporting.evaluations import Measured, Weights
from mmpretrain.reporting.overview import overview
from mmpretrain.reporting.progress import Intervals, table_of
from mmpretrain.reporting.records import read_intervals, read_metrics, read_refused, read_results

FILE = "README.md"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_REASONS = 10
_MAX_SECONDS = 1e10  # three centuries
# What Markdown acts on within a line, with the marks of tables, bare addresses and formulas. Without square brackets there
# are no links and pictures, and underscores within words do nothing.
_LIVE = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^#|#$")
_NAME = re.compile(r"[\w./:@%=+,-]+", re.ASCII)
# Parts of the names of metrics that tell of a limit or a bias, by what they are about and the evaluator that measures it.
_LIMITS = {
    "Gaps between groups of images": ("fairness", ("group_",)),
    "Calibration": ("calibration", ("ece", "nll", "temperature")),
    "Modality gap": ("geometry", ("modality_gap",)),
}


@dataclass(frozen=True)
class Subject:
    """The exported weights."""

    source: str
    """The run, checkpoint or model of another library that was exported."""
    towers: tuple[str, ...]
    """Names of the towers, `image` and `text`."""
    weights: Weights | None
    """The run's weights that were exported; None for weights of another library."""
    parameters: Mapping[str, int]
    """Numbers of parameters: `image`, `text` and `heads`, the projections into the shared space."""
    library: str | None
    """Library of the files beside the card; None if there are none."""
    usage: str | None
    """How to load them, in Markdown."""


def model_card(subject: Subject, folder: Path, state: Mapping[str, Any]) -> str:
    """Return the card.

    Args:
        subject: the exported weights.
        folder: the run's directory; not used for weights of another library.
        state: content of the checkpoint's state.json.

    Raises: ValueError if a file of the run is not as the run writes it.
    """
    title = subject.source if subject.weights is None else _name(folder)
    parts = [_metadata(subject), f"# {_plain(title)}\n"]
    if subject.weights is None:
        parts.append(
            f"Weights of another library, {_code(subject.source)}. Their training and scores are unknown here.\n"
        )
    else:
        parts += _of_run(subject.weights, folder, state, subject.parameters)
    if subject.usage is not None:
        parts.append(f"## How to load it\n\n{subject.usage}\n")
    parts.append(
        "## Licence\n\nNot chosen yet: whoever publishes the model fills in this section and `license` above.\n"
    )
    return "\n".join(parts)


def _name(folder: Path) -> str:
    return "/".join(folder.absolute().parts[-2:])


def _metadata(subject: Subject) -> str:
    tasks = {("image", "text"): "zero-shot-image-classification", ("image",): "image-feature-extraction"}
    lines = [f"library_name: {subject.library}"] if subject.library else []
    lines += [f"pipeline_tag: {tasks.get(subject.towers, 'feature-extraction')}", "tags: [mmpretrain]"]
    return "\n".join(["---", *lines, "# license: apache-2.0    # to be chosen", "---", ""])


def _of_run(weights: Weights, folder: Path, state: Mapping[str, Any], parameters: Mapping[str, int]) -> list[str]:
    configuration = files.read_text(folder / "config.yaml", _MAX_CONFIG_BYTES)
    facts = files.read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    path = folder / "results.json"
    results = read_results(path) if path.exists() else {}
    is_last = "step" in state and results.get("steps") == state["step"]
    length = {"steps": state.get("step"), "samples": state.get("samples"), "wall_seconds": state.get("wall_seconds")}
    if is_last:  # with the last evaluation
        length["wall_seconds"] = results.get("wall_seconds")
    length["wall_seconds"] = _seconds(length["wall_seconds"])
    measured = evaluations.read(folder, weights)
    scores = {
        **_scores_of_training(folder, state.get("step"), weights.is_average),
        **{name: each.value for name, each in measured.items()},
    }
    intervals = {
        **(read_intervals(folder) if is_last else {}),
        **{name: each.intervals for name, each in measured.items()},
    }
    wall_seconds = _seconds(results["wall_seconds"]) if "wall_seconds" in results else length["wall_seconds"]
    config = config_yaml.from_yaml(configuration, str(folder / "config.yaml"))
    # Those of run.json are of the training: with adapters and the objectives' own.
    described = overview(config, {**facts, "parameters": dict(parameters)}, length)
    parents = _parents(facts)
    as_trained = (
        f"{'moving average' if weights.is_average else 'as trained'}, after step {state.get('step', 'unknown')}"
    )
    rows = {
        "run": _name(folder),
        "weights": f"interpolated: {parents}" if parents else as_trained,
        **described,
        **_adapters(config),
        **_fingerprints(state.get("fingerprint")),
        "energy of the run": describe_energy(folder, facts, wall_seconds),
    }
    if "hardware" in rows:
        rows["hardware"] += " (of the last start; those of earlier ones are not recorded)"
    limits = {name: value for name, value in scores.items() if _is_limit(name)}
    others = {name: value for name, value in scores.items() if name not in limits}
    none = "See limits and biases." if limits else f"Not evaluated after step {state.get('step', 'unknown')}."
    table = _table_of_scores(others, intervals) if others else f"{none}\n"
    about = "Pre-trained with mmpretrain.\n"
    if parents:
        about += (
            "The weights are a sum of several runs' weights; length, recipe and data below are those of the last one.\n"
        )
    return [
        about,
        f"## Training\n\n{_table(['', ''], [[_plain(name), _plain(value)] for name, value in rows.items()])}",
        f"## Scores\n\n{table}{_how_measured(measured)}",
        f"## Limits and biases\n\n{_limits(limits, intervals)}\n{_refused(folder / 'quarantine.jsonl')}",
        f"## Configuration\n\n{_fenced(configuration)}\n",
    ]


def _seconds(value: Any) -> float | None:
    """Return a wall time of the run's files; None if it is none."""
    is_time = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_SECONDS
    return float(value) if is_time else None


def _parents(facts: Mapping[str, Any]) -> str:
    """Return the runs that were interpolated with their weights; empty for a run that was trained."""
    parents = facts.get("interpolated")
    if not isinstance(parents, list) or not instantiate.accepts(parents, list[list[Any]]):
        return ""
    pairs = [each for each in parents if len(each) == 2 and instantiate.accepts(each[0], float) and 0 <= each[0] <= 1]
    return " + ".join(f"{weight:g} × {source}" for weight, source in pairs)


def _adapters(config: Mapping[str, Any]) -> dict[str, str]:
    trainer = config.get("trainer")
    lora = trainer.get("lora") if isinstance(trainer, Mapping) else None
    if not isinstance(lora, Mapping) or not lora.get("rank"):  # 0: none
        return {}
    return {"LoRA": f"rank {lora['rank']}, alpha {lora.get('alpha')}; the adapters are merged into the weights"}


def _scores_of_training(folder: Path, step: Any, is_average: bool) -> dict[str, float | None]:
    """Return the scores of the weights after a step, from metrics.jsonl: those of other steps are of other weights."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["step"] == step]
    found = {name: value for record in records for name, value in record.items() if name.startswith("eval-")}
    return {name: value for name, value in found.items() if name.partition("/")[0].endswith("-ema") == is_average}


def _how_measured(measured: Mapping[str, Measured]) -> str:
    """Tell on what data the scores were measured that are not of the training's own evaluation."""
    names: dict[tuple[str, int, str, str], list[str]] = {}
    for name, each in measured.items():
        data, _, metric = name.partition("/")
        names.setdefault((data, each.samples, each.fingerprint, each.precision), []).append(metric)
    lines = [
        f"- {_code(data)}: {', '.join(map(_code, metrics))}; {samples:,} samples with the fingerprint "
        f"{_code(fingerprint)}, in {_plain(precision)}\n"
        for (data, samples, fingerprint, precision), metrics in names.items()
    ]
    return "\n".join(["", "Measured after training by `mmpretrain.evaluate`:\n", "".join(lines)]) if lines else ""


def _is_limit(name: str) -> bool:
    return any(_is_of(name, parts) for _, parts in _LIMITS.values())


def _is_of(name: str, parts: tuple[str, ...]) -> bool:
    metric = name.rpartition("/")[2]
    return any(part in metric if part == "group_" else metric.startswith(part) for part in parts)


def _limits(scores: Mapping[str, float | None], intervals: Intervals) -> str:
    text = ""
    for title, (evaluator, parts) in _LIMITS.items():
        found = {name: value for name, value in scores.items() if _is_of(name, parts)}
        table = _table_of_scores(found, intervals)
        text += (
            f"{title}:\n\n{table}\n" if found else f"{title}: not measured for these weights (`eval={evaluator}`).\n\n"
        )
    return text.rstrip("\n") + "\n"


def _refused(path: Path) -> str:
    refused = read_refused(path)
    if not refused:
        return "Refused training samples: none.\n"
    reasons = Counter(record["reason"] for record in refused)
    lines = [f"- {count:,} × {_plain(reason)}" for reason, count in reasons.most_common(_MAX_REASONS)]
    more = len(reasons) - len(lines)
    lines += [f"- and {more} other reasons"] if more else []
    return f"Training samples that were refused in the run: {len(refused):,}\n\n" + "\n".join(lines) + "\n"


def _fingerprints(streams: Any) -> dict[str, str]:
    """Return the fingerprint of each source of the training data, as a checkpoint records them."""
    if not isinstance(streams, dict):
        return {"data fingerprint": "unknown"}
    return {
        f"fingerprint of {stream}": ", ".join(f"{source} {text}" for source, text in sources.items())
        for stream, sources in streams.items()
        if isinstance(sources, dict)
    }


def _table_of_scores(scores: Mapping[str, float | None], intervals: Intervals) -> str:
    columns, rows = table_of(scores, intervals)
    return _table([_plain(column) for column in columns], [[_code(name), *map(_plain, rest)] for name, *rest in rows])


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table of cells in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    """Escape control characters, HTML and Markdown: the run may be somebody else's."""
    return _LIVE.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


def _code(text: str) -> str:
    """Return a name as a span of code, in which nothing needs an escape, if it has no character that could end it."""
    return f"`{text}`" if _NAME.fullmatch(text) else _plain(text)


def _fenced(text: str) -> str:
    """Return a text as a block of code, which none of its lines can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([f"{fence}yaml", *map(printable, text.rstrip().splitlines()), fence])
