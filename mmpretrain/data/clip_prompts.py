"""Class names and prompts of the zero-shot data sets of CLIP's paper (Radford et al. 2021, table 9), by `clip:NAME`.

They are those of `data/prompts.md` of openai/CLIP, and ImageNet's are open_clip's. The order of the classes is the one of
torchvision's class indexes, where torchvision has the set. In `prompts.md`, `eurosat` and `oxford_pets` have another order,
and `caltech101` has a first class `background`, which torchvision leaves out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import open_clip

from mmpretrain.errors import nearest

PREFIX = "clip:"
_FOLDER = files("mmpretrain.data") / "prompts"


@dataclass(frozen=True)
class ClipPrompts:
    """Prompts of a data set: the names of each class, of which the first is its label, and templates with `{}` for one."""

    names: Sequence[Sequence[str]]
    templates: Sequence[str]


def clip_prompts(spelling: str, key: str) -> ClipPrompts:
    """Return the prompts of the data set `clip:NAME`; `key` names the option in messages. Raises: ValueError."""
    name = spelling.removeprefix(PREFIX)
    if name == "imagenet":
        templates = [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return ClipPrompts([[each] for each in open_clip.IMAGENET_CLASSNAMES], templates)
    if name not in _known():
        raise ValueError(f"{key} is {spelling!r}; {nearest(name, ['imagenet', *_known()])}")
    found = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return ClipPrompts([[each] if isinstance(each, str) else each for each in found["classes"]], found["templates"])


def _known() -> list[str]:
    return [file.name.removesuffix(".json") for file in _FOLDER.iterdir() if file.name.endswith(".json")]
