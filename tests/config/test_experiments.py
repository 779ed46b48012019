"""Every experiment composes, what it names exists and takes what it is given, and at size=tiny it runs."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from data_tools.__main__ import main as data_tools
from mmpretrain.config import config_yaml, resolve
from mmpretrain.config.schema import register_schemas
from tests import runs

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# These need labels that only their data have; tests/training/test_finetuning.py runs those of fine-tuning.
ON_LABELS = ("grocery_clip", "continual_clip", "finetune_", "prototypical_")
ON_SHAPES = [name for name in EXPERIMENTS if not name.startswith(ON_LABELS)]
FAST = ("mlm_base", "quickstart")
"""Text alone, and the first run; the others take minutes together."""


def composed(*overrides: str) -> dict[str, Any]:
    """The checked configuration, as config.yaml has it."""
    register_schemas()
    with initialize_config_module("mmpretrain.conf", version_base="1.3"):
        return config_yaml.to_plain(resolve.resolve(compose("train", list(overrides))))


def test_the_published_recipes_are_all_there() -> None:
    published = """clip_b16 siglip_b16 flip_b16 slip_b16 mae_b16 mlm_base gpt_small clip_mae clip_mae_mlm coca_b32 cappa_b16
        clipa_b16 lit_b16"""
    assert set(published.split()) <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_binds_and_says_what_it_is(name: str) -> None:
    """Every `_target_` is bound to its signature by `config.resolve`, at the paper's size and at the tiny one."""
    composed(f"experiment={name}")
    composed(f"experiment={name}", "size=tiny")
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ") and f"experiment={name}" in text


@pytest.mark.parametrize("kind", ["size", "sweep", "debug"])
def test_presets_compose(kind: str) -> None:
    for path in (CONF / kind).glob("*.yaml"):
        overrides = [f"{kind}='{path.stem}'"]
        if kind != "sweep" or "launcher" not in path.read_text():
            composed("experiment=clip_mae_mlm", *overrides)


def test_tiny_changes_sizes_and_nothing_else() -> None:
    large, small = (composed("experiment=siglip_b16", *size) for size in ([], ["size=tiny"]))
    assert large["model"]["image"]["args"] == {}
    assert small["model"]["image"]["args"] == {"patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
    assert small["model"]["text"]["causal"] is large["model"]["text"]["causal"] is False
    assert small["objective"] == large["objective"]
    assert small["if_present"] == {}


def test_what_is_present_is_replaced_and_nothing_is_added() -> None:
    plain = composed("experiment=mae_b16", "size=tiny")
    assert set(plain["objective"]) == {"mae"} and plain["model"]["text"] is None
    assert plain["objective"]["mae"]["decoder_width"] == 128


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small data/shapes."""
    folder = tmp_path_factory.mktemp("experiments")
    counts = ["--train", "96", "--val", "64", "--composition", "32", "--workers", "1"]
    assert data_tools(["shapes", "--output", str(folder / "data" / "shapes"), *counts]) == 0
    return folder


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        (1, name) if world_size == 1 and name in FAST else pytest.param(world_size, name, marks=pytest.mark.slow)
        for world_size in (1, 2)
        for name in ON_SHAPES
    ],
)
def test_an_experiment_runs_at_its_tiny_size(world_size: int, name: str, shapes: Path, tmp_path: Path) -> None:
    overrides = (f"experiment={name}", "size=tiny", "debug=smoke", f"run.dir={tmp_path}/run", "trainer.device=cpu")
    groups = [{"OMP_NUM_THREADS": "1"}] if world_size == 1 else runs.group(world_size)
    commands = [runs.Command("mmpretrain.train", overrides, shapes, environment) for environment in groups]
    for command in commands:
        finished = command.wait()
        assert finished.code == 0, finished.stderr
    assert runs.results(tmp_path / "run")["steps"] == 6
    assert any(name.startswith("objectives/") for record in runs.records(tmp_path / "run") for name in record)
