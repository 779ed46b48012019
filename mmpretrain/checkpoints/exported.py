"""Interface of the exporters, which write a model in the format of another library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmpretrain.checkpoints.loaded import Loaded


@dataclass(frozen=True)
class Exported:
    """What an exporter tells the model card."""

    library: str
    """Name of the library, as Hugging Face's hub spells it."""
    usage: str
    """How to load the files, and what they leave out, in Markdown. `DIR` stands for their folder."""


class Exporter(Protocol):
    """Function that writes a model into an empty folder."""

    def __call__(self, loaded: Loaded, folder: Path) -> Exported:
        """Write the files. Raises: ValueError of one line if the format cannot express a part, which it names."""
        ...
