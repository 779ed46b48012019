"""Held-out data sets that a folder describes."""

import logging
from pathlib import Path

import pytest

from mmpretrain.config.eval_sets import expanded, with_suite
from mmpretrain.config.schema import EvalSetConfig, SplitConfig
from tests.data.test_wds_folder import write_folder

KEY = "data.val.a"


def test_the_folder_gives_the_keys_of_the_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "wds_a", 1, True, classnames="cat\n", zeroshot_classification_templates="my {c}\n")
    found = expanded(EvalSetConfig(wds="wds_a", fields={"group": "json.g"}), KEY, str(tmp_path))
    assert found == EvalSetConfig(
        shards=[str(tmp_path / "wds_a/test/0.tar")],
        label="cls",
        classes=str(tmp_path / "wds_a/classnames.txt"),
        templates=["my {}"],
        fields={"group": "json.g"},
        train=SplitConfig(shards=[str(tmp_path / "wds_a/train/0.tar")]),
    )


def test_templates_count_where_the_folder_has_none(tmp_path: Path) -> None:
    write_folder(tmp_path / "wds_a", classnames="cat\n")
    found = expanded(EvalSetConfig(wds="wds_a", templates="simple"), KEY, str(tmp_path))
    assert found.templates == "simple"


def test_keys_that_the_folder_gives_are_refused_beside_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "wds_a")
    for given in (EvalSetConfig(wds="wds_a", label="cls"), EvalSetConfig(wds="wds_a", shards="x.tar")):
        with pytest.raises(ValueError, match=r"^data\.val\.a has wds and (label|shards); expected one of them"):
            expanded(given, KEY, str(tmp_path))
    with pytest.raises(ValueError, match=r"^data\.val\.a\.wds: .*nope' is no folder"):
        expanded(EvalSetConfig(wds="nope"), KEY, str(tmp_path))


def test_other_data_sets_stay_as_they_are() -> None:
    assert expanded(data := EvalSetConfig(shards="a.tar", caption="txt"), KEY, None) is data
    assert with_suite({"a": data}, None, None) == {"a": data}


def test_a_suite_adds_its_data_sets_and_leaves_out_those_of_several_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "suite" / "wds_b")
    write_folder(tmp_path / "suite" / "wds_c", dataset_type="multilabel")
    data = EvalSetConfig(shards="a.tar")
    with caplog.at_level(logging.WARNING):
        found = with_suite({"a": data}, "suite", str(tmp_path))
    assert found == {"a": data, "b": EvalSetConfig(wds=str(tmp_path / "suite" / "wds_b"))}
    assert "wds_c is left out: it has several labels an image" in caplog.text
    with pytest.raises(ValueError, match=r"data\.val\.b is given, too"):
        with_suite({"b": data}, "suite", str(tmp_path))


def test_a_suite_without_a_usable_data_set_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "wds_c", dataset_type="multilabel")
    with pytest.raises(ValueError, match=r"each data set has several labels"):
        with_suite({}, str(tmp_path), None)
