"""Building of the parts of a configuration that came with a checkpoint, none of them larger than its weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.checkpoints import untrusted

# Numbers of elements below which a part or its buffers are never refused as too large.
SMALL_PART = 1 << 16
_SMALL_BUFFERS = 1 << 28


def built(what: str, source: Path, build: Callable[[], Any]) -> Any:
    """Call `build` on an unchecked part of a configuration. Raises: ValueError for any error in it."""
    try:
        return build()
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except BaseException as error:  # invalid arguments raise different exceptions in different parts
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # raised by Rust libraries
            raise
        reason = next(iter(str(error).splitlines()), "no reason is given")
        raise ValueError(f"{source}: {what} cannot be built ({type(error).__name__}: {reason})") from error


def built_module(what: str, build: Callable[[], Any], tensors: Mapping[str, Tensor], source: Path) -> Any:
    """Build a module with random weights, after checking that it is not larger than `tensors`.

    Args:
        what: name of the part, such as `model`.
        build: function that builds it. It is called twice: first under limits and, if possible, without memory.
        tensors: the part's weights by name.
        source: the configuration's file.

    Raises: ValueError if names or shapes of `tensors` are not those of the module.
    """
    # Allow twice the size, since a part may be built and then replaced.
    limits = 10 * len(tensors) + 1000, 2 * numel(tensors) + SMALL_PART
    try:
        with untrusted.at_most(*limits, what, source), torch.device("meta"):  # needs no memory
            module = built(what, source, build)
    except ValueError as error:
        if not untrusted.needs_memory(error):
            raise
        with untrusted.at_most(*limits, what, source):
            module = built(what, source, build)
    _check_names(what, module, tensors, source)
    if sum(buffer.numel() for buffer in module.buffers()) > max(numel(tensors), _SMALL_BUFFERS):
        raise ValueError(f"{source}: the {what}'s buffers are larger than its weights; expected the run's own file")
    return built(what, source, build)


def _check_names(what: str, module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != given:
        names = sorted(name for name in {**expected, **given} if expected.get(name) != given.get(name))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"the checkpoint does not hold the weights of the {what} in {source}: {names[0]} is "
            f"{shape_text(given.get(names[0]))}, expected {shape_text(expected.get(names[0]))}{more}"
        )


def shape_text(shape: torch.Size | None) -> str:
    """Return a shape for an error message."""
    return "absent" if shape is None else str(list(shape))


def numel(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of elements of all tensors."""
    return sum(tensor.numel() for tensor in tensors.values())
