"""What the benchmarks' command lines take: what is wrong is answered in a line, before anything is measured."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import open_clip

T = TypeVar("T")
EMOJI_CLIP = "emoji_clip"


def positive(text: str) -> int:
    """A whole number of at least 1, `1e6` among them."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < 2**63 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(number)


def one_of(*names: str) -> Callable[[str], str]:
    """One of `names`; where a list is wanted, `choices` does not do."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r}; expected one of {', '.join(names)}")
        return text

    return parse


def listed(each: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Several of them with commas between, as in `512,256`."""

    def parse(text: str) -> list[T]:
        return [each(part) for part in text.split(",")]

    return parse


def model(text: str) -> str:
    """`emoji_clip`, or the name of a model of open_clip."""
    if text != EMOJI_CLIP and text not in open_clip.list_models():
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected {EMOJI_CLIP}, or a model of open_clip: one of open_clip.list_models()"
        )
    return text


def captions(text: str) -> str:
    """The number of tokens of every caption, or a folder of tars."""
    if not text.isdigit() and not any(Path(text).glob("*.tar")):
        raise argparse.ArgumentTypeError(f"no *.tar in {text!r}; expected a folder of tars or a number of tokens")
    if text.isdigit() and int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} tokens; expected 2 at least, the caption's start and its end")
    return text


def existing(text: str) -> Path:
    """A file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} does not exist")
    return Path(text)


def writable(text: str) -> Path:
    """A file to write, in a folder that is there."""
    if not Path(text).parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a file in a folder that exists")
    return Path(text)
