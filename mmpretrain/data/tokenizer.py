"""Text -> token ids and their number: open_clip's, Hugging Face's and local tokenizers behind one small interface."""

import heapq
import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer, canonicalize_text, whitespace_clean
from tokenizers import Tokenizer as TokenizersTokenizer
from torch import Tensor

_MAX_KNOWN_WORDS = 1 << 18
_MAX_KNOWN_LENGTH = 64
"""What is remembered of words stays within some tens of MB, whatever the texts."""

_MIN_CHARACTERS = 1 << 14
_CHARACTERS_PER_TOKEN = 64
# The entities of an ampersand. Cleaning takes a pass over the text for each one that is nested in another.
_AMPERSAND = r"(?:amp|#0{0,20}38|#x0{0,20}26);"


def _beginning(text: str, context_length: int) -> str:
    """As much of a text as its first `context_length` tokens can come from: 64 characters a token, at least 16,384.

    Texts of crawled data are up to megabytes long, of which a tokenizer would encode all to keep the first tokens.
    """
    return text[: max(_MIN_CHARACTERS, _CHARACTERS_PER_TOKEN * context_length)]


def _cleanable(text: str, context_length: int) -> str:
    """The beginning of a text, with no more ampersands nested in each other than it has tokens."""
    nested = f"(&(?:{_AMPERSAND}){{{context_length}}})(?:{_AMPERSAND})+"
    return re.sub(nested, r"\1", _beginning(text, context_length), flags=re.IGNORECASE)


# Python refuses to read a decimal number of more than 4,300 digits, and no character has one of more than seven.
_REFERENCE = re.compile(r"(&#)0*([0-9]{1,8})[0-9]*|(&#[xX])0*([0-9a-fA-F]{1,8})[0-9a-fA-F]*")


def _unescaped(text: str) -> str:
    """`html.unescape` that reads character references of any length; what is no character becomes U+FFFD."""
    return html.unescape(_REFERENCE.sub(r"\1\2\3\4", text))


_CLEANING: dict[str, Callable[[str], str]] = {
    "whitespace": whitespace_clean,
    "lower": lambda text: whitespace_clean(text).lower(),
    "canonicalize": canonicalize_text,
}


def _cleaned(text: str, how: str, context_length: int) -> str:
    """The beginning of a text, cleaned as open_clip does: encodings and HTML entities mended, then `how`."""
    mended = ftfy.fix_text(_cleanable(text, context_length))
    return _CLEANING[how](_unescaped(_unescaped(mended)).strip())


class Tokenizer(Protocol):
    """What the data path and the evaluators ask of a tokenizer.

    `pad_id`, `end_id` and `mask_id` are None where it has no such token. A text's last token is the end token. One that
    knows where words begin also has `word_starts`: token ids int64 [n, L] -> bool [n, L], special tokens words of their
    own; whole words are masked by it.
    """

    context_length: int
    vocab_size: int

    @property
    def pad_id(self) -> int | None: ...

    @property
    def end_id(self) -> int | None: ...

    @property
    def mask_id(self) -> int | None: ...

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids int64 [n, longest], lengths int64 [n]); ids beyond a text's length are padding."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for, special tokens left out."""
        ...


class ClipTokenizer:
    """CLIP's byte-pair encoding, as open_clip ships it: start token, text, end token, zeros.

    Args:
        context_length: longer texts are cut to this many tokens, the last of which is the end token.
    """

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}; expected at least 3: start, one token, end")
        self._bpe = SimpleTokenizer()
        self._bpe.clean_fn = str  # it is given words of texts already cleaned
        self._first_words = dict(self._bpe.cache)  # the special tokens
        self._bpe_of_short, self._bpe.bpe = self._bpe.bpe, self._byte_pairs
        self._known_words: dict[str, list[int]] = {}
        self.context_length = context_length
        self.vocab_size: int = self._bpe.vocab_size
        self.pad_id: int | None = None
        self.mask_id: int | None = None
        self.end_id: int = self._bpe.eot_token_id
        # Of its tokens the last one of a word says so.
        special = set(self._bpe.all_special_ids)
        self._ends_word = torch.tensor(
            [self._bpe.decoder[i].endswith("</w>") or i in special for i in range(self.vocab_size)]
        )

    def _byte_pairs(self, word: str) -> str:
        """What open_clip's `bpe` gives, the tokens of a word joined by spaces, in time n log n instead of n squared."""
        if len(word) <= _MAX_KNOWN_LENGTH:
            return self._bpe_of_short(word)
        return " ".join(_merged([*word[:-1], f"{word[-1]}</w>"], self._bpe.bpe_ranks))

    def _encode(self, text: str) -> list[int]:
        text = _beginning(text, self.context_length)
        # Cleaning mends encodings, HTML entities and control characters: it finds nothing to do in plain ASCII.
        is_plain = text.isascii() and text.isprintable() and "&" not in text
        # No token reaches over a space, so that words are encoded one by one and remembered.
        words = (text.lower() if is_plain else _cleaned(text, "lower", self.context_length)).split()
        ids = [self._bpe.sot_token_id]
        for word in words:
            if len(ids) >= self.context_length:
                break
            ids += self._word_ids(word)
        return [*ids[: self.context_length - 1], self._bpe.eot_token_id]

    def _word_ids(self, word: str) -> list[int]:
        ids = self._known_words.get(word)
        if ids is None and len(word) > _MAX_KNOWN_LENGTH:
            return self._bpe.encode(word)
        if ids is None:
            if len(self._known_words) >= _MAX_KNOWN_WORDS:
                self._known_words.clear()
                self._bpe.cache = dict(self._first_words)
            ids = self._known_words[word] = self._bpe.encode(word)
        return ids

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids int64 [n, longest], lengths int64 [n]); lengths count the start and end tokens."""
        return _padded([self._encode(text) for text in texts], 0)

    def word_starts(self, ids: Tensor) -> Tensor:
        """Token ids int64 [n, L] -> where a word begins, bool [n, L]."""
        return F.pad(self._ends_word[ids[:, :-1]], (1, 0), value=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for, special tokens left out."""
        return self._bpe.decode([i for i in ids if i not in self._bpe.all_special_ids]).strip()


def _merged(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of `pieces`: all pairs of the lowest rank are merged, from left to right, and so on."""
    before, behind = list(range(-1, len(pieces) - 1)), list(range(1, len(pieces) + 1))
    pairs: list[tuple[int, int, str, str]] = []  # rank, where the first one stands, what both are

    def consider(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces) and (rank := ranks.get((pieces[left], pieces[right]))) is not None:
            heapq.heappush(pairs, (rank, left, pieces[left], pieces[right]))

    for left in range(len(pieces) - 1):
        consider(left, left + 1)
    while pairs:
        rank, merged = pairs[0][0], []
        while pairs and pairs[0][0] == rank:
            _, left, first, second = heapq.heappop(pairs)
            right = behind[left]
            if right == len(pieces) or (pieces[left], pieces[right]) != (first, second):
                continue  # one of them has become part of another
            pieces[left], pieces[right] = first + second, ""
            behind[left] = behind[right]
            if behind[left] < len(pieces):
                before[behind[left]] = left
            merged.append(left)
        for left in merged:
            consider(before[left], left)
            consider(left, behind[left])
    return [piece for piece in pieces if piece]


def _check_end(ids: Sequence[int], end_id: int | None, end: str, where: str) -> None:
    """Raises: ValueError where a text's last token is not the end token, whose state stands for the text."""
    if not ids or ids[-1] != end_id:
        raise ValueError(
            f"{where} does not end a text with {end}; expected a tokenizer that does (its post_processor adds it), such as "
            "python -m data_tools tokenizer makes"
        )


class FileTokenizer:
    """A tokenizer of the `tokenizers` library in a local file, such as `python -m data_tools tokenizer` writes.

    Args:
        path: its tokenizer.json, or the folder that holds one.
        context_length: longer texts are cut to this many tokens; the special tokens that it adds stay.
        pad, end, mask: the texts of these tokens, where they are not `[PAD]`, `[EOS]` and `[MASK]`.

    Raises: ValueError if there is no such file, or it has no padding or end token, or
        does not end a text with it.
    """

    def __init__(
        self, path: str, context_length: int = 77, pad: str = "[PAD]", end: str = "[EOS]", mask: str = "[MASK]"
    ) -> None:
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"data.tokenizer.path is {path!r}; expected a tokenizer.json or a folder with one")
        self._tokenizer = TokenizersTokenizer.from_file(str(file))
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.no_padding()
        self.context_length = context_length
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.pad_id, self.end_id = (self._special(file, text, key) for text, key in ((pad, "pad"), (end, "end")))
        self.mask_id: int | None = self._tokenizer.token_to_id(mask)
        _check_end(self._tokenizer.encode("a").ids, self.end_id, end, str(file))
        special = [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        self._words = _Words(self._tokenizer.get_vocab(), special)

    def _special(self, file: Path, text: str, key: str) -> int:
        number = self._tokenizer.token_to_id(text)
        if number is None:
            raise ValueError(f"{file} has no token {text!r}; name its own one: data.tokenizer.{key}=...")
        return int(number)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids int64 [n, longest], lengths int64 [n]); lengths count the special tokens."""
        cut = [_beginning(text, self.context_length) for text in texts]
        return _padded([encoding.ids for encoding in self._tokenizer.encode_batch(cut)], self.pad_id)

    def word_starts(self, ids: Tensor) -> Tensor:
        """Token ids int64 [n, L] -> where a word begins, bool [n, L]."""
        return self._words(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


_NEW_LINES = ("\n", "\t", "Ċ", "ĉ", "<0x0A>")  # as texts, byte-level BPE and byte fallback write them


_MAX_IDS_PER_TOKEN = 100  # tables are as long as the largest id


class _Words:
    """Where words begin, from how the tokens of a vocabulary are written: `##ing`, `Ġword` or `▁word`."""

    def __init__(self, vocabulary: Mapping[str, int], special: Sequence[int]) -> None:
        if max(vocabulary.values()) > _MAX_IDS_PER_TOKEN * len(vocabulary):
            raise ValueError(
                f"the tokenizer has ids up to {max(vocabulary.values())} for {len(vocabulary)} tokens; expected ids in a row"
            )
        continues = any(token.startswith("##") for token in vocabulary)
        starts = torch.ones(max(vocabulary.values()) + 1, dtype=torch.bool)
        for token, number in vocabulary.items():
            starts[number] = not token.startswith("##") if continues else token.startswith(("Ġ", "▁", "Ċ"))
        self._ends = torch.zeros_like(starts)
        self._ends[list(special)] = True
        self._starts = starts | self._ends
        # A new line ends a word, too: what follows it is written as what goes on inside one.
        self._ends[[number for token, number in vocabulary.items() if token.endswith(_NEW_LINES)]] = True

    def __call__(self, ids: Tensor) -> Tensor:
        return self._starts[ids] | F.pad(self._ends[ids[:, :-1]], (1, 0), value=True)


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's `transformers`, cleaned and cut as open_clip does.

    Args:
        name: of the hub, or a local folder.
        context_length: longer texts are cut to this many tokens.
        clean: open_clip's way to clean texts first: `whitespace`, `lower` or `canonicalize`.

    Raises: ValueError if `transformers` is not installed or has no such tokenizer, or it adds no end token.
    """

    def __init__(self, name: str, context_length: int = 77, clean: str = "whitespace") -> None:
        try:
            from transformers import AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (ImportError, OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(
                f"data.tokenizer: {name!r} cannot be loaded ({first_line}); expected a local folder or a name that "
                "Hugging Face's hub gives, with `pip install transformers`"
            ) from error
        if clean not in _CLEANING:
            raise ValueError(f"clean is {clean!r}; expected one of {', '.join(_CLEANING)}")
        self._clean = clean
        self.context_length = context_length
        self.vocab_size: int = len(self._tokenizer)
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.mask_id: int | None = self._tokenizer.mask_token_id
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self.end_id: int | None = next((number for number in ends if number is not None), None)
        _check_end(self._tokenizer("a")["input_ids"], self.end_id, "an end token", name)
        self._words = _Words(self._tokenizer.get_vocab(), self._tokenizer.all_special_ids)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids int64 [n, longest], lengths int64 [n]); lengths count the special tokens."""
        cleaned = [_cleaned(text, self._clean, self.context_length) for text in texts]
        encoded = self._tokenizer(cleaned, max_length=self.context_length, truncation=True)["input_ids"]
        return _padded(encoded, self.pad_id or 0)

    def word_starts(self, ids: Tensor) -> Tensor:
        """Token ids int64 [n, L] -> where a word begins, bool [n, L]."""
        return self._words(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def tokenizer_files(path: Path) -> dict[str, Path]:
    """The files that a local tokenizer consists of, by the names under which another folder may keep them."""
    if path.is_file():
        return {"tokenizer.json": path}
    return {file.name: file for file in sorted(path.iterdir()) if file.suffix in (".json", ".txt", ".model")}


def tokenizer_of(name: str | None = None, path: str | None = None, context_length: int | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        name: a model of open_clip, whose tokenizer it is; None for CLIP's own.
        path: a local tokenizer.json, or a folder with one or with what Hugging Face's `save_pretrained` writes; it
            goes before the name's.
        context_length: longer texts are cut to this many tokens; None: the model's, or 77.

    Raises: ValueError if it cannot be loaded.
    """
    config = {} if name is None else (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    length = context_length or config.get("context_length", 77)
    if path is not None:
        is_hugging_face = Path(path, "tokenizer_config.json").is_file()
        return HuggingFaceTokenizer(path, length) if is_hugging_face else FileTokenizer(path, length)
    if (of_hub := config.get("hf_tokenizer_name")) is not None:
        settings = config.get("tokenizer_kwargs") or {}
        if unknown := sorted(set(settings) - {"clean"}) or config.get("tokenizer_mode"):
            raise ValueError(
                f"the tokenizer of {name} asks for {unknown}, which is not supported; give data.tokenizer.path"
            )
        return HuggingFaceTokenizer(of_hub, length, **settings)
    return ClipTokenizer(length)


def _padded(encoded: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    lengths = [len(ids) for ids in encoded]
    longest = max(lengths)
    rows = np.array([[*ids, *[pad_id] * (longest - len(ids))] for ids in encoded], dtype=np.int64)
    return torch.from_numpy(rows), torch.tensor(lengths)
