"""Selection of samples without rewriting the data: those that a file names, or some of each class."""

import logging

import numpy as np
import numpy.typing as npt

from mmpretrain.data.classes import Classes, read_class
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_json_field
from mmpretrain.data.source import SampleSource
from mmpretrain.seeds import hash64, permutation

log = logging.getLogger(__name__)


def select(source: SampleSource, path: str) -> npt.NDArray[np.int64]:
    """Return the ids of the samples that a `.npy` file names, ascending, int64 [m].

    Names without a sample are counted in a warning, since a crawled data set always lacks some samples.

    Args:
        source: all samples.
        path: `.npy` file with an array of keys (text), or of uids in DataComp's format (two uint64 each, for the 32
            hexadecimal digits of `uid` in a sample's json).

    Raises: ValueError if the file cannot be read, holds anything else, or names no sample; or if keys or uids are not
        unique among the samples.
    """
    try:
        wanted = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"subset is {path!r}, which cannot be read ({error}); expected a .npy of keys or uids"
        ) from error
    if not isinstance(wanted, np.ndarray):
        raise ValueError(f"subset is {path!r}, several arrays; expected one .npy of keys or uids")
    if wanted.dtype.kind in "US":
        names = [str(name, "utf-8") if isinstance(name, bytes) else str(name) for name in wanted.ravel().tolist()]
        have = [source.key(sample) for sample in range(source.num_samples)]
    elif wanted.dtype == np.uint64 or (wanted.dtype.names is not None and wanted.dtype.itemsize == 16):
        pairs = wanted.view(np.uint64).reshape(-1, 2).tolist()
        names = [f"{high:016x}{low:016x}" for high, low in pairs]
        have = _uids(source)
    else:
        raise ValueError(f"subset is {path!r} of {wanted.dtype}; expected keys (text) or uids (two uint64 each)")
    number = {name: i for i, name in enumerate(have)}
    if len(number) < len(have):
        raise ValueError(
            f"subset={path} names samples by {'key' if wanted.dtype.kind in 'US' else 'uid'}, but {len(have) - len(number)} "
            "of the samples share theirs with another; expected unique ones"
        )
    kept = sorted({number[name] for name in names if name in number})
    if not kept:
        raise ValueError(f"subset={path}: none of its {len(names)} names is in {source.location(0)} and the others")
    if len(kept) < len(set(names)):
        log.warning("subset=%s: no sample has %d of its %d names", path, len(set(names)) - len(kept), len(set(names)))
    return np.array(kept, np.int64)


def samples_by_class(source: SampleSource, label: str, classes: Classes | None) -> dict[int, npt.NDArray[np.int64]]:
    """Return the ids of the samples of each class that occurs, ascending, int64 [n] each, by class.

    The labels of all samples are read; samples without one are left out and counted in a warning.

    Args:
        source: all samples.
        label: field of the labels, as in `classes.read_class`.
        classes: the classes; None if they are not known.

    Raises: ValueError if no sample has a label.
    """
    of_class: dict[int, list[int]] = {}
    problems = []
    for sample in range(source.num_samples):
        try:
            of_class.setdefault(read_class(source, sample, label, classes), []).append(sample)
        except BadSample as problem:
            problems.append(problem)
    if not of_class:
        raise ValueError(f"no sample of {source.location(0)} and the others has a label; of the first: {problems[0]}")
    if problems:
        log.warning("%d samples are left out, since they have no label; of the first: %s", len(problems), problems[0])
    return {each: np.array(of_class[each], np.int64) for each in sorted(of_class)}


def draw_shots(
    source: SampleSource, label: str, classes: Classes | None, shots: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return the ids of `shots` samples of each class, ascending, int64 [m]: all of a class that has fewer.

    Args:
        source, label, classes: as in `samples_by_class`.
        shots: number of samples of each class.
        seed: seed of the draw.

    Raises: ValueError if no sample has a label.
    """
    of_class = samples_by_class(source, label, classes)
    if few := sum(len(samples) < shots for samples in of_class.values()):
        log.info("%d of %d classes have fewer than %d samples: all of theirs are taken", few, len(of_class), shots)
    kept = [
        samples[i]
        for each, samples in of_class.items()
        for i in permutation(hash64(seed, "shots", each), len(samples))[:shots]
    ]
    return np.array(sorted(kept), np.int64)


def _uids(source: SampleSource) -> list[str]:
    """Return the `uid` in each sample's json, or a unique placeholder if it has none."""
    uids = []
    for sample in range(source.num_samples):
        try:
            uids.append(str(read_json_field(source.read(sample, ("json",)), "uid")))
        except BadSample:
            uids.append(f"none {sample}")
    return uids
