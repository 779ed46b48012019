"""Numbers out of range are told with their key, the value and the bounds."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmpretrain.errors import UsageError, check_number, usage_errors
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.sigmoid import Sigmoid
from mmpretrain.optim import adamw
from mmpretrain.schedules import Duration, WarmupConstant, WarmupCosine
from tests import tiny


def optimizer(**arguments: Any) -> object:
    defaults: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "towers": {}}
    return adamw([], **{**defaults, **arguments})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optimizer(lr=-1), "optimizer.lr is -1; expected a number at least 0: optimizer.lr=..."),
        (lambda: optimizer(lr=float("nan")), "optimizer.lr is nan; expected a number at least 0"),
        (lambda: optimizer(weight_decay=-0.1), "optimizer.weight_decay is -0.1; expected a number at least 0"),
        (lambda: optimizer(eps=-1), "optimizer.eps is -1; expected a number at least 0"),
        (lambda: optimizer(betas=(0.9, 1.5)), "optimizer.betas[1] is 1.5; expected a number at least 0 and below 1"),
        (
            lambda: optimizer(towers={"text": {"lr": -1}}),
            "optimizer.towers.text.lr is -1; expected a number at least 0",
        ),
        (lambda: WarmupCosine(final=-3), "schedule.final is -3; expected a number at least 0"),
        (lambda: WarmupConstant(final=-3), "schedule.final is -3; expected a number at least 0"),
        (
            lambda: InfoNCE(tiny.image_text(), init_logit_scale=0),
            "objective.infonce.init_logit_scale is 0; expected a number at least 1 and at most 100.0",
        ),
        (
            lambda: InfoNCE(tiny.image_text(), max_logit_scale=-1),
            "objective.infonce.max_logit_scale is -1; expected a number above 1",
        ),
        (
            lambda: Sigmoid(tiny.image_text(), init_logit_scale=0),
            "objective.sigmoid.init_logit_scale is 0; expected a number above 0",
        ),
        (lambda: tiny.text(depth=-1), "model.text.depth is -1; expected a number at least 1"),
        (lambda: tiny.text(num_heads=0), "model.text.num_heads is 0; expected a number at least 1"),
        (lambda: tiny.text(mlp_ratio=0), "model.text.mlp_ratio is 0; expected a number above 0"),
        (lambda: ImageTextModel(tiny.vit(), None, embed_dim=0), "model.embed_dim is 0; expected a number at least 1"),
    ],
)
def test_a_number_out_of_range_is_told_with_its_key(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build()


def test_bounds_themselves_are_inside_or_outside_as_said() -> None:
    check_number("x", 1, at_least=1, at_most=1)
    for bounds in ({"above": 1}, {"below": 1}):
        with pytest.raises(UsageError, match=r"^x is 1; expected a number (above|below) 1: x=\.\.\.$"):
            check_number("x", 1, **bounds)


def test_an_error_of_a_users_own_code_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "own_addition.py").write_text(
        "import numpy\n\n\ndef add():\n    return numpy.ones(2) + numpy.ones(3)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        mine = importlib.import_module("own_addition")
    with (
        pytest.raises(
            UsageError, match=rf"shapes \(2,\) \(3,\)  \(in {tmp_path}/own_addition.py, line 5; MMPRETRAIN_TRACEBACK"
        ),
        usage_errors(),
    ):
        mine.add()


def test_an_error_of_this_package_names_no_line() -> None:
    with pytest.raises(UsageError, match=r"such as 20epochs, 10Msamples or 2000steps$"), usage_errors():
        Duration.parse("often", "trainer.duration")
