"""Conversion of command-line arguments to Hydra's form."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmpretrain.config.command_line import hydra_arguments


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
        ("data.train.pairs.shards=null", None),
    ],
)
def test_paths_need_no_quotes(given: str, value: object) -> None:
    (override,) = OverridesParser.create().parse_overrides(hydra_arguments([given]))
    assert override.value() == value


def test_paths_may_be_swept_over() -> None:
    given = "data.train.pairs.shards=a/{0..9}.tar,b/{x,y}.tar"
    parsed = OverridesParser.create().parse_overrides(hydra_arguments([given, "-m"])[1:])
    assert list(parsed[0].sweep_string_iterator()) == ["'a/{0..9}.tar'", "'b/{x,y}.tar'"]
    (call,) = hydra_arguments(["data.train.pairs.shards=choice(a,b)"])
    assert call == "data.train.pairs.shards=choice(a,b)"
