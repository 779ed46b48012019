"""Command `build`: build shuffled, equal-sized WebDataset shards from image-text pairs, reproducible to the byte."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

from data_tools.classes import MAX_INTEGER_CLASSES, Classes, classes_of, one_line, read_classes, write_classes
from data_tools.images import ImageOptions, check_image, encode_image, read_image
from data_tools.output import CLASSES, REFUSALS, close_output, locked_output, open_output, write_refusals
from data_tools.pool import run_tasks
from data_tools.samples import Refusal, Sample, accept_rows, key_problem
from data_tools.shard_writer import WrittenShard, delete_shard, file_sha256, finish_shard
from data_tools.torchvision_sets import read_torchvision
from mmpretrain.data.coco import read_coco
from mmpretrain.data.decode import BadSample
from mmpretrain.data.image_root import ImageRoot
from mmpretrain.data.pairs import Table, caption_texts, read_pairs
from mmpretrain.seeds import hash64, permutation

ROWS_PER_CHECK = 64
TEMPLATE = "a photo of a {}"
_PICTURES = ".torchvision"  # folder in the output, so that the paths are those of the build that was killed

FileState = tuple[int, int]
"""Size in bytes and modification time in ns of a file that was read."""


@dataclass(frozen=True)
class BuildOptions:
    """Options that, together with the pairs, determine the bytes of the shards.

    `image_root` None is the table's folder. `template` makes captions of the labels, in place of a column of captions.
    `caption_columns` None is the column `caption`, which a template replaces.
    `is_coco` tells that the pairs are a JSON file of COCO captions.
    """

    image_column: str = "image"
    image_root: Path | None = None
    allow_outside: bool = False
    caption_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    classes_file: Path | None = None
    template: str | None = None
    is_coco: bool = False
    image: ImageOptions = field(default_factory=ImageOptions)
    samples_per_shard: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class BuildResult:
    """Result of a build.

    `key_problem` is the reason why a `key` column was not used, or None. `list_column` is the caption column if it has
    lists of several texts, of which `txt` holds the first.
    """

    shards: list[WrittenShard]
    num_refused: int
    num_classes: int | None
    key_problem: str | None
    list_column: str | None

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)


def build(pairs: Path, output: Path, options: BuildOptions, workers: int) -> BuildResult:
    """Build shards of pairs in `output`. An earlier build there is replaced, and a killed one is finished.

    Raises: ValueError for an unusable table, column or folder, or if every row is refused.
    """
    if options.image_root is not None:
        if pairs.is_dir():
            raise ValueError(
                f"--image-root {str(options.image_root)!r}: expected a table beside it, {pairs} is a folder"
            )
        if not options.image_root.is_dir():
            raise ValueError(f"--image-root {str(options.image_root)!r}: no such folder")
    elif options.is_coco:
        raise ValueError(f"--coco {str(pairs)!r}: expected --image-root FOLDER of its images beside it")
    table = read_coco(pairs) if options.is_coco else read_pairs(pairs)
    if table.has_class_folders and options.label_column is None:
        options = replace(options, label_column="label")
    if table.has_class_folders and options.template is None:
        raise ValueError(
            f"pairs {str(pairs)!r}: images in class folders, without captions; expected --template 'a photo of a {{}}'"
        )
    if pairs.is_dir() and not table.has_class_folders and options.template is not None:
        given = f"{table.rows[0]['image']} has a .txt beside it" if table.rows else "the images lie in no folder"
        raise ValueError(
            f"--template {options.template!r}: expected class folders of images without captions, but {given}"
        )
    _require_paths(table, options.image_column, pairs)
    classes = None
    if options.classes_file is not None:
        if options.label_column is None:
            raise ValueError(f"--classes {str(options.classes_file)!r}: expected --label COLUMN beside it")
        table.require(options.label_column, "--label")
        classes = read_classes(options.classes_file, options.label_column)
    with locked_output(output, _text_files(options)):
        return _build_table(pairs, table, output, classes, options, workers)


def build_torchvision(
    name: str, root: Path, split: str | None, output: Path, options: BuildOptions, workers: int
) -> tuple[BuildResult, bool]:
    """Build shards of a data set of torchvision, with captions made of the names of its classes.

    Args:
        name: class of `torchvision.datasets`.
        root: folder of torchvision's data sets, to which a missing set is downloaded.
        split: split of the set, as torchvision names it; None: its default.
        output: folder of the build, as of `build`.
        options: `classes_file` orders the classes, or names them by index; `template` None is `TEMPLATE`.
        workers: number of processes.

    Returns: the result, and whether the set or `classes_file` names the classes.
    Raises: ValueError as of `read_torchvision` and `build`.
    """
    given = read_classes(options.classes_file, "label") if options.classes_file is not None else None
    options = replace(options, label_column="label", template=options.template or TEMPLATE)
    with locked_output(output, _text_files(options)), _empty_folder(output.resolve() / _PICTURES) as pictures:
        table, classes, has_names = read_torchvision(name, root, split, given, pictures)
        # A class without a sample in this split gets the text that it has in others.
        texts = [text or _caption_of(label, options) for label, text in zip(classes.labels, classes.texts)]
        title = Path(f"{name} {split}" if split else name)
        result = _build_table(title, table, output, Classes(classes.labels, texts), options, workers, pictures)
    return result, has_names or given is not None


def _text_files(options: BuildOptions) -> list[str]:
    """Return the names of the text files beside the shards."""
    return [REFUSALS] if options.label_column is None else [REFUSALS, CLASSES]


@contextmanager
def _empty_folder(path: Path) -> Iterator[Path]:
    """Make an empty folder, in place of one that a killed build left, and delete it in the end."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _build_table(
    pairs: Path,
    table: Table,
    output: Path,
    classes: Classes | None,
    options: BuildOptions,
    workers: int,
    pictures: Path | None = None,
) -> BuildResult:
    """Build shards of a table in a locked folder.

    Args:
        pairs: name of the table in messages and in the manifest.
        table: the table; rows that are refused later are left out of the shards.
        output: folder of the build.
        classes: classes in the order of their indexes; None: derived from the labels.
        options: options of the build.
        workers: number of processes.
        pictures: folder of images that were made for this build, so that their modification times tell nothing.
    """
    columns = options.caption_columns or ("caption",)
    if options.template is not None:
        _add_captions(table, columns, options)
    options = replace(options, caption_columns=columns)
    table.require(options.image_column, "--image")
    for column in columns:
        table.require(column, "--caption")
    if options.label_column is not None:
        table.require(options.label_column, "--label")
    texts = _text_files(options)
    root = ImageRoot(options.image_root or table.folder, options.allow_outside)
    accepted, refused = accept_rows(table, root, options.image_column, columns, options.label_column, classes)
    # Check images before writing, so that shards are of equal size no matter how many are refused.
    samples: list[Sample] = []
    states: dict[int, FileState] = {}
    for sample, checked in zip(accepted, _check_images(accepted, options.image, workers)):
        if isinstance(checked, str):
            refused.append(Refusal(sample.row_number, str(sample.path), checked))
        else:
            samples.append(sample)
            states[sample.row_number] = checked
    _require_samples(pairs, len(samples), refused)
    if options.label_column is not None and classes is None:
        classes = classes_of(
            [sample.label for sample in samples if sample.label is not None], are_names=table.has_class_folders
        )
        samples = _without_unknown(samples, classes, refused)
        _require_samples(pairs, len(samples), refused)

    plan = _plan(samples, states, classes, options, pictures)
    parts = open_output(output, plan, len(samples), options.samples_per_shard, texts)
    order = permutation(hash64("build", options.seed), len(samples))
    class_ids = {label: index for index, label in enumerate(classes.labels)} if classes else {}
    tasks = [
        ShardTask(path, [samples[i] for i in order[low:high]], class_ids, options.image) for path, low, high in parts
    ]
    shards = []
    for shard, changed in run_tasks(_finish_shard, tasks, workers, "writing shards"):
        shards += [shard] if shard is not None else []
        refused += changed
    _require_samples(pairs, len(shards), refused)

    if classes is not None:
        left_out = {refusal.row_number for refusal in refused}
        written = [sample for sample in samples if sample.row_number not in left_out]
        labels = [sample.label for sample in written if sample.label is not None]
        write_classes(output / CLASSES, classes, labels, [sample.caption for sample in written])
    write_refusals(output, (json.dumps(asdict(refusal), ensure_ascii=False) for refusal in refused))
    result = BuildResult(
        shards=shards,
        num_refused=len(refused),
        num_classes=len(classes.labels) if classes else None,
        key_problem=key_problem(table),
        list_column=_list_column(table, columns),
    )
    close_output(
        output,
        result.shards,
        {
            "pairs": pairs.name,
            "num_refused": result.num_refused,
            "num_classes": result.num_classes,
            "options": _options_json(options),
        },
        texts,
    )
    return result


def _add_captions(table: Table, columns: Sequence[str], options: BuildOptions) -> None:
    """Make a column of captions of the labels. Raises: ValueError without a label column, or if `options` name captions."""
    template, (column, *others) = str(options.template), columns
    if "{}" not in template:
        raise ValueError(f"--template {template!r}: expected a sentence with {{}} for the label")
    if options.label_column is None:
        raise ValueError(f"--template {template!r}: expected --label COLUMN beside it")
    if options.caption_columns is not None and (others or column in table.columns):
        named = ", ".join(columns)
        raise ValueError(f"--template {template!r}: expected no captions beside it, but --caption names {named!r}")
    table.require(options.label_column, "--label")
    for row in table.rows:
        label = row.get(options.label_column)
        row[column] = None if label is None else _caption_of(label, options)
    table.columns = list(dict.fromkeys([*table.columns, column]))


def _caption_of(label: object, options: BuildOptions) -> str:
    return str(options.template).replace("{}", one_line(str(label)).replace("_", " "))


def _require_paths(table: Table, column: str, pairs: Path) -> None:
    """Raise ValueError if the image column holds the images themselves."""
    value = next((row[column] for row in table.rows if row.get(column) is not None), None)
    if isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)):
        raise ValueError(
            f"--image {column!r}: expected a column of paths, but it holds the bytes of images: train on "
            f"the file itself, data=parquet data.train.pairs.source.path={pairs.absolute()} "
            f"data.train.pairs.source.image={column}"
        )


def _list_column(table: Table, columns: Sequence[str]) -> str | None:
    """Return the caption column if it is the only one and a row of it has several texts."""
    has_lists = len(columns) == 1 and any(len(caption_texts(row, columns)) > 1 for row in table.rows)
    return columns[0] if has_lists else None


def _without_unknown(samples: Sequence[Sample], classes: Classes, refused: list[Refusal]) -> list[Sample]:
    """Return the samples whose labels are among the integer classes; add the others to `refused`."""
    known = set(classes.labels)
    for sample in samples:
        if sample.label not in known:
            limit = f"expected below {MAX_INTEGER_CLASSES}; list the labels in --classes"
            reason = f"class index {str(sample.label)[:20]}: {limit}"
            refused.append(Refusal(sample.row_number, str(sample.path), reason))
    return [sample for sample in samples if sample.label in known]


def _require_samples(pairs: Path, number: int, refused: list[Refusal]) -> None:
    """Sort refusals by row. Raises: ValueError, with the first reason, if `number` of samples is 0."""
    refused.sort(key=lambda refusal: refusal.row_number)
    if not number:
        raise ValueError(f"pairs {str(pairs)!r}: every row is refused, the first because: {refused[0].reason}")


def _options_json(options: BuildOptions) -> dict[str, object]:
    return asdict(options) | {
        "image_root": str(options.image_root) if options.image_root else None,
        "classes_file": options.classes_file.name if options.classes_file else None,
    }


def _plan(
    samples: Sequence[Sample],
    states: Mapping[int, FileState],
    classes: Classes | None,
    options: BuildOptions,
    pictures: Path | None,
) -> str:
    """Return a hash (hex) of everything that determines the shards' bytes.

    A file's size and modification time (`states`, by row number) represent its content, unless it is in `pictures`.
    """
    plan = hashlib.sha256(json.dumps([_options_json(options), classes and classes.labels]).encode())
    for sample in samples:
        is_made = pictures is not None and sample.path.parent == pictures
        state = (file_sha256(sample.path),) if is_made else states[sample.row_number]
        plan.update(repr((sample, *state)).encode("utf-8", "surrogatepass"))
    return plan.hexdigest()


def _check_images(samples: Sequence[Sample], options: ImageOptions, workers: int) -> Iterator[FileState | str]:
    """Yield the state of each sample's file, or the reason for refusing its image."""
    paths = [sample.path for sample in samples]
    tasks = [(paths[i : i + ROWS_PER_CHECK], options) for i in range(0, len(paths), ROWS_PER_CHECK)]
    return chain.from_iterable(run_tasks(_check_some, tasks, workers, "checking images"))


def _check_some(task: tuple[list[Path], ImageOptions]) -> list[FileState | str]:
    paths, options = task
    checked: list[FileState | str] = []
    for path in paths:
        try:
            checked.append(check_image(path, options))
        except BadSample as error:
            checked.append(str(error))
    return checked


@dataclass(frozen=True)
class ShardTask:
    path: Path
    samples: list[Sample]
    class_ids: dict[str, int]
    image: ImageOptions


def _finish_shard(task: ShardTask) -> tuple[WrittenShard | None, list[Refusal]]:
    """Write a shard; return it (None if no sample is left) and the rows whose files changed since they were checked."""
    changed: list[Refusal] = []
    shard = finish_shard(task.path, _members(task, changed), len(task.samples))
    if not shard.num_samples:
        delete_shard(task.path)
        return None, changed
    return shard, changed


def _members(task: ShardTask, changed: list[Refusal]) -> Iterator[dict[str, str | bytes]]:
    for sample in task.samples:
        try:
            extension, data = encode_image(read_image(sample.path, task.image), task.image)
        except BadSample as error:
            reason = f"the file changed during the build: {error}"
            changed.append(Refusal(sample.row_number, str(sample.path), reason))
            continue
        members: dict[str, str | bytes] = {"__key__": sample.key, extension: data}
        members |= {"txt": sample.caption.encode(), "json": sample.json}
        if sample.label is not None:
            members["cls"] = str(task.class_ids[sample.label]).encode()
        yield members
