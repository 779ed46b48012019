"""Folder of the images that a table names by their paths."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmpretrain.data.decode import BadSample


@dataclass(frozen=True)
class ImageRoot:
    """Folder that a table's image paths are relative to. Paths may leave it only with `allow_outside`.

    Symbolic links inside the folder may lead outside: they come from the folder's owner, not from the table's author.
    `hint` tells in messages what to do about a path that leaves the folder.
    """

    folder: Path
    allow_outside: bool = False
    hint: str = "name the images' folder with --image-root, or trust the table with --allow-outside"

    @cached_property
    def _prefix(self) -> str:
        return f"{os.path.abspath(self.folder).rstrip('/')}/"

    def locate(self, image: str) -> Path:
        """Return the file of an image path. Raises: BadSample if it is outside of the folder."""
        if "\0" in image:  # some versions of normpath truncate the path there
            raise BadSample("no such file (its path has a NUL byte)")
        # The normalised path is also the one opened: `..` after a symbolic link would lead elsewhere.
        path = os.path.normpath(os.path.join(self.folder, image))
        if not self.allow_outside and not f"{os.path.abspath(path)}/".startswith(self._prefix):
            raise BadSample(f"its path leaves {str(self.folder)!r}: {self.hint}")
        return Path(path)
