"""Training a tokenizer on one's own texts, with the `tokenizers` library."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_tools.documents import MAX_TEXT_BYTES, decode_line, read_lines
from data_tools.tables import SURROGATE, Table, caption_text, read_pairs
from mmpretrain.data.decode import BadSample, decode_captions
from mmpretrain.data.shards import Shards, expand_shards

MAX_PIECE_CHARACTERS = 1 << 12
"""Of what is trained on at once: the time for a word without end grows with the square of its length."""
SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]")


def read_texts(source: str, caption: str) -> Iterator[str | BadSample]:
    """The texts of a `.txt` file (a line each), a table's caption columns, or tars' captions (`txt`, `json.<field>`).

    In place of one that cannot be read stands the reason.

    Raises: ValueError for a source or column that is not there.
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
    yield from (text for row in table.rows if (text := caption_text(row, columns)))
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
    """The texts that a tokenizer can be trained on, in pieces of at most `MAX_PIECE_CHARACTERS`.

    A piece ends before a space, which changes nothing for the tokenizer, or inside a word that is longer than a piece.

    Args:
        left_out: where the reason goes why a text cannot be used.
        cut_words: where the beginnings of texts go that have been cut inside a word.
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
    """Byte-level BPE (Radford et al. 2019): no text has unknown tokens. The same texts give the same tokenizer.

    A text becomes `[BOS] ... [EOS]`; `[PAD]` is 0, and `[MASK]` stands ready for masked language modelling.

    Raises: ValueError if there are no texts, or fewer ids than bytes and special tokens.
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
