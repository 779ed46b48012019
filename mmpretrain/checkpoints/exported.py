"""Interface of the exporters, which write a model in the format of another library."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmpretrain.checkpoints.loaded import Loaded

log = logging.getLogger(__name__)

INITIAL_SCALE = 1 / 0.07
"""CLIP's `logit_scale` before training."""


@dataclass(frozen=True)
class Exported:
    """What an exporter tells the model card."""

    library: str
    """Name of the library, as Hugging Face's hub spells it."""
    usage: str
    """How to load the files, and what they leave out, in Markdown. `DIR` stands for their folder."""


def logit_scale_of(scalars: Mapping[str, float]) -> float:
    """Return `logit_scale` of a model's scalars, or CLIP's initial value 1 / 0.07, with a warning, if it is unknown."""
    if "logit_scale" not in scalars:
        log.warning(
            "no objective has learnt a logit_scale: CLIP's initial value 1 / 0.07 is written, which fits neither these "
            "weights' probabilities nor their calibration; embeddings and rankings do not depend on it"
        )
    return scalars.get("logit_scale", INITIAL_SCALE)


class Exporter(Protocol):
    """Function that writes a model into an empty folder."""

    def __call__(self, loaded: Loaded, folder: Path) -> Exported:
        """Write the files. Raises: ValueError of one line if the format cannot express a part, which it names."""
        ...
