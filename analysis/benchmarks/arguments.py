"""Types of command-line arguments. A wrong value is refused in one line before anything is measured."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import open_clip

T = TypeVar("T")
EMOJI_CLIP = "emoji_clip"


def positive(text: str) -> int:
    """Parse an integer of at least 1, such as `64` or `1e6`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < 2**63 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(number)


def one_of(*names: str) -> Callable[[str], str]:
    """Return a parser of one of `names`, for lists, which argparse's `choices` does not support."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r}; expected one of {', '.join(names)}")
        return text

    return parse


def listed(each: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a parser of comma-separated values, such as `512,256`."""

    def parse(text: str) -> list[T]:
        return [each(part) for part in text.split(",")]

    return parse


def model(text: str) -> str:
    """Parse `emoji_clip` or the name of a model of open_clip."""
    if text != EMOJI_CLIP and text not in open_clip.list_models():
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected {EMOJI_CLIP}, or a model of open_clip: one of open_clip.list_models()"
        )
    return text


def captions(text: str) -> str:
    """Parse the number of tokens of each caption, or a folder of tars."""
    if not text.isdigit() and not any(Path(text).glob("*.tar")):
        raise argparse.ArgumentTypeError(f"no *.tar in {text!r}; expected a folder of tars or a number of tokens")
    if text.isdigit() and int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} tokens; expected 2 at least, the caption's start and its end")
    return text


def existing(text: str) -> Path:
    """Parse the path of an existing file or folder."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} does not exist")
    return Path(text)


def writable(text: str) -> Path:
    """Parse the path of an output file in an existing folder."""
    if not Path(text).parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a file in a folder that exists")
    return Path(text)
