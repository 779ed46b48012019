"""Table of the shards of a set: what their indexes say of each before a sample is read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmpretrain.data.stored_index import IndexHeader, open_index
from mmpretrain.data.tar_index import TarIndex


class Texts(Sequence[str]):
    """Texts in two arrays, which processes can share: their bytes (uint8), and the end of each (int64 [n])."""

    def __init__(self, blob: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Encode texts; paths may hold bytes that are no UTF-8."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        return cls(
            np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(text) for text in encoded], dtype=np.int64)
        )

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[each] for each in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        i %= len(self)
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class ShardTable:
    """One row for each shard.

    Attributes:
        paths: paths of the tars.
        counts: number of samples of each, int64 [n].
        digests: digest of each (see `TarIndex`); empty for a shard that is indexed when it is first read.
        problems: all defects of the tars, each with its path.
        not_stored: number of each shard whose index cannot be stored, so that it has to be made again, int64.
    """

    def __init__(
        self,
        paths: Texts,
        counts: npt.NDArray[np.int64],
        digests: Texts,
        problems: Texts,
        not_stored: npt.NDArray[np.int64],
    ) -> None:
        self.paths, self.counts, self.digests = paths, counts, digests
        self.problems, self.not_stored = problems, not_stored

    @classmethod
    def open(cls, paths: Sequence[str], index_dir: str | None = None) -> tuple["ShardTable", dict[int, TarIndex]]:
        """Read the headers of the indexes of local tars, and make the indexes that are missing.

        Args:
            paths: paths of the tars.
            index_dir: folder of the indexes; None: they lie beside the tars.

        Returns: the table, and the indexes that cannot be stored by the number of their shard.
        Raises: ValueError for a tar without samples; errors of `open_index`.
        """
        counts, digests, problems = np.empty(len(paths), np.int64), [], []
        unstored: dict[int, TarIndex] = {}
        for i, path in enumerate(paths):
            index: IndexHeader | TarIndex = open_index(path, index_dir)
            if not index.num_samples:
                raise ValueError(f"shard {path!r}: no sample in it, expected at least one; remove it or build it again")
            if isinstance(index, TarIndex):
                unstored[i] = index
            counts[i] = index.num_samples
            digests.append(index.digest)
            problems += [f"{path}: {problem}" for problem in index.problems]
        return cls.of(paths, counts, digests, problems, list(unstored)), unstored

    @classmethod
    def of(
        cls,
        paths: Sequence[str],
        counts: npt.ArrayLike,
        digests: Sequence[str],
        problems: Sequence[str] = (),
        not_stored: Sequence[int] = (),
    ) -> "ShardTable":
        """Return the table of these columns."""
        return cls(
            Texts.of(paths),
            np.asarray(counts, np.int64),
            Texts.of(digests),
            Texts.of(problems),
            np.asarray(not_stored, np.int64),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the table as tensors on the CPU."""
        arrays: dict[str, npt.NDArray[Any]] = {"counts": self.counts, "not_stored": self.not_stored}
        for name in ("paths", "digests", "problems"):
            texts: Texts = getattr(self, name)
            arrays |= {f"{name}.blob": texts.blob, f"{name}.ends": texts.ends}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ShardTable":
        """Return the table of `tensors()`, which it uses without a copy."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        paths, digests, problems = (
            Texts(arrays[f"{name}.blob"], arrays[f"{name}.ends"]) for name in ("paths", "digests", "problems")
        )
        return cls(paths, arrays["counts"], digests, problems, arrays["not_stored"])
