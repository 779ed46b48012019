"""Conversion of command-line arguments to Hydra's form, and errors of Hydra, OmegaConf and YAML in one line.

Those of whole commands are tested in test_train_command.py.
"""

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmpretrain.config.command_line import hydra_arguments, one_line
from mmpretrain.config.schema import register_schemas
from mmpretrain.errors import UsageError


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trainer.batchsize=1"], "unknown configuration key 'trainer.batchsize'; did you mean 'batch_size'?"),
        (["writer=[nope]"], "there is no writer 'nope'; expected one of: energy, mlflow, tensorboard, wandb"),
        (
            ["objective.infonce.config_path=x"],
            "objective.infonce.config_path is an argument that no YAML gives a value; add it: "
            "+objective.infonce.config_path=...",
        ),
        (["schedule=nope"], "there is no schedule 'nope'; expected one of: constant, cosine, rsqrt, wsd"),
    ],
)
def test_errors_of_composition_become_one_line(overrides: list[str], line: str) -> None:
    register_schemas()
    with (
        initialize_config_module("mmpretrain.conf", version_base="1.3"),
        pytest.raises(Exception, match=r".") as raised,
    ):
        compose("train", overrides)
    assert one_line(raised.value) == line


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("data.train.pairs.shards=DATA/{0..9}.tar", "DATA/{0..9}.tar"),
        ("data.train.pairs.shards=DATA/{a,b}.tar", "DATA/{a,b}.tar"),
        ("data.val.val.shards=a=1/{00..10}.tar", "a=1/{00..10}.tar"),
        ('data.train.pairs.shards="DATA/{0..9}.tar"', "DATA/{0..9}.tar"),  # quoted for Hydra already
        ("data.train.pairs.sources.a.shards=a/{0..9}.tar", "a/{0..9}.tar"),
        ("+data.train.mine.shards=DATA/{0..9}.tar", {"mine": {"shards": "DATA/{0..9}.tar"}}),
        ("+data.val.mine.classes=a=1/classes.tsv", {"mine": {"classes": "a=1/classes.tsv"}}),
        ("data.train.pairs.shards=[a.tar,b/*.tar]", ["a.tar", "b/*.tar"]),
        ("data.train.pairs.shards=${data.root}/a", "${data.root}/a"),
        ("images=tars/{0..9}.tar", "tars/{0..9}.tar"),
        ("checkpoint=runs/a/objective=flip,run.seed=1", "runs/a/objective=flip,run.seed=1"),
        ("eval.cka.other=runs/a/lr=0.001,run.seed=1", "runs/a/lr=0.001,run.seed=1"),
        ("checkpoints=[runs/a/run.seed=1, 'b,c', runs/d]", ["runs/a/run.seed=1", "b,c", "runs/d"]),
        ("data.train.pairs.shards=null", None),
    ],
)
def test_paths_need_no_quotes(given: str, value: object) -> None:
    (override,) = OverridesParser.create().parse_overrides(hydra_arguments([given]))
    assert override.value() == value


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("debug=nan", "nan"),
        ("model=1", "1"),
        ("eval=[1e3,retrieval, true]", ["1e3", "retrieval", "true"]),
        ("objective=[Null,inf]", ["Null", "inf"]),
        ("objective=[infonce2,1a,'2']", ["infonce2", "1a", "2"]),
        ("eval=[]", []),
        ("trainer.ema_decay=null", None),
        ("run.seed=1", 1),
    ],
)
def test_options_of_groups_are_names(given: str, value: object) -> None:
    (override,) = OverridesParser.create().parse_overrides(hydra_arguments([given]))
    assert override.value() == value


def test_paths_may_be_swept_over() -> None:
    given = "data.train.pairs.shards=a/{0..9}.tar,b/{x,y}.tar"
    parsed = OverridesParser.create().parse_overrides(hydra_arguments([given, "-m"])[1:])
    assert list(parsed[0].sweep_string_iterator()) == ["'a/{0..9}.tar'", "'b/{x,y}.tar'"]
    (call,) = hydra_arguments(["data.train.pairs.shards=choice(a,b)"])
    assert call == "data.train.pairs.shards=choice(a,b)"


@pytest.mark.parametrize("given", ["--experiment", "--experiment=quickstart", "--lr", "--trainer.batch_size=8"])
def test_options_of_other_programs_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match=rf"^there is no option {given.partition('=')[0]}; expected KEY=VALUE"):
        hydra_arguments([given, "quickstart"])


@pytest.mark.parametrize("given", [["--multirun"], ["--cfg", "job"], ["--info=all"], ["--help"]])
def test_options_of_hydra_are_kept(given: list[str]) -> None:
    assert hydra_arguments(given) == given
