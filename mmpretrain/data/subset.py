"""Selection of the samples that a file names, without rewriting the data."""

import logging

import numpy as np
import numpy.typing as npt

from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_json_field
from mmpretrain.data.source import SampleSource

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


def _uids(source: SampleSource) -> list[str]:
    """Return the `uid` in each sample's json, or a unique placeholder if it has none."""
    uids = []
    for sample in range(source.num_samples):
        try:
            uids.append(str(read_json_field(source.read(sample, ("json",)), "uid")))
        except BadSample:
            uids.append(f"none {sample}")
    return uids
