"""Explanations of keys, from comments, docstrings and the composed configuration."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mmpretrain.config import explain
from mmpretrain.config.explain import Component, Default, Entry
from mmpretrain.config.key_help import KeyHelp
from mmpretrain.config.schema import register_schemas
from mmpretrain.errors import UsageError


def helped(key: str, *overrides: str, command: str = "train") -> str:
    register_schemas()
    return KeyHelp(command, overrides).text(key)


@dataclass
class Explained:
    batch_size: int | None = None
    """Samples of a step; None uses all."""
    name: str = "???"


def test_a_field_is_explained_by_its_docstring_and_a_comment_has_precedence() -> None:
    entries = list(
        explain.schema_entries(Explained, "trainer", {"": {"batch_size": 64}}, {"trainer.name": "what it is"})
    )
    assert entries == [
        Entry("trainer.batch_size", "int | null", {"": 64}, "Samples of a step; null uses all.", "Explained"),
        Entry("trainer.name", "str", {"": Default.required}, "What it is.", "Explained"),
    ]


def test_comments_are_read_with_the_lines_that_continue_them(tmp_path: Path) -> None:
    path = tmp_path / "group.yaml"
    path.write_text(
        "# What it is.\n"
        "#   python -m command\n"
        "first:            # of several parts\n"
        "  size: '# 1'     # a number,\n"
        "                  # or two\n"
        "  # not beside a key\n"
        "  list: [1, 2]\n",
        encoding="utf-8",
    )
    found = explain.read_yaml(path)
    assert found.values == {"first": {"size": "# 1", "list": [1, 2]}}
    assert found.comments == {"first": "of several parts", "first.size": "a number, or two"}
    assert found.header == ["What it is.", "  python -m command"]
    assert found.purpose == "What it is."


def test_arguments_are_explained_by_the_docstring() -> None:
    component = Component(
        "objective.mae", "mmpretrain.objectives.mae.MAE", {"mae": {"weight": 1.0}}, {"weight": "factor"}
    )
    entries = {entry.key: entry for entry in component.entries()}
    assert entries["objective.mae.weight"].text == "Factor."
    assert entries["objective.mae.norm_pix"].defaults == {"mae": True}
    assert entries["objective.mae.norm_pix"].text == "Normalise each target patch by its own mean and deviation."
    assert "objective.mae.model" not in entries
    assert "objective.mae.config_path" not in entries


@pytest.mark.parametrize(
    ("key", "overrides", "expected"),
    [
        ("trainer.batch_size", ["experiment=quickstart"], ["= 64", "default   128", "conf/experiment/quickstart.yaml"]),
        ("trainer.batch_size", ["experiment=quickstart", "trainer.batch_size=32"], ["= 32", "the command line"]),
        ("trainer.precision", [], ["values    bf16, fp16, fp32", "conf/train.yaml"]),
        ("optimizer.lr", ["experiment=clipa_b16"], ["= 0.001", "clipa_b16.yaml (8e-6 x batch size / 256)"]),
        ("objective.mae.mask_ratio", [], ["not in this configuration", "default   0.75", "objective=[infonce,mae]"]),
        ("objective.infonce.mask_kind", [], ["values    random, block", "conf/objective/infonce.yaml"]),
        # size=tiny gives it below if_present
        ("model.embed_dim", ["size=tiny"], ["= 128", "conf/size/tiny.yaml", "default   512"]),
        ("model.image.args.depth", ["size=tiny"], ["= 4", "Part of model.image.args", "conf/size/tiny.yaml"]),
        ("data.train.pairs.shards", [], ["= train", "default   train", "conf/data/pairs.yaml"]),
        ("data.train.mine.caption", ["+data.train={mine: {shards: a}}"], ["= null", "type      Any"]),
        ("data.tokenizer.name", ["model=open_clip"], ["= ViT-B-32"]),  # an interpolation
        ("model.name", [], ["not in this configuration", "add with  model=open_clip"]),
        ("data.train.pairs", [], ["data.train.pairs.shards = train", "data.train.pairs.transform.scale = [0.9, 1.0]"]),
        ("objective", ["objective=[flip]"], ["chosen    [flip]", "captioning", "Captions from images"]),
        ("size", ["experiment=quickstart"], ["chosen    null", "size=NAME", "tiny "]),
    ],
)
def test_a_key_is_explained_in_the_composed_configuration(key: str, overrides: list[str], expected: list[str]) -> None:
    text = helped(key, *overrides)
    for part in expected:
        assert part in text, text


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("trainer.batchsize", "trainer.batch_size"),
        ("batch_size", "data.train.pairs.batch_size"),
        ("trainer.batch_size.more", "trainer.batch_size"),
        ("zzz", "--help shows the groups"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, expected: str) -> None:
    with pytest.raises(UsageError, match=f"there is no such key.*{expected}"):
        helped(key)


def test_every_key_of_every_command_has_an_explanation() -> None:
    for command in explain.COMMANDS:
        register_schemas()
        known = KeyHelp(command, [])
        assert [entry.key for entry in known.entries if not entry.text] == []


def test_options_and_arguments_of_a_folder_of_ones_own_are_explained(tmp_path: Path) -> None:
    folder = tmp_path / "schedule"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# My own.\n_target_: mmpretrain.schedules.WarmupCosine\nwarmup: 7%  # longer\n", encoding="utf-8"
    )
    given = (f"hydra.searchpath=[file://{tmp_path}]", "schedule=mine")
    assert "My own." in helped("schedule", *given)
    text = helped("schedule.warmup", *given)
    assert "= 7%" in text
    assert str(folder / "mine.yaml") in text


def test_a_target_that_cannot_be_imported_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"schedule\._target_ is 'nowhere\.Mine'"):
        helped("schedule.warmup", "schedule._target_=nowhere.Mine")
