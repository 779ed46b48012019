"""Command `build-text`: build shuffled, equal-sized WebDataset shards of packed documents from plain text and JSONL.

The build takes two passes. Documents are first packed in input order into an unnamed file in the output folder; shards
then take their samples from it in shuffled order. Memory holds a few documents at a time (a whole file if each file is
a document) and about 40 bytes per sample for the shuffle: 0.6 GB for a billion tokens in 14 million samples. Tokenizers
also cache the words that they encode.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

from data_tools.documents import Document, RefusedDocument, read_documents, text_files
from data_tools.output import REFUSALS, check_output, close_output, locked_output, open_output, write_refusals
from data_tools.packing import CountTokens, PackedText, pack
from data_tools.pool import run_tasks
from data_tools.shard_writer import WrittenShard, finish_shard
from data_tools.spool import Spool
from mmpretrain.data.tokenizer import tokenizer_of
from mmpretrain.seeds import hash64, permutation

CHARACTERS_PER_TASK = 1 << 16
"""Size of the groups that documents are packed in, for any number of workers. Only a group's last sample is not full."""
_COUNTED_TOKENS = 1 << 20  # exceeds the length of any text that is counted


@dataclass(frozen=True)
class TextOptions:
    """Options that, together with the text, determine the bytes of the shards; `tokenizer` None is CLIP's."""

    field: str = "text"
    document: str = "paragraph"
    tokenizer: Path | None = None
    context_length: int = 77
    pack: bool = True
    samples_per_shard: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class TextResult:
    """Result of a build; `num_tokens` includes special tokens."""

    shards: list[WrittenShard]
    num_documents: int
    num_refused: int
    num_tokens: int

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


def build_text(inputs: Sequence[str], output: Path, options: TextOptions, workers: int) -> TextResult:
    """Build shards of documents in `output`. An earlier build there is replaced, and a killed one is finished.

    Raises: ValueError for an unusable input, tokenizer or folder, or if no document is accepted.
    """
    files = text_files(inputs, output)
    check_output(output, [REFUSALS])
    _token_counter(options.tokenizer)  # report an invalid tokenizer before reading any text
    with locked_output(output, [REFUSALS]):
        return _build_text(inputs, files, output, options, workers)


def _build_text(
    inputs: Sequence[str], files: Sequence[Path], output: Path, options: TextOptions, workers: int
) -> TextResult:
    """Build shards in a locked folder."""
    num_documents = num_tokens = 0
    with Spool(output) as packed, Spool(output) as refused:
        tasks = _groups(files, options, refused)
        for documents, samples in run_tasks(partial(_pack_group, options), tasks, workers, "packing documents"):
            num_documents += documents
            for sample in samples:
                num_tokens += sample.num_tokens
                packed.append(f"{sample.key}\n{sample.text}".encode())
        if not len(packed):
            first = f"the first is refused because: {json.loads(refused[0])['reason']}; " if len(refused) else ""
            raise ValueError(
                f"INPUT {' '.join(inputs)}: no document in {len(files)} files; {first}expected at least one"
            )
        parts = open_output(output, _plan(packed, options), len(packed), options.samples_per_shard, [REFUSALS])
        write_refusals(output, (record.decode("utf-8", "surrogatepass") for record in refused))
        order = permutation(hash64("build-text", options.seed), len(packed))
        shards = (ShardTask(path, [packed[i] for i in order[low:high]]) for path, low, high in parts)
        result = TextResult(
            shards=list(run_tasks(_finish_shard, shards, workers, "writing shards")),
            num_documents=num_documents,
            num_refused=len(refused),
            num_tokens=num_tokens,
        )
    close_output(
        output,
        result.shards,
        {
            "files": [str(file) for file in files],
            "num_documents": result.num_documents,
            "num_refused": result.num_refused,
            "num_tokens": result.num_tokens,
            "options": _options_json(options),
        },
        [REFUSALS],
    )
    return result


def _options_json(options: TextOptions) -> dict[str, object]:
    return asdict(options) | {"tokenizer": options.tokenizer.name if options.tokenizer else None}


def _plan(packed: Spool, options: TextOptions) -> str:
    """Return a hash (hex) of everything that determines the shards' bytes."""
    plan = hashlib.sha256(json.dumps(_options_json(options)).encode())
    for record in packed:
        plan.update(len(record).to_bytes(8, "little") + record)
    return plan.hexdigest()


# ---------------------------------------------------------------- packing


def _groups(files: Sequence[Path], options: TextOptions, refused: Spool) -> Iterator[list[Document]]:
    """Yield groups of consecutive documents with `CHARACTERS_PER_TASK` or more characters; append refusals to `refused`."""
    group: list[Document] = []
    num_characters = 0
    for document in read_documents(files, options.field, options.document):
        if isinstance(document, RefusedDocument):
            refused.append(json.dumps(asdict(document), ensure_ascii=False).encode("utf-8", "surrogatepass"))
            continue
        group.append(document)
        num_characters += len(document.text)
        if num_characters >= CHARACTERS_PER_TASK:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _pack_group(options: TextOptions, documents: Sequence[Document]) -> tuple[int, list[PackedText]]:
    """Return the number of documents and their packed samples."""
    count_tokens = _token_counter(options.tokenizer)
    return len(documents), list(pack(documents, count_tokens, options.context_length, options.pack))


@lru_cache(maxsize=1)
def _token_counter(path: Path | None) -> CountTokens:
    """Return a function that counts a text's tokens, special tokens included, as training does. Raises: ValueError."""
    try:
        tokenizer = tokenizer_of(path=None if path is None else str(path), context_length=_COUNTED_TOKENS)
    except Exception as error:  # the tokenizers library raises a plain Exception for unreadable files
        raise ValueError(f"--tokenizer {str(path)!r}: {error}") from error
    return lambda text: int(tokenizer([text])[1])


# ---------------------------------------------------------------- shards


@dataclass(frozen=True)
class ShardTask:
    """Path and sample records of a shard. A record is the key, a line end and the text."""

    path: Path
    records: list[bytes]


def _finish_shard(task: ShardTask) -> WrittenShard:
    return finish_shard(task.path, _members(task), len(task.records))


def _members(task: ShardTask) -> Iterator[dict[str, str | bytes]]:
    for record in task.records:
        key, _, text = record.partition(b"\n")
        yield {"__key__": key.decode(), "txt": text}
