"""Samples from a folder of image files."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mmpretrain.data.decode import BadSample
from mmpretrain.data.source import check_field_size
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS


class ImageFolder:
    """`SampleSource` of the images in a folder and the folders in it, in the order of their paths, without other fields.

    A file is an image if its name ends like one of `IMAGE_EXTENSIONS`. Its key is its path in the folder.

    Args:
        folder: the folder.

    Raises: ValueError if there is no image in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        kinds = {f".{extension}" for extension in IMAGE_EXTENSIONS}
        self._folder = Path(folder)
        self._files = sorted(
            path for path in self._folder.rglob("*") if path.suffix.lower() in kinds and path.is_file()
        )
        if not self._files:
            raise ValueError(f"{folder}: no image in it; expected {', '.join(sorted(kinds))}, or tars")
        self._keys = [str(path.relative_to(self._folder)) for path in self._files]

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self._files)

    @property
    def fingerprint(self) -> str:
        """Hash of the paths in the folder, sizes and times of change of the images."""
        digest = hashlib.sha256()
        for key, path in zip(self._keys, self._files, strict=True):
            stat = path.stat()
            digest.update(f"{key}\0{stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def key(self, sample_id: int) -> str:
        """Return the path of an image in the folder."""
        return self._keys[sample_id]

    def location(self, sample_id: int) -> str:
        """Return the folder."""
        return str(self._folder)

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return an image file. Raises: BadSample if `fields` has no image extension, or the file is too large."""
        if not set(fields) & set(IMAGE_EXTENSIONS):
            raise BadSample(f"an image without {' or '.join(fields)}", "member_missing")
        path = self._files[sample_id]
        check_field_size(IMAGE_EXTENSIONS[0], path.stat().st_size)
        return path.read_bytes()
