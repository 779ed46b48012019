"""Loss spikes: steps whose loss lies far above the losses before."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.training.step import StepLosses

_NORMAL = 1.4826  # standard deviation of normal values by their median absolute deviation
_LEAST_SCALE = 1e-3


class LossSpikes:
    """Finds steps in which the loss of an objective lies far above its last losses, by a robust z-score:

        z = (loss - median) / max(1.4826 MAD, 0.001 |median|)

    with the lower median and the median absolute deviation (MAD) of the objective's losses in a window of steps. Spikes do
    not enter the windows, nor do losses that are not finite. Each objective has a window of its own, so that weights may
    change at any time. No step is a spike before its window is full. All ranks compute the same numbers.

    Args:
        objectives: names of the objectives.
        windows: losses in the windows of a resumed run, oldest first, by objective.
        last: z-scores of the last step of a resumed run, if it was a spike.
        num_steps: length of the window.
        threshold: least z-score of a spike.
        device: the training device, on which the windows are kept.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        windows: Mapping[str, Sequence[float]],
        last: Mapping[str, float],
        num_steps: int,
        threshold: float,
        device: torch.device,
    ) -> None:
        self._names, self._threshold = list(objectives), threshold
        self._windows = torch.full((len(self._names), num_steps), torch.nan, dtype=torch.float64)
        for window, name in zip(self._windows, self._names, strict=True):
            if known := windows.get(name, ())[-num_steps:]:
                window[-len(known) :] = torch.tensor(known, dtype=torch.float64)
        self._windows = self._windows.to(device)
        self._losses = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._scores = torch.tensor([last.get(name, 0.0) for name in self._names], dtype=torch.float64).to(device)

    def measure(self, losses: StepLosses) -> None:
        """Reduce the losses of a step over the ranks. A collective."""
        own = [self._share(losses, name) for name in self._names]
        self._losses = distributed.all_reduce_sum(torch.stack(own))

    def _share(self, losses: StepLosses, name: str) -> Tensor:
        """Return this rank's summand of a loss, a float64 scalar; NaN for an objective that is not computed."""
        if name in losses.sums:
            return losses.sums[name]["loss"].double() / losses.counts[name]
        if name in losses.coupled:  # every rank has the loss of the whole batch
            return losses.coupled[name].double() * (distributed.rank() == 0)
        return torch.full((), torch.nan, dtype=torch.float64, device=self._losses.device)

    def update(self) -> Tensor:
        """Compare the measured losses with the windows, and add them unless one of them is a spike.

        Returns: a float32 scalar, 1 for a spike, else 0.
        """
        median = self._windows.nanmedian(dim=1, keepdim=True).values
        deviation = (self._windows - median).abs().nanmedian(dim=1).values
        median = median.squeeze(1)
        scores = (self._losses - median) / torch.maximum(_NORMAL * deviation, _LEAST_SCALE * median.abs())
        is_finite, is_full = self._losses.isfinite(), ~self._windows.isnan().any(dim=1)
        is_spike = is_finite & is_full & (scores >= self._threshold)
        self._scores = torch.where(is_spike, scores, 0.0)
        is_added = (is_finite & ~is_spike.any())[:, None]
        moved = torch.cat([self._windows[:, 1:], self._losses[:, None]], dim=1)
        self._windows = torch.where(is_added, moved, self._windows)
        return is_spike.any().float()

    def flags(self) -> dict[str, Tensor]:
        """Return the last step's z-score for each objective, 0 if it is no spike, as flags for the other ranks."""
        return {f"{_FLAG}{name}": score for name, score in zip(self._names, self._scores, strict=True)}

    def state(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Return (windows, z-scores of the last step) for a checkpoint. Synchronises with the device."""
        windows = {
            name: window[~window.isnan()].tolist()
            for name, window in zip(self._names, self._windows.cpu(), strict=True)
        }
        scores = dict(zip(self._names, self._scores.tolist(), strict=True))
        return windows, {name: score for name, score in scores.items() if score}


_FLAG = "spike/"


def spikes_in(flags: Mapping[str, float]) -> dict[str, float]:
    """Return the z-score of each objective whose loss was a spike, from the flags of a step."""
    return {name.removeprefix(_FLAG): score for name, score in flags.items() if name.startswith(_FLAG) and score}
