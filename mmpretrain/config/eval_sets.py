"""Held-out data sets of a configuration that a folder describes: the keys that it gives them."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from mmpretrain import distributed
from mmpretrain.config.schema import EvalSetConfig, SplitConfig
from mmpretrain.data.wds_folder import folders_of_suite, read_wds_folder, type_of

log = logging.getLogger(__name__)

_BESIDE_WDS = ("wds", "templates", "images", "fields")


def expanded(data: EvalSetConfig, key: str, root: str | None) -> EvalSetConfig:
    """Return a data set with the keys that its folder `wds` gives. Others are returned as they are.

    Args:
        data: configuration of the data set.
        key: its full name.
        root: folder of relative paths.

    Raises: ValueError if the folder is not in CLIP_benchmark's layout, or a key that it gives is set, too.
    """
    if data.wds is None:
        return data
    default = EvalSetConfig()
    for each in fields(data):
        if each.name not in _BESIDE_WDS and getattr(data, each.name) != getattr(default, each.name):
            raise ValueError(f"{key} has wds and {each.name}; expected one of them: the folder gives {each.name}")
    try:
        folder = read_wds_folder(Path(os.path.join(root or "", data.wds)).absolute())
    except ValueError as error:
        raise ValueError(f"{key}.wds: {error}") from error
    return replace(
        data,
        wds=None,
        shards=folder.test,
        caption=folder.caption,
        label=folder.label,
        classes=folder.classes,
        templates=folder.templates or data.templates,
        train=SplitConfig(shards=folder.train),
    )


def with_suite(sets: Mapping[str, EvalSetConfig], suite: str | None, root: str | None) -> dict[str, EvalSetConfig]:
    """Return data sets, and those of a folder of folders in CLIP_benchmark's layout.

    Data sets of several labels an image are named in a warning and left out: no evaluator has a score for them.

    Raises: ValueError if `suite` has no data sets, or one with the name of another.
    """
    if suite is None:
        return dict(sets)
    found = {}
    for name, folder in folders_of_suite(Path(os.path.join(root or "", suite)).absolute()).items():
        if name in sets:
            raise ValueError(f"data.suite has {folder}, but data.val.{name} is given, too; give that one another name")
        if type_of(folder) == "multilabel":
            if distributed.is_main():
                log.warning("data.suite: %s is left out: it has several labels an image", folder)
        else:
            found[name] = EvalSetConfig(wds=str(folder))
    if not found:
        raise ValueError(f"data.suite is {suite!r}, where each data set has several labels an image; expected others")
    return {**sets, **found}
