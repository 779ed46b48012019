"""docs/reference/ is what the schema, conf/ and the docstrings say, and every key is explained."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmpretrain.config.explain import Default, Entry

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_pages_are_what_the_code_says(generate: ModuleType) -> None:
    problems: list[str] = []
    pages = generate.pages(problems)
    assert problems == []
    stale = [name for name, text in pages.items() if (DOCS / "reference" / name).read_text(encoding="utf-8") != text]
    assert stale == [], "run: python docs/generate.py"
    assert {path.name for path in (DOCS / "reference").glob("*.md")} == set(pages)


def test_a_key_without_explanation_is_named(generate: ModuleType) -> None:
    problems: list[str] = []
    explained = Entry("trainer.batch_size", "int", {"": 64}, "Samples of a step.", "TrainerConfig")
    bare = Entry("trainer.name", "str | null", {"": Default.required}, "", "TrainerConfig")
    assert [generate.row(entry, problems) for entry in (explained, bare)] == [
        "| `trainer.batch_size` | `int` | `64` | Samples of a step. |",
        "| `trainer.name` | `str \\| null` | required |  |",
    ]
    (problem,) = problems
    assert problem.startswith("trainer.name (TrainerConfig) has no explanation")


def test_a_value_that_differs_is_shown_with_its_options(generate: ModuleType) -> None:
    assert generate.defaults({"a": "`1`", "b": "`1`"}) == "`1`"
    assert generate.defaults({"a": "`1`", "b": "`2`", "c": "`1`"}) == "a, c: `1`; b: `2`"
    assert generate.defaults({"a": "`1`", "b": "`2`"}, base_first=True) == "`1`; b: `2`"
