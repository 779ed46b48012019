"""What the pages name exists."""

import importlib
import re
from pathlib import Path

import pytest

from mmpretrain.batch import Samples
from mmpretrain.objectives.base import Encodings

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = sorted(path.stem for path in (ROOT / "conf" / "objective").glob("*.yaml"))


def test_functions_of_a_batchs_way_exist() -> None:
    page = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    table = page.partition("## From train.py")[2].partition("## ")[0]
    found = re.findall(r"\]\(\.\./(\S+?)\.py\)((?:,? `[\w.]+`)+)", table)
    assert len(found) >= 15
    for module, names in found:
        for name in re.findall(r"`(.+?)`", names):
            each = importlib.import_module(module.replace("/", "."))
            for part in name.split("."):
                each = getattr(each, part)


def test_what_an_objective_can_read_is_listed() -> None:
    page = (ROOT / "docs" / "extending" / "objective.md").read_text(encoding="utf-8")
    encodings, samples = page.partition("## What an objective can read")[2].split("| member of `samples(stream)`")
    for table, owner, internal in (
        (encodings, Encodings, {"num_terms"}),
        (samples, Samples, {"positions", "packing", "rows", "to", "map", "pin_memory", "record_stream"}),
    ):
        cells = re.findall(r"^\| (?!member)(.+?) \|", table, flags=re.MULTILINE)
        listed = set(re.findall(r"`(\w+)", " ".join(cells))) - {"len"}
        members = {*vars(owner), *getattr(owner, "__annotations__", {})}
        assert listed == {name for name in members if not name.startswith("_")} - internal


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_has_a_page_with_the_same_parts(name: str) -> None:
    page = (ROOT / "docs" / "objectives" / f"{name}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, flags=re.MULTILINE) == [
        "What it reads", "Defaults", "Cost", "Exactness", "When it helped", "Use it", "Common mistakes",
    ]  # fmt: skip
    assert f"({name}.md)" in (ROOT / "docs" / "objectives" / "index.md").read_text(encoding="utf-8")


def test_each_experiment_is_in_the_recipes() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    names = [path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    assert [name for name in names if f"`{name}`" not in page] == []
