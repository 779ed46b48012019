"""Packing of documents into texts of limited length: long documents are cut, short ones are joined."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from data_tools.documents import Document

SEPARATOR = "\n"  # between documents; inside them, all whitespace is single spaces
LEAST_FILL = 0.75  # smallest fraction of a text's characters to keep when it is cut at the end of a sentence
_CHARACTERS_PER_TOKEN = 4  # initial guess of the search for a cut
_MOST_CHARACTERS_PER_TOKEN = 8  # bounds the search: byte-pair encoders are slow on very long words
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?= |$)|[。！？][」』”’）]*")

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class PackedText:
    """Packed sample. `key` is FILE-LINE-PIECE of its start: the document's file and line, and the piece's index in it."""

    key: str
    text: str
    num_tokens: int


def pack(
    documents: Iterable[Document], count_tokens: CountTokens, context_length: int, join: bool
) -> Iterator[PackedText]:
    """Yield the documents' text, in order, in samples of at most `context_length` tokens.

    A document that does not fit into the rest of the last sample begins a new one, so only documents longer than a
    sample are cut. Without `join`, every document begins a new sample.

    Raises: errors of `cut`.
    """
    sample: PackedText | None = None
    for document in documents:
        for piece, (text, num_tokens) in enumerate(cut(document.text, count_tokens, context_length)):
            if sample is not None and join and piece == 0:
                joined = sample.text + SEPARATOR + text
                # Count the joined text: its tokens need not be the sum over its parts.
                if (joined_tokens := count_tokens(joined)) <= context_length:
                    sample = PackedText(sample.key, joined, joined_tokens)
                    continue
            if sample is not None:
                yield sample
            sample = PackedText(f"{document.file:05d}-{document.line:09d}-{piece:05d}", text, num_tokens)
    if sample is not None:
        yield sample


def cut(text: str, count_tokens: CountTokens, context_length: int) -> Iterator[tuple[str, int]]:
    """Yield the pieces of a text, each as long as `context_length` tokens allow, with their numbers of tokens.

    A piece ends at the end of a sentence if that keeps at least `LEAST_FILL` of its characters, else at the end of a
    word. A single word that is too long is cut inside.

    Raises: ValueError if not even one character fits.
    """
    start = 0
    while start < len(text):
        # Search in a window, so that the cost does not grow with the square of the text's length.
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
    """Return the last of ascending `ends` up to which the text fits, and its number of tokens; (0, 0) if none fits.

    This is an interpolation search, since tokens are spread nearly evenly over a text: it needs three or four counts,
    a binary search eight.
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
    """Return the end of the last sentence if it keeps at least `LEAST_FILL` of the text, else the text's length."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return ends[-1] if ends and ends[-1] >= LEAST_FILL * len(text) else len(text)
