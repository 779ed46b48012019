"""Documents -> texts of at most so many tokens: long ones are cut, short ones joined."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_tools.documents import Document

SEPARATOR = "\n"  # between documents; inside them whitespace is single spaces
LEAST_FILL = 0.75  # of a cut text's characters: a sentence's end before that wastes too much
_CHARACTERS_PER_TOKEN = 4  # where a search begins
_MOST_CHARACTERS_PER_TOKEN = 8  # where it ends: byte-pair encoders are slow on endless words
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?= |$)|[。！？][」』”’）]*")

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class PackedText:
    """A sample. `key` is FILE-LINE-PIECE of its beginning: the piece-th of the document that begins there."""

    key: str
    text: str
    num_tokens: int


def pack(
    documents: Iterable[Document], count_tokens: CountTokens, context_length: int, join: bool
) -> Iterator[PackedText]:
    """The documents' text, in their order, in samples of at most `context_length` tokens.

    A document begins a new sample where the rest of the last one does not hold it, so that only those are cut that
    are longer than a sample. Without `join` every document begins a new one. Raises what `cut` does.
    """
    sample: PackedText | None = None
    for document in documents:
        for piece, (text, num_tokens) in enumerate(cut(document.text, count_tokens, context_length)):
            if sample is not None and join and piece == 0:
                joined = sample.text + SEPARATOR + text
                # Counted anew: tokens of a text's parts need not add up to its own.
                if (joined_tokens := count_tokens(joined)) <= context_length:
                    sample = PackedText(sample.key, joined, joined_tokens)
                    continue
            if sample is not None:
                yield sample
            sample = PackedText(f"{document.file:05d}-{document.line:09d}-{piece:05d}", text, num_tokens)
    if sample is not None:
        yield sample


def cut(text: str, count_tokens: CountTokens, context_length: int) -> Iterator[tuple[str, int]]:
    """Pieces of a text and their tokens, each as long as `context_length` tokens allow.

    They end with a sentence where that leaves them `LEAST_FILL` of their length, else with a word; a word that alone
    is too long is cut inside. Raises ValueError where not even one character fits.
    """
    start = 0
    while start < len(text):
        # A window, for the cost of a text is not to grow with the square of its length.
        window = text[start : start + _MOST_CHARACTERS_PER_TOKEN * context_length]
        ends = [match.start() for match in re.finditer(" ", window)]
        if start + len(window) == len(text):
            ends.append(len(window))
        end, num_tokens = _longest(window, ends, count_tokens, context_length)
        if end == 0:
            end, num_tokens = _longest(window, range(1, len(window) + 1), count_tokens, context_length)
        if end == 0:
            raise ValueError(
                f"--context-length {context_length}: {window[0]!r} alone takes {count_tokens(window[0])} tokens with "
                "the special ones; expected at least that"
            )
        if start + end < len(text) and (sentences := _sentences_end(window[:end])) < end:
            fewer = count_tokens(window[:sentences])
            if fewer <= context_length:
                end, num_tokens = sentences, fewer
        yield window[:end], num_tokens
        start += end
        start += text[start : start + 1] == " "


def _longest(text: str, ends: Sequence[int], count_tokens: CountTokens, context_length: int) -> tuple[int, int]:
    """The last of ascending `ends` up to which the text fits, and its tokens there; (0, 0) where none does.

    A search by interpolation, for a text's tokens are spread nearly evenly: three or four counts instead of eight.
    """
    best = 0, 0
    fits, exceeds = 0, len(ends) + 1
    probe = bisect_right(ends, _CHARACTERS_PER_TOKEN * context_length)
    while exceeds - fits > 1:
        probe = min(max(probe, fits + 1), exceeds - 1)
        num_tokens = count_tokens(text[: ends[probe - 1]])
        if num_tokens <= context_length:
            fits, best = probe, (ends[probe - 1], num_tokens)
        else:
            exceeds = probe
        probe = probe * context_length // max(num_tokens, 1)
    return best


def _sentences_end(text: str) -> int:
    """Where the last sentence of a text ends that is not wasteful to end with, else the text's length."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return ends[-1] if ends and ends[-1] >= LEAST_FILL * len(text) else len(text)
