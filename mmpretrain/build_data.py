"""Construction of sources of samples and class lists from the configuration."""

import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpretrain.config import checks, instantiate
from mmpretrain.config.instantiate import accepts, expected_type
from mmpretrain.config.schema import LabelConfig
from mmpretrain.data.classes import Classes, classes_named, read_classes
from mmpretrain.data.clip_prompts import PREFIX
from mmpretrain.data.image_folder import ImageFolder
from mmpretrain.data.open_shards import StorageOptions, open_shards
from mmpretrain.data.remote import is_remote
from mmpretrain.data.source import SampleSource, selected
from mmpretrain.data.subset import select

log = logging.getLogger(__name__)

_EMBEDDED = "data/shapes"  # default location of the generated shapes data set


def build_source(
    node: instantiate.Node, key: str, root: str | None, lookup: instantiate.Lookup | None = None
) -> SampleSource:
    """Build the source of a `_target_` node; its argument `root`, if it has one, is the folder of relative paths.

    Args:
        node: the node, checked unless `lookup` is given.
        key: full name of the node.
        root: the configuration's data.root.
        lookup: lookup of an untrusted node; the node is checked after it.

    Raises: ValueError if `lookup` refuses the node, an argument is wrong, or what is built is no `SampleSource`.
    """
    resolved = instantiate.resolve(node, key, lookup or (lambda name, _: instantiate.find(name)))
    if lookup is not None:  # only now may the module of a `_target_` be imported
        checks.check_source(node, key)
    target = instantiate.find(node["_target_"])
    runtime = {"root": root} if "root" in inspect.signature(target).parameters else {}
    source = instantiate.call(resolved, 0, **runtime)
    if not isinstance(source, SampleSource):
        raise ValueError(
            f"{key} is a {type(source).__name__}; expected num_samples, fingerprint, key, location and read, as "
            f"{expected_type(SampleSource)} has them"
        )
    if source.num_samples < 1:
        raise ValueError(f"{key} has {source.num_samples} samples; expected at least one")
    return source


def build_images(images: str | Sequence[str] | dict[str, Any], storage: StorageOptions) -> SampleSource:
    """Open the images of a command's `images`: a folder of image files, tars, or the node of a source. A collective.

    Raises: ValueError for a folder without images, and for an unsuitable source.
    """
    if isinstance(images, dict):
        checks.check_source(images, "images")
        return build_source(images, "images", None)
    if isinstance(images, str) and Path(images).is_dir() and not any(Path(images).glob("*.tar")):
        return ImageFolder(images)
    return open_shards(images, None, storage)


def build_samples(
    key: str,
    shards: Any,
    source: instantiate.Node | None,
    root: str | None,
    storage: StorageOptions,
    subset: str | None = None,
    lookup: instantiate.Lookup | None = None,
) -> SampleSource:
    """Open samples that the configuration names under `key`, either tars or the node of a source.

    Args:
        key: full name of the configuration that has `shards` and `source`.
        shards: tars, or None.
        source: node of a source, or None.
        root: folder of relative paths.
        storage: indexes and cache of tars.
        subset: file that names the samples to keep; None: all.
        lookup: lookup of an untrusted node.

    Raises: ValueError if neither or both are given, or what is named cannot be opened.
    """
    if (shards is None) == (source is None):
        has = "neither" if shards is None else "both"
        raise ValueError(f"{key} has {has} of shards and source; expected one of them: {key}.shards=... or .source=...")
    if source is not None:
        built = build_source(source, f"{key}.source", root, lookup)
        try:
            return built if subset is None else selected(built, select(built, subset))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return _shards(key, shards, root, storage, subset)


def _shards(
    key: str, shards: str | list[str], root: str | None, storage: StorageOptions, subset: str | None
) -> SampleSource:
    if not accepts(shards, str | Sequence[str]):
        raise ValueError(f"{key}.shards is {shards!r}; expected a tar, a folder or a pattern, or a list of them")
    try:
        opened = open_shards(shards, root, storage)
        if subset is not None and not opened.is_indexed:
            raise ValueError(
                f"subset is {subset!r}, but the shards have no indexes; expected them: python -m data_tools index"
            )
        kept: SampleSource = opened if subset is None else selected(opened, select(opened, subset))
    except ValueError as error:
        made = (
            f"; mmpretrain-data shapes --output {root} makes it"
            if root == _EMBEDDED and not Path(root).exists()
            else ""
        )
        raise ValueError(f"{key}.shards (data.root={root}): {error}{made}") from error
    if opened.problems:
        others = f", and {len(opened.problems) - 1} more such lines" if len(opened.problems) > 1 else ""
        log.warning("%s.shards: %s%s; `python -m data_tools index` names them all", key, opened.problems[0], others)
    return kept


def build_classes(data: LabelConfig, root: str | None) -> Classes | None:
    """Read the class list of a data set, if it has one. Raises: ValueError if it cannot be read."""
    if data.classes is None:
        return None
    return read_classes(_local(data.classes, root), data.class_column, data.text_column, data.templates)


def check_class_numbers(key: str, label: str, names: Sequence[Sequence[str] | None]) -> None:
    """Raises: ValueError if numbers of classes mean other classes in another source.

    Args:
        key: full name of the label.
        label: field of the label.
        names: names of the classes of each source; None for one that names none.
    """
    known = [list(each) for each in names if each]
    other = next((each for each in known if each != known[0]), None)
    if label == "cls" and other is not None:
        name = min(set(known[0]) ^ set(other), default=known[0][0])
        raise ValueError(
            f"{key} is 'cls', the number of a class, but the sources have other classes, such as {name!r}, or in another "
            f"order; expected the name of the class: {key}=json.<column>, such as json.label for class folders"
        )


def named_classes(names: Sequence[str], templates: str | Sequence[str]) -> Classes:
    """Return classes with names of a source's own, whose underscores are spaces in the texts. Raises: ValueError."""
    return replace(classes_named([name.replace("_", " ") for name in names], templates), names=names)


def _local(classes: str, root: str | None) -> Path | str:
    """Return the path of a class list, or `clip:NAME` as it is. Raises: ValueError if it is remote."""
    if classes.startswith(PREFIX):
        return classes
    path = classes if is_remote(classes) else os.path.join(root or "", classes)
    if is_remote(path):
        raise ValueError(f"classes is {path!r}; expected a file of this machine: copy it, and give its absolute path")
    return Path(path)
