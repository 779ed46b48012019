"""Order of labelled samples by episodes: a few classes, with the same number of samples of each."""

from collections.abc import Sequence

import numpy as np

from mmpretrain.seeds import hash64, permutation


class EpisodeOrder:
    """Sample order of one labelled source: a pure function of the seed and the position.

    Episode e holds the positions [e n, (e + 1) n) with n = ways x per_class. Its classes, and the samples of each, are drawn
    from the seed and e, without replacement.

    Args:
        seed: seed of the order.
        of_class: sample ids of each class, int64 [n_k] each.
        ways: number of classes of an episode.
        per_class: number of samples of each class.

    Raises: ValueError if fewer than `ways` classes have `per_class` samples.
    """

    def __init__(self, seed: int, of_class: Sequence[np.ndarray], ways: int, per_class: int) -> None:
        self._seed, self._ways, self._per_class = seed, ways, per_class
        self._of_class = [samples for samples in of_class if len(samples) >= per_class]
        if len(self._of_class) < ways:
            raise ValueError(
                f"ways is {ways}, but {len(self._of_class)} of {len(of_class)} classes have per_class = {per_class} samples; "
                "expected at least as many: lower one of them"
            )
        self.num_samples = sum(map(len, self._of_class))
        """Number of samples of the classes that are large enough: an epoch of the stream."""
        self.window_samples = self.num_samples
        """Number of samples that are mixed: all."""

    def _episode(self, episode: int) -> np.ndarray:
        """Return the sample ids of an episode, int64 [ways x per_class]."""
        classes = permutation(hash64(self._seed, "classes", episode), len(self._of_class))[: self._ways]
        return np.concatenate(
            [
                self._of_class[k][
                    permutation(hash64(self._seed, episode, k), len(self._of_class[k]))[: self._per_class]
                ]
                for k in classes.tolist()
            ]
        )

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions, int64 [n], to sample ids, int64 [n]."""
        samples = np.empty(len(positions), dtype=np.int64)
        episodes, offsets = np.divmod(positions, self._ways * self._per_class)
        for episode in np.unique(episodes).tolist():
            rows = np.flatnonzero(episodes == episode)
            samples[rows] = self._episode(episode)[offsets[rows]]
        return samples
