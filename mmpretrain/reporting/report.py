"""Report of a run as a single self-contained page, report.html."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmpretrain import files
from mmpretrain.config import config_yaml
from mmpretrain.reporting import pictures
from mmpretrain.reporting.overview import overview
from mmpretrain.reporting.progress import table_of
from mmpretrain.reporting.records import read_intervals, read_metrics, read_refused, read_results

FILE = "report.html"
_PNG = b"\x89PNG\r\n"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; } figure { margin: 1em 0; }
figcaption { color: #666; }
"""
_NAMED_REFUSALS = 50
_MAX_CURVES = 300
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PICTURE_BYTES = 64 << 20


def write(folder: Path) -> Path:
    """Write FOLDER/report.html from the run's files.

    Args:
        folder: the run's directory, with config.yaml, run.json, metrics.jsonl, results.json, pictures/ and quarantine.jsonl.

    Returns: path of the report.
    Raises: ValueError if a file is not as a run writes it; OSError if the report cannot be written.
    """
    records = read_metrics(folder / "metrics.jsonl")
    results = read_results(folder / "results.json")
    configuration = files.read_text(folder / "config.yaml", _MAX_CONFIG_BYTES)
    facts = files.read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    scores = {name: value for name, value in results.items() if "/" in name}
    parts = [
        f"<h1>{html.escape(str(folder))}</h1>",
        _section(
            "Run", _table(overview(config_yaml.from_yaml(configuration, str(folder / "config.yaml")), facts, results))
        ),
        _section("Scores", _scores(*table_of(scores, read_intervals(folder)))),
        _section("Curves", "".join(_curves(records))),
        _section("Throughput", _picture(_throughput(records), "pairs per second, and the part of time spent waiting")),
        _section("Pictures", "".join(_saved_pictures(folder / "pictures"))),
        _section("Refused samples", _quarantine(folder / "quarantine.jsonl")),
        _section("Configuration", f"<pre>{html.escape(configuration)}</pre>"),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        f"<title>{html.escape(folder.name)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / FILE
    files.write_text(path, page)
    return path


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content or '<p>none</p>'}"


def _table(values: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _scores(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = [
        f"<td>{html.escape(name)}</td>" + "".join(f'<td class="number">{html.escape(value)}</td>' for value in values)
        for name, *values in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _embedded(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _picture(pixels: np.ndarray | None, caption: str) -> str:
    if pixels is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return _figure(buffer.getvalue(), caption)


def _figure(data: bytes, caption: str) -> str:
    name = html.escape(caption)
    return f'<figure><img alt="{name}" src="{_embedded(data)}"><figcaption>{name}</figcaption></figure>'


def _points(records: Sequence[Mapping[str, float | None]], metric: str) -> tuple[list[float], list[float]]:
    points = [(record["samples"], value) for record in records if (value := record.get(metric)) is not None]
    return [float(samples or 0) for samples, _ in points], [float(value) for _, value in points]


def _curves(records: Sequence[Mapping[str, float | None]]) -> list[str]:
    """Draw one figure for each prefix of the metrics' names: `train`, `objectives` and each data set, but not `system`."""
    names = [*dict.fromkeys(name for record in records for name in record if "/" in name)][:_MAX_CURVES]
    sections = dict.fromkeys(name.partition("/")[0] for name in names)
    figures = []
    for section in sections:
        if section == "system":
            continue
        lines = [(name, *_points(records, name)) for name in names if name.startswith(f"{section}/")]
        figures.append(_picture(pictures.curves(_joined(lines)), section))
    return figures


Line = tuple[str, list[float], list[float]]
"""Name of a curve, its samples seen and its values."""


def _joined(lines: Sequence[Line]) -> list[Line]:
    """Draw the loss once: if `train/loss` is the loss of the only objective, leave out the latter and name both."""
    total = next((line for line in lines if line[0] == "train/loss"), None)
    if total is None:
        return list(lines)
    terms = [line for line in lines if line[0].endswith("_loss") and line[1:] == total[1:]]
    title = " = ".join([total[0], *(name for name, *_ in terms)])
    return [(title, *line[1:]) if line is total else line for line in lines if line not in terms]


def _throughput(records: Sequence[Mapping[str, float | None]]) -> np.ndarray | None:
    metrics = ["system/samples_per_second", "system/data_wait"]
    return pictures.curves([(name, *_points(records, name)) for name in metrics]) if records else None


def _saved_pictures(folder: Path) -> list[str]:
    figures = []
    for path in sorted(folder.glob("*.png")):
        content = files.read_bytes(path, _MAX_PICTURE_BYTES)
        if not content.startswith(_PNG):
            raise ValueError(f"{path} is no PNG; expected the picture that the run wrote, remove it")
        figures.append(_figure(content, path.stem))
    return figures


def _quarantine(path: Path) -> str:
    refused = read_refused(path)
    if not refused:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(record[key])}</td>" for key in ("shard", "key", "reason")) + "</tr>"
        for record in refused[:_NAMED_REFUSALS]
    )
    more = f"<p>and {len(refused) - _NAMED_REFUSALS} more</p>" if len(refused) > _NAMED_REFUSALS else ""
    return f"<p>{len(refused)} samples</p><table>{rows}</table>{more}"
