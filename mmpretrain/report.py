"""A run on one page: report.html, which holds all that it shows and asks nothing of the network."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmpretrain import pictures
from mmpretrain.checkpoint import write_text
from mmpretrain.metrics import read_records

FILE = "report.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; } figure { margin: 1em 0; }
figcaption { color: #666; }
"""
_NAMED_REFUSALS = 50


def write(folder: Path) -> Path:
    """Write FOLDER/report.html from what the run has left; returns it.

    Args:
        folder: the run's directory, with config.yaml, metrics.jsonl, results.json, pictures/ and quarantine.jsonl.
    """
    records = read_records(folder / "metrics.jsonl")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    parts = [
        f"<h1>{html.escape(str(folder))}</h1>",
        _section("Scores", _table(results)),
        _section("Curves", "".join(_curves(records))),
        _section("Throughput", _picture(_throughput(records), "pairs per second, and the part of time spent waiting")),
        _section("Pictures", "".join(_saved_pictures(folder / "pictures"))),
        _section("Refused samples", _quarantine(folder / "quarantine.jsonl")),
        _section("Configuration", f"<pre>{html.escape((folder / 'config.yaml').read_text())}</pre>"),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        f"<title>{html.escape(folder.name)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / FILE
    write_text(path, page)
    return path


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content or '<p>none</p>'}"


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{_number(value)}</td></tr>'
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def _number(value: Any) -> str:
    return (
        f"{value:,.4f}"
        if isinstance(value, float)
        else html.escape(f"{value:,}" if isinstance(value, int) else str(value))
    )


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


def _points(records: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    kept = [record for record in records if record.get(metric) is not None]
    return [record["samples"] for record in kept], [record[metric] for record in kept]


def _curves(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One picture for the training metrics, and one for each data set."""
    names = dict.fromkeys(name for record in records for name in record if "/" in name)
    sections = dict.fromkeys(name.partition("/")[0] for name in names)
    figures = []
    for section in sections:
        if section == "system":
            continue
        metrics = [name for name in names if name.startswith(f"{section}/")]
        figures.append(_picture(pictures.curves([(name, *_points(records, name)) for name in metrics]), section))
    return figures


def _throughput(records: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    metrics = ["system/samples_per_second", "system/data_wait"]
    return pictures.curves([(name, *_points(records, name)) for name in metrics]) if records else None


def _saved_pictures(folder: Path) -> list[str]:
    return [_figure(path.read_bytes(), path.stem) for path in sorted(folder.glob("*.png"))]


def _quarantine(path: Path) -> str:
    refused = read_records(path)
    if not refused:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(record[key]))}</td>" for key in ("shard", "key", "reason")) + "</tr>"
        for record in refused[:_NAMED_REFUSALS]
    )
    more = f"<p>and {len(refused) - _NAMED_REFUSALS} more</p>" if len(refused) > _NAMED_REFUSALS else ""
    return f"<p>{len(refused)} samples</p><table>{rows}</table>{more}"
