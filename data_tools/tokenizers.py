"""Training of tokenizers on local texts, with the `tokenizers` library."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_tools.documents import MAX_TEXT_BYTES, decode_line, read_lines
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import decode_captions
from mmpretrain.data.pairs import SURROGATE, Table, caption_texts, read_pairs
from mmpretrain.data.shards import Shards, expand_shards

MAX_PIECE_CHARACTERS = 1 << 12
"""Limit for a piece of training text. Training time grows with the square of the length of a word."""
SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]")


def read_texts(source: str, caption: str) -> Iterator[str | BadSample]:
    """Yield the texts of a `.txt` file (one per line), of a table's caption columns, or of tars' captions.

    An unreadable text is replaced by a BadSample with the reason.

    Args:
        source: a `.txt` file, a table, or a pattern of tars.
        caption: columns of a table, separated by commas; or field of the tars, `txt` or `json.<field>`.

    Raises: ValueError for a missing source or column.
    """
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        yield from _lines(path)
    elif path.suffix in (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet"):
        yield from _table_captions(read_pairs(path), [column.strip() for column in caption.split(",")])
    else:
        yield from _tar_captions(Shards(expand_shards(source)), caption)


def _lines(path: Path) -> Iterator[str | BadSample]:
    for data in read_lines(path, MAX_TEXT_BYTES):
        text = decode_line(data)
        if isinstance(text, BadSample):
            yield text
        else:
            yield from (line for line in text.splitlines() if line.strip())


def _table_captions(table: Table, columns: Sequence[str]) -> Iterator[str | BadSample]:
    for column in columns:
        table.require(column, "--caption")
    yield from (text for row in table.rows for text in caption_texts(row, columns))
    yield from (BadSample(f"row {number}: {reason}") for number, reason in table.refused)


def _tar_captions(shards: Shards, field: str) -> Iterator[str | BadSample]:
    for sample in range(shards.num_samples):
        try:
            captions = decode_captions(shards.read(sample, (field.split(".")[0],)), field)
        except BadSample as error:
            yield error
            continue
        yield from captions


def usable_texts(texts: Iterable[str | BadSample], left_out: list[str], cut_words: list[str]) -> Iterator[str]:
    """Yield usable texts, in pieces of at most `MAX_PIECE_CHARACTERS`.

    A piece ends before a space, which does not affect the tokenizer, or inside a word that is longer than a piece.

    Args:
        texts: texts, or reasons why they are unreadable.
        left_out: receives the reason for each unusable text.
        cut_words: receives the first 40 characters of each text that is cut inside a word.
    """
    for text in texts:
        if isinstance(text, BadSample):
            left_out.append(str(text))
        elif SURROGATE.search(text):
            left_out.append("a text is no valid Unicode: it has half a surrogate pair")
        else:
            pieces = list(_pieces(text))
            if any(not piece.startswith(" ") for piece in pieces[1:]):
                cut_words.append(text[:40])
            yield from pieces


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > MAX_PIECE_CHARACTERS:
        space = text.rfind(" ", start + 1, start + MAX_PIECE_CHARACTERS + 1)
        end = space if space != -1 else start + MAX_PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def train_tokenizer(texts: Iterator[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Radford et al. 2019), which has no unknown tokens. Training is deterministic.

    A text becomes `[BOS] ... [EOS]`. The id of `[PAD]` is 0; `[MASK]` is reserved for masked language modelling.

    Raises: ValueError if there are no texts, or if `vocab_size` is below the number of bytes and special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size is {vocab_size}; expected at least {smallest}: bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    cleaning: Sequence[normalizers.Normalizer] = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(list(cleaning))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    first = next(texts, None)
    if first is None:
        raise ValueError("no text to train on; expected lines, rows or samples with captions")
    tokenizer.train_from_iterator(_chained(first, texts), trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", pair="[BOS] $A $B [EOS]", special_tokens=ends
    )
    return tokenizer


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
