"""Commands about finished tars: `index`, `verify` and `stats`."""

from pathlib import Path
from typing import Annotated

import typer

from data_tools.command_line import Workers, print_table

Tars = Annotated[list[str], typer.Argument(help="Tars, folders of tars, globs or brace patterns; local or remote.")]
IndexDir = Annotated[
    str | None, typer.Option(help="Folder of the indexes (data.index_dir).", show_default="beside the tars")
]
Caption = Annotated[str, typer.Option(help="Caption field: txt, or json.<field> (data.train.<stream>.caption).")]


def index(
    tars: Tars,
    index_dir: IndexDir = None,
    *,
    workers: Workers,
) -> None:
    """Build or refresh the offset indexes of tars from WebDataset or img2dataset.

    Beside the indexes, shards.json lists the shards of each folder. Upload it and the indexes with the tars, and training
    reads ranges of them from the bucket. Remote tars (https://, s3://, gs://) are fetched whole, once, to be indexed.

    Reports truncated tars, duplicate keys, and samples without a caption or, except in tars of text alone, an image.
    The exit code is 1 if there are problems.

    Examples:

      python -m data_tools index data/emoji/train

      python -m data_tools index 'laion/{00000..00099}.tar'

      python -m data_tools index 's3://bucket/laion/{00000..00099}.tar' --index-dir indexes
    """
    from data_tools.indexing import expand, index_tars
    from mmpretrain.data.stored_index import index_path

    results = index_tars(expand(tars, index_dir), workers, index_dir)
    num_samples, seconds = sum(r.num_samples for r in results), sum(r.seconds for r in results)
    rate = f", {num_samples / seconds:,.0f} samples/s on one core" if seconds else ""
    print(f"{num_samples:,} samples in {len(results)} tars{rate}")
    elsewhere = [result for result in results if result.index not in (None, str(index_path(result.tar, index_dir)))]
    if elsewhere:
        folder = Path(str(elsewhere[0].index)).parent
        print(f"{len(elsewhere)} indexes are in {folder}, since they could not be written to their place")
    rows = [(result.tar, problem) for result in results for problem in result.problems]
    print_table(("tar", "problem"), rows)
    if rows:
        raise typer.Exit(1)


def verify(
    tars: Tars,
    index_dir: IndexDir = None,
    output: Annotated[Path, typer.Option(help="File of the bad samples, one JSON object a line.")] = Path(
        "verify.jsonl"
    ),
    caption: Caption = "txt",
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Memory limit for decoding an image, in bytes (data.max_image_bytes).")
    ] = 1 << 29,
    *,
    workers: Workers,
) -> None:
    """Decode every sample of tars as training does, and report what is wrong.

    Bad samples are those that training would replace by others: damaged or missing images, empty or missing captions. Each
    is a line of --output (shard, key, reason, code). Problems of whole tars are those of `index`. The exit code is 1 if
    anything is wrong.

    After each tar, --output gets a line with its digest and version. The same command goes on after the last such tar, and
    reads tars again only if they have changed; the last entry of a tar counts.

    Examples:

      python -m data_tools verify data/emoji/train

      python -m data_tools verify 'laion/{00000..00099}.tar' --caption json.caption --output laion.jsonl
    """
    from data_tools.verify import VerifyOptions, verify_tars

    result = verify_tars(tars, index_dir, output, VerifyOptions(caption, max_image_bytes), workers)
    kept = f", of which {result.num_kept} were verified before" if result.num_kept else ""
    print(f"{result.num_samples:,} samples in {result.num_tars} tars{kept}: {result.num_bad:,} bad")
    print_table(("tar", "problem"), result.problems)
    rows = [(each.code, each.reason, f"{each.shard}: {each.key}", f"{each.num_samples:,}") for each in result.reasons]
    print_table(("code", "reason", "first sample", "samples"), rows, num_text_columns=3)
    if result.num_bad:
        print(f"bad samples: {output}")
    if result.num_bad or result.problems:
        raise typer.Exit(1)


def stats(
    tars: Tars,
    index_dir: IndexDir = None,
    caption: Caption = "txt",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer.json, a folder with one, or a model of open_clip.", show_default="CLIP's tokenizer"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="PNG of the histograms.")] = Path("stats.png"),
    max_samples: Annotated[
        int, typer.Option(min=1, help="Measure this many evenly spaced samples of a larger set.")
    ] = 100_000,
    *,
    workers: Workers,
) -> None:
    """Describe tars: image sizes and formats, caption lengths in tokens, and captions that occur repeatedly.

    Prints a table, and draws histograms. Images are not decoded: their sizes come from their headers.

    Examples:

      python -m data_tools stats data/emoji/train

      python -m data_tools stats 'laion/{00000..00099}.tar' --max-samples 20000 --tokenizer tokenizer.json --output laion.png
    """
    from data_tools.histograms import draw_histograms
    from data_tools.stats import histograms_of, measure_tars, summary, table_rows

    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {str(output)!r}: expected a name that ends in .png")
    found = measure_tars(tars, index_dir, caption, tokenizer, max_samples, workers)
    first, *notes = summary(found)
    draw_histograms(histograms_of(found), first, output)  # before a closed pipe can end the command
    print(first)
    columns = (found.title, "minimum", "5 %", "median", "mean", "95 %", "maximum")
    print_table(columns, table_rows(found), num_text_columns=1)
    for note in notes:
        print(note)
    print(f"histograms: {output}")
