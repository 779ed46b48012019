"""Tokenizers: one interface to those of open_clip, Hugging Face and local files."""

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
"""Limits on the word cache, which keep it within some tens of MB for any texts."""

_MIN_CHARACTERS = 1 << 14
_CHARACTERS_PER_TOKEN = 64
# Entities of an ampersand. Cleaning passes over the text once per level of nesting.
_AMPERSAND = r"(?:amp|#0{0,20}38|#x0{0,20}26);"


def _beginning(text: str, context_length: int) -> str:
    """Cut a text to the part that yields its first `context_length` tokens: 64 characters per token, at least 16,384.

    Crawled texts can be megabytes long, and a tokenizer would encode all of one to keep its first tokens.
    """
    return text[: max(_MIN_CHARACTERS, _CHARACTERS_PER_TOKEN * context_length)]


def _cleanable(text: str, context_length: int) -> str:
    """Cut a text as `_beginning` does, and limit its nested ampersand entities to `context_length` levels."""
    nested = f"(&(?:{_AMPERSAND}){{{context_length}}})(?:{_AMPERSAND})+"
    return re.sub(nested, r"\1", _beginning(text, context_length), flags=re.IGNORECASE)


# Python refuses to parse decimal numbers of more than 4,300 digits; code points have at most seven.
_REFERENCE = re.compile(r"(&#)0*([0-9]{1,8})[0-9]*|(&#[xX])0*([0-9a-fA-F]{1,8})[0-9a-fA-F]*")


def _unescaped(text: str) -> str:
    """Apply `html.unescape` with character references of any length; invalid ones become U+FFFD."""
    return html.unescape(_REFERENCE.sub(r"\1\2\3\4", text))


_CLEANING: dict[str, Callable[[str], str]] = {
    "whitespace": whitespace_clean,
    "lower": lambda text: whitespace_clean(text).lower(),
    "canonicalize": canonicalize_text,
}


def _cleaned(text: str, how: str, context_length: int) -> str:
    """Cut and clean a text as open_clip does: fix encodings, unescape HTML entities, then apply the cleaning `how`."""
    mended = ftfy.fix_text(_cleanable(text, context_length))
    return _CLEANING[how](_unescaped(_unescaped(mended)).strip())


class Tokenizer(Protocol):
    """Interface of a tokenizer to the data loading and the evaluators.

    `pad_id`, `end_id` and `mask_id` are None if there is no such token. The last token of a text is the end token.
    A tokenizer that knows word boundaries also has `word_starts`, which maps token ids, int64 [n, L], to bool [n, L]
    and is used to mask whole words. Special tokens count as words of their own.
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
        """Tokenize texts. Returns (ids, int64 [n, longest]; lengths, int64 [n]); ids beyond the length are padding."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens."""
        ...


class ClipTokenizer:
    """CLIP's byte-pair encoding, from open_clip: start token, text, end token, zero padding.

    Args:
        context_length: maximum number of tokens; longer texts are cut, and still end with the end token.
    """

    def __init__(self, context_length: int = 77) -> None:
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}; expected at least 3: start, one token, end")
        self._bpe = SimpleTokenizer()
        self._bpe.clean_fn = str  # its input is already cleaned
        self._first_words = dict(self._bpe.cache)  # the special tokens
        self._bpe_of_short, self._bpe.bpe = self._bpe.bpe, self._byte_pairs
        self._known_words: dict[str, list[int]] = {}
        self.context_length = context_length
        self.vocab_size: int = self._bpe.vocab_size
        self.pad_id: int | None = None
        self.mask_id: int | None = None
        self.end_id: int = self._bpe.eot_token_id
        # The last token of a word ends in "</w>".
        special = set(self._bpe.all_special_ids)
        self._ends_word = torch.tensor(
            [self._bpe.decoder[i].endswith("</w>") or i in special for i in range(self.vocab_size)]
        )

    def _byte_pairs(self, word: str) -> str:
        """Return the tokens of a word joined by spaces, like open_clip's `bpe`, in O(n log n) instead of O(n^2) time."""
        if len(word) <= _MAX_KNOWN_LENGTH:
            return self._bpe_of_short(word)
        return " ".join(_merged([*word[:-1], f"{word[-1]}</w>"], self._bpe.bpe_ranks))

    def _encode(self, text: str) -> list[int]:
        text = _beginning(text, self.context_length)
        # Cleaning fixes encodings, HTML entities and control characters, so plain ASCII needs none.
        is_plain = text.isascii() and text.isprintable() and "&" not in text
        # No token spans a space, so words are encoded one by one and cached.
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
        """Tokenize texts. Returns (ids, int64 [n, longest]; lengths, int64 [n]); lengths count start and end tokens."""
        return _padded([self._encode(text) for text in texts], 0)

    def word_starts(self, ids: Tensor) -> Tensor:
        """Mark the first token of each word: token ids, int64 [n, L], to bool [n, L]."""
        return F.pad(self._ends_word[ids[:, :-1]], (1, 0), value=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens."""
        return self._bpe.decode([i for i in ids if i not in self._bpe.all_special_ids]).strip()


def _merged(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair encoding to `pieces`: repeatedly merge all pairs of the lowest rank, from left to right."""
    before, behind = list(range(-1, len(pieces) - 1)), list(range(1, len(pieces) + 1))
    pairs: list[tuple[int, int, str, str]] = []  # rank, index of the left piece, both pieces

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
                continue  # stale: one of the pieces has been merged since
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
    """Raise ValueError if a text's last token is not the end token, whose state represents the text."""
    if not ids or ids[-1] != end_id:
        raise ValueError(
            f"{where} does not end a text with {end}; expected a tokenizer that does (its post_processor adds it), such as "
            "python -m data_tools tokenizer makes"
        )


class FileTokenizer:
    """Tokenizer of the `tokenizers` library in a local file, such as `python -m data_tools tokenizer` writes.

    Args:
        path: a tokenizer.json, or a folder that contains one.
        context_length: maximum number of tokens; longer texts are cut, and keep their special tokens.
        pad, end, mask: text of the padding, end and mask token.

    Raises: ValueError if the file is missing, if the tokenizer has no padding or end token, or if it does not end texts
        with the end token.
    """

    def __init__(
        self, path: str, context_length: int = 77, pad: str = "[PAD]", end: str = "[EOS]", mask: str = "[MASK]"
    ) -> None:
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"data.tokenizer.path is {path!r}; expected a tokenizer.json or a folder with one")
        self.file = file
        self.pad, self.end = pad, end
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
        """Tokenize texts. Returns (ids, int64 [n, longest]; lengths, int64 [n]); lengths count special tokens."""
        cut = [_beginning(text, self.context_length) for text in texts]
        return _padded([encoding.ids for encoding in self._tokenizer.encode_batch(cut)], self.pad_id)

    def word_starts(self, ids: Tensor) -> Tensor:
        """Mark the first token of each word: token ids, int64 [n, L], to bool [n, L]."""
        return self._words(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


_NEW_LINES = ("\n", "\t", "Ċ", "ĉ", "<0x0A>")  # in plain text, byte-level BPE and byte fallback


_MAX_IDS_PER_TOKEN = 100  # bounds the lookup tables, which are as long as the largest id


class _Words:
    """Word starts of token ids, derived from the spelling of the vocabulary's tokens: `##ing`, `Ġword` or `▁word`."""

    def __init__(self, vocabulary: Mapping[str, int], special: Sequence[int]) -> None:
        if max(vocabulary.values()) > _MAX_IDS_PER_TOKEN * len(vocabulary):
            raise ValueError(
                f"the tokenizer has ids up to {max(vocabulary.values())} for {len(vocabulary)} tokens; "
                "expected consecutive ids"
            )
        continues = any(token.startswith("##") for token in vocabulary)
        starts = torch.ones(max(vocabulary.values()) + 1, dtype=torch.bool)
        for token, number in vocabulary.items():
            starts[number] = not token.startswith("##") if continues else token.startswith(("Ġ", "▁", "Ċ"))
        self._ends = torch.zeros_like(starts)
        self._ends[list(special)] = True
        self._starts = starts | self._ends
        # A new line or tab ends a word, too: the token after it is spelled like the continuation of a word.
        self._ends[[number for token, number in vocabulary.items() if token.endswith(_NEW_LINES)]] = True

    def __call__(self, ids: Tensor) -> Tensor:
        return self._starts[ids] | F.pad(self._ends[ids[:, :-1]], (1, 0), value=True)


class HuggingFaceTokenizer:
    """Tokenizer of Hugging Face's `transformers`, with texts cleaned and cut as in open_clip.

    Args:
        name: name on the hub, or a local folder.
        context_length: maximum number of tokens; longer texts are cut.
        clean: open_clip's cleaning of the texts: `whitespace`, `lower` or `canonicalize`.

    Raises: ValueError if `transformers` is not installed, the tokenizer cannot be loaded, `clean` is unknown, or the
        tokenizer adds no end token.
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
        self.clean = clean
        self.context_length = context_length
        self.vocab_size: int = len(self._tokenizer)
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.mask_id: int | None = self._tokenizer.mask_token_id
        ends = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self.end_id: int | None = next((number for number in ends if number is not None), None)
        _check_end(self._tokenizer("a")["input_ids"], self.end_id, "an end token", name)
        self._words = _Words(self._tokenizer.get_vocab(), self._tokenizer.all_special_ids)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize texts. Returns (ids, int64 [n, longest]; lengths, int64 [n]); lengths count special tokens."""
        cleaned = [_cleaned(text, self.clean, self.context_length) for text in texts]
        encoded = self._tokenizer(cleaned, max_length=self.context_length, truncation=True)["input_ids"]
        return _padded(encoded, self.pad_id or 0)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, which `transformers` reads, with `context_length` as the largest length."""
        self._tokenizer.model_max_length = self.context_length
        self._tokenizer.save_pretrained(folder)

    def word_starts(self, ids: Tensor) -> Tensor:
        """Mark the first token of each word: token ids, int64 [n, L], to bool [n, L]."""
        return self._words(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def tokenizer_files(path: Path) -> dict[str, Path]:
    """Return the files of a local tokenizer by the file names to use for a copy in another folder."""
    if path.is_file():
        return {"tokenizer.json": path}
    return {file.name: file for file in sorted(path.iterdir()) if file.suffix in (".json", ".txt", ".model")}


def tokenizer_of(name: str | None = None, path: str | None = None, context_length: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model, or a local tokenizer.

    Args:
        name: open_clip model that uses the tokenizer; None for CLIP's tokenizer.
        path: a local tokenizer.json, or a folder with one or with the output of Hugging Face's `save_pretrained`. It
            takes precedence over `name`.
        context_length: maximum number of tokens; longer texts are cut. None uses the model's, or 77.

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
