"""Parts of the model that are not trained, for ever or until some samples have been seen (LiT, Zhai et al. 2022)."""

from collections.abc import Mapping

from torch import nn

from mmpretrain.schedules import Clock, Duration
from mmpretrain.task import Task
from mmpretrain.usage import nearest


class Freeze:
    """Which parameters are frozen, as a function of the samples seen.

    Args:
        task: whose model it is; what is frozen already stays so.
        until: by the part's name inside the model (`image`, `text.transformer.resblocks.0`), how long it is frozen;
            None is for ever.

    Raises: ValueError if the model has no such part.
    """

    def __init__(self, task: Task, until: Mapping[str, Duration | None]) -> None:
        self._until: list[tuple[nn.Parameter, Duration | None]] = []
        for part, duration in until.items():
            prefix = f"model.{part}"
            members = [(n, p) for n, p in task.named_parameters() if n == prefix or n.startswith(f"{prefix}.")]
            if not members:
                parts = [name.removeprefix("model.") for name, _ in task.named_modules() if name.startswith("model.")]
                raise ValueError(f"trainer.freeze has {part!r}, which is no part of the model; {nearest(part, parts)}")
            self._until += [(parameter, duration) for _, parameter in members if parameter.requires_grad]
        for parameter, duration in self._until:
            if duration is None:
                parameter.requires_grad_(False)

    def apply(self, samples: int, clock: Clock) -> bool:
        """Freeze and thaw for the step that starts after `samples`; returns whether anything changed."""
        changed = False
        for parameter, duration in self._until:
            trained = duration is not None and samples >= clock.samples(duration)
            changed |= parameter.requires_grad != trained
            parameter.requires_grad_(trained)
        return changed
