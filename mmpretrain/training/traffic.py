"""Bytes that the collectives of a step send."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes that each of many ranks sends with ring algorithms, relative to the larger side of the collective.
_SENT = {"allreduce": 2.0, "allgather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}


@dataclass(frozen=True)
class Collective:
    """One collective."""

    kind: str
    """`allreduce`, `allgather`, `reduce_scatter` or `broadcast`."""
    ranks: tuple[int, ...]
    num_bytes: float
    """Bytes that one of w ranks sends with a ring algorithm: with b bytes on the larger side of the collective,
    2 b (w - 1) / w for an all-reduce, and b (w - 1) / w for the others."""


class Collectives(TorchDispatchMode):
    """Record the collectives of this rank inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = next((kind for kind in _SENT if func.overloadpacket.__name__.strip("_").startswith(kind)), None)
        if func.namespace == "c10d" and kind is not None:
            group = next(
                arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
            larger: int = max(each.nbytes for each in tree_leaves(args) if isinstance(each, Tensor))
            if len(ranks) > 1:
                self.seen.append(Collective(kind, ranks, _SENT[kind] * larger * (len(ranks) - 1) / len(ranks)))
        return func(*args, **(kwargs or {}))


def sent_bytes(collectives: Iterable[Collective]) -> dict[str, float]:
    """Return the bytes that a rank sends, by kind of collective."""
    total: dict[str, float] = {}
    for each in collectives:
        total[each.kind] = total.get(each.kind, 0.0) + each.num_bytes
    return total


def of_step(step: Callable[[int], None], num_micro_batches: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by kind of collective.

    Each further micro-batch adds the same bytes, so that a step of many is computed from one of two and one of three.

    Args:
        step: function that takes a step with a number of micro-batches. It is called up to four times.
        num_micro_batches: number of micro-batches of the run's steps.
    """

    def sent(number: int) -> dict[str, float]:
        with Collectives() as collectives:
            step(number)
        return sent_bytes(collectives.seen)

    for _ in range(2):  # DDP arranges its buckets between the first and the second step
        step(1)
    if num_micro_batches <= 2:
        return sent(num_micro_batches)
    two, three = sent(2), sent(3)
    return {kind: two[kind] + (num_micro_batches - 2) * (three[kind] - two[kind]) for kind in two}
