"""Command `download`: fetch images by URL with img2dataset, which runs as a program of its own, and index its shards.

img2dataset cannot share an environment with this package: its versions since 2022 need webdataset below 0.3.
"""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_tools.indexing import TABLE, IndexedTar, index_tars
from data_tools.output import locked_folder
from mmpretrain.data.pairs import Table
from mmpretrain.files import read_json

_FORMATS = ("tsv", "csv", "jsonl", "parquet")
_STATS = re.compile(r"\d+_stats\.json")


@dataclass(frozen=True)
class DownloadOptions:
    """Options of img2dataset.

    `columns` are further columns of the table for the samples' `json`. `more` are further arguments as img2dataset takes
    them, such as `--retries=2`; they come last.
    """

    program: str = "img2dataset"
    url_column: str = "url"
    caption_column: str = "caption"
    columns: tuple[str, ...] = ()
    image_size: int = 256
    samples_per_shard: int = 10_000
    threads: int = 64
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class DownloadResult:
    """Shards, number of URLs, and number of images that failed, by img2dataset's reason."""

    tars: list[IndexedTar]
    num_urls: int
    failures: Counter[str]

    @property
    def num_samples(self) -> int:
        return sum(tar.num_samples for tar in self.tars)


def download(urls: Path, output: Path, options: DownloadOptions, workers: int) -> DownloadResult:
    """Download images to shards in `output`, and index them. Shards that an earlier call has finished are kept.

    Images larger than `image_size` on their short side are reduced to it; smaller JPEG files keep their bytes. Beside each
    tar, img2dataset writes `NAME.parquet` (url, caption and status of each row) and `NAME_stats.json`.

    Whatever happens, the tars in `output` are indexed in the end.

    Raises: ValueError for an unusable table or folder, if another command writes to the folder, if img2dataset is missing or
        fails, if its statistics cannot be read, or if no image arrives.
    """
    program = shutil.which(options.program)
    if program is None:
        raise ValueError(
            f"--img2dataset {options.program!r}: no such program; install it in an environment of its own, since it "
            "needs an older webdataset, and Python up to 3.12: pipx install img2dataset"
        )
    table_format = _check_table(urls, options)
    arguments = [
        program,
        f"--url_list={urls.absolute()}",
        f"--input_format={table_format}",
        f"--url_col={options.url_column}",
        f"--caption_col={options.caption_column}",
        "--output_format=webdataset",
        f"--output_folder={output.absolute()}",
        f"--image_size={options.image_size}",
        "--resize_mode=keep_ratio",  # the program's default pads images with white
        "--resize_only_if_bigger=True",
        "--skip_reencode=True",
        f"--number_sample_per_shard={options.samples_per_shard}",
        f"--processes_count={workers}",
        f"--thread_count={options.threads}",
    ]
    if options.columns:
        arguments.append(f"--save_additional_columns={json.dumps(options.columns)}")
    # A library of img2dataset asks the network for its newest version otherwise.
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
    with locked_folder(output):
        foreign = [path.name for path in sorted(output.glob("*.json")) if not _STATS.fullmatch(path.name)]
        if foreign not in ([], [TABLE]):
            raise ValueError(f"--output {str(output)!r}: holds {foreign[0]}, not from a download; name another folder")
        _read_all_stats(output)
        (output / TABLE).unlink(missing_ok=True)  # img2dataset takes every .json for a shard's
        try:
            code = subprocess.run([*arguments, *options.more], stdout=2, env=environment, check=False).returncode
        finally:
            tars = index_tars([str(path) for path in sorted(output.glob("*.tar"))], workers)  # writes the table again
        if code:
            raise ValueError(f"img2dataset failed with exit code {code}; its message stands above")
        num_urls, failures = _read_all_stats(output)
    if sum(failures.values()) == num_urls:
        reason = f", most often because: {failures.most_common(1)[0][0]}" if failures else ""
        raise ValueError(f"--output {str(output)!r}: none of {num_urls} images arrived{reason}")
    return DownloadResult(tars, num_urls, failures)


def _check_table(urls: Path, options: DownloadOptions) -> str:
    """Return img2dataset's name of the format. Raises: ValueError for an unusable table or a missing column.

    img2dataset would hang after its error.
    """
    files = sorted(urls.glob("*.parquet"))[:1] if urls.is_dir() else [urls] if urls.is_file() else []
    if not files:
        raise ValueError(f"urls {str(urls)!r}: no such file; expected a table, or a folder of .parquet files")
    (path,) = files
    if path.suffix[1:] not in _FORMATS:
        expected = ", ".join(f".{each}" for each in _FORMATS)
        raise ValueError(f"urls {str(urls)!r}: unknown kind {path.suffix!r}; expected one of {expected}")
    columns = _columns(path)
    for option, column in (("--url", options.url_column), ("--caption", options.caption_column)):
        Table(columns, path.parent).require(column, option)
    for column in options.columns:
        Table(columns, path.parent).require(column, "--columns")
    return path.suffix[1:]


def _columns(path: Path) -> list[str]:
    """Return the columns of a table, from its first line if it is text. Raises: ValueError."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(1 << 20).rstrip("\r\n")
    if path.suffix == ".jsonl":
        try:
            return list(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: its first line is no JSON object ({error})") from error
    return [name.strip('"') for name in line.split("\t" if path.suffix == ".tsv" else ",")]


def _read_all_stats(output: Path) -> tuple[int, Counter[str]]:
    """Return the number of URLs, and of failures by reason. Raises: ValueError for statistics that cannot be read."""
    num_urls = 0
    failures: Counter[str] = Counter()
    for path in sorted(output.glob("*_stats.json")):
        try:
            stats = read_json(path)
            count, statuses = stats.get("count"), stats.get("status_dict")
        except ValueError:
            count = statuses = None
        if (
            not isinstance(count, int)
            or not isinstance(statuses, dict)
            or not all(isinstance(each, int) for each in statuses.values())
        ):
            raise ValueError(
                f"{path}: expected statistics of img2dataset, with `count` and `status_dict`; remove it, and the same "
                "command downloads its shard again"
            )
        num_urls += count
        failures += Counter({reason: number for reason, number in statuses.items() if reason != "success"})
    return num_urls, failures
