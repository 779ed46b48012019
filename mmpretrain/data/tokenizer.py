"""Text -> token ids and their number: open_clip's tokenizers behind one small interface."""

from collections.abc import Sequence
from typing import Protocol

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor


class Tokenizer(Protocol):
    """What the data path and the evaluators ask of a tokenizer."""

    context_length: int
    vocab_size: int

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
        self.context_length = context_length
        self.vocab_size: int = self._bpe.vocab_size

    def _encode(self, text: str) -> list[int]:
        ids = [self._bpe.sot_token_id, *self._bpe.encode(text)][: self.context_length - 1]
        return [*ids, self._bpe.eot_token_id]

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids int64 [n, longest], lengths int64 [n]); lengths count the start and end tokens."""
        encoded = [self._encode(text) for text in texts]
        lengths = torch.tensor([len(ids) for ids in encoded])
        ids = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.int64)
        for row, tokens in zip(ids, encoded, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for, special tokens left out."""
        return self._bpe.decode([i for i in ids if i not in self._bpe.all_special_ids]).strip()
