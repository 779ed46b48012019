"""Files of weights of other libraries: reading without executing anything, and those that open_clip publishes."""

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import load_state_dict
from safetensors import SafetensorError
from torch import Tensor

# Errors of a file without weights: another format, other objects, or no object (StopIteration in open_clip).
_UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError, AttributeError, TypeError, StopIteration,
    IndexError, AssertionError, OverflowError, ValueError, struct.error,
)  # fmt: skip


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a .safetensors, or a .pt, .pth or .bin of torch that holds tensors alone, perhaps as `state_dict` or `model`.

    Raises: ValueError for any other file; OSError if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # torch tells the pickle's protocol of files that it then refuses.
            warnings.simplefilter("ignore", UserWarning)
            found: Any = load_state_dict(str(file))
        tensors: dict[str, Tensor] = found["model"] if isinstance(found.get("model"), dict) else found
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
            raise TypeError("not all of it are tensors with names")
    except _UNREADABLE as error:
        raise ValueError(
            f"its weights cannot be read ({type(error).__name__}); expected a .safetensors, or a .pt that holds tensors alone"
        ) from error
    return tensors


def published_weights(source: str) -> Path:
    """Download the weights of an open_clip `<model>/<tag>`. Raises: ValueError if it is unknown or the download fails."""
    name, _, tag = source.partition("/")
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = (
            f"{name} has the tags {', '.join(tags)}"
            if tags
            else "expected a run, a file, or a <model>/<tag> of open_clip"
        )
        raise ValueError(f"there is no such file, and open_clip does not know it; {known}")
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # huggingface_hub, urllib and requests raise different exceptions
        raise ValueError(f"open_clip cannot fetch it ({str(error).splitlines()[0]}); give the file itself") from error
