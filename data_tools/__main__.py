"""Command line of the data tools: `python -m data_tools COMMAND`."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from data_tools import tar_commands
from data_tools.command_line import Workers, print_table, run_app

app = typer.Typer(
    help="Download, build, check and describe shards.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; see `run_app`."""
    return run_app(app, arguments)


@app.command()
def build(
    pairs: Annotated[
        Path | None,
        typer.Argument(help="TSV, CSV, JSONL or Parquet; or a folder: images with .txt beside them, or class folders."),
    ] = None,
    *,
    coco: Annotated[
        Path | None, typer.Option(help="In place of PAIRS: a captions JSON of COCO; all texts of an image are kept.")
    ] = None,
    torchvision: Annotated[
        str | None, typer.Option(metavar="NAME", help="In place of PAIRS: a set of torchvision.datasets: CIFAR10.")
    ] = None,
    root: Annotated[
        Path, typer.Option(help="Folder of torchvision's data sets, to which a missing one is downloaded.")
    ] = Path("data/torchvision"),
    split: Annotated[
        str | None, typer.Option(help="Split of torchvision's data set: train, test.", show_default="the set's own")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for 000000.tar ..., indexes and manifest.json.")],
    image: Annotated[str, typer.Option(help="Column of image paths, relative to the image root.")] = "image",
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; / allows any absolute path.", show_default="the table's")
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Allow paths that leave the image root.")
    ] = False,
    caption: Annotated[
        str | None,
        typer.Option(
            help="Caption column, or several, whose texts are joined by ', ': caption,tags. Of a list, the first.",
            show_default="caption",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of class labels.")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Class list that sets the order of the labels. Of --torchvision, it may give them other names."
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Sentence that makes captions of labels: 'a photo of a {}'. _ becomes a space.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Reduce the short side to this many pixels.")] = None,
    format: Annotated[str | None, typer.Option(help="jpg, png or webp [default: the input's]")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of JPEG and WebP.")] = 95,
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Memory limit for decoding an image, in bytes; images over it are refused.")
    ] = 1 << 29,
    background: Annotated[str, typer.Option(help="Colour behind transparent images: R,G,B or #rrggbb.")] = "#ffffff",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Maximum number of samples per shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    workers: Workers,
) -> None:
    """Build shuffled, equal-sized WebDataset shards of images and captions.

    A row whose path leaves the image root, by ../ or as an absolute path, is refused.
    Symbolic links inside the root are followed wherever they lead.

    Examples:

      python -m data_tools build emoji.tsv --image filepath --caption caption,tags --output data/emoji

      python -m data_tools build photos/ --image-size 256 --format jpg --output data/photos

      python -m data_tools build val.csv --label breed --classes data/dogs/classes.tsv --output data/dogs/val

      python -m data_tools build flowers/ --template 'a photo of a {}, a flower' --output data/flowers

      python -m data_tools build captions.jsonl --image-root /data/photos --output data/photos

      python -m data_tools build --coco captions_train2017.json --image-root train2017 --output data/coco/train

      python -m data_tools build --torchvision Flowers102 --split test --output data/flowers/val
    """
    from data_tools.build import BuildOptions, build_torchvision
    from data_tools.build import build as build_shards
    from data_tools.images import WRITTEN_FORMATS, ImageOptions, parse_color

    if format is not None and format not in WRITTEN_FORMATS:
        raise ValueError(f"--format {format!r}: expected one of {', '.join(WRITTEN_FORMATS)}")
    source = pairs or coco
    if sum(each is not None for each in (pairs, coco, torchvision)) != 1:
        raise ValueError("expected one source: PAIRS, --coco captions.json or --torchvision NAME")
    if torchvision is None and split is not None:
        raise ValueError(f"--split {split!r}: expected --torchvision NAME beside it")
    if torchvision is not None and (label or image_root):
        given = f"--label {label!r}" if label else f"--image-root {str(image_root)!r}"
        raise ValueError(f"{given}: expected a table; --torchvision {torchvision!r} has labels and images of its own")
    captions = None if caption is None else tuple(name.strip() for name in caption.split(",") if name.strip())
    if captions == ():
        raise ValueError(f"--caption {caption!r}: expected a column, or several with commas between")
    started = time.monotonic()
    options = BuildOptions(
        image_column=image,
        image_root=image_root,
        allow_outside=allow_outside,
        caption_columns=captions,
        label_column=label,
        classes_file=classes,
        template=template,
        is_coco=coco is not None,
        image=ImageOptions(image_size, format, parse_color(background), quality, max_image_bytes),
        samples_per_shard=samples_per_shard,
        seed=seed,
    )
    if source is not None:
        result = build_shards(source, output, options, workers)
    else:
        result, has_names = build_torchvision(str(torchvision), root, split, output, options, workers)
        if not has_names:
            print(
                f"note: {torchvision} does not name its classes, so that captions have their numbers; name them, one a line, "
                "with --classes names.txt",
                file=sys.stderr,
            )
    seconds = time.monotonic() - started
    if result.key_problem is not None:
        print(f"note: keys are row numbers, since {result.key_problem}", file=sys.stderr)
    if result.list_column is not None:
        print(
            f"note: column {result.list_column!r} has lists of texts; txt holds the first of each, and json has them all: "
            f"data.train.pairs.caption=json.{result.list_column} data.val.val.caption=json.{result.list_column}",
            file=sys.stderr,
        )
    named = f", {result.num_classes} classes" if result.num_classes is not None else ""
    print(f"{output}: {result.num_samples} samples in {len(result.shards)} shards{named}, {seconds:.1f} s")
    if result.num_refused:
        print(f"{result.num_refused} rows refused: {output / 'refused.jsonl'}")


@app.command()
def build_text(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help=".txt or .jsonl files, also .gz; folders of them, or globs.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for 000000.tar ..., indexes and manifest.json.")],
    field: Annotated[
        str, typer.Option(help="Field of JSON lines that holds the text; a.b for a nested field.")
    ] = "text",
    document: Annotated[
        str, typer.Option(help="Unit of a .txt that makes a document: paragraph (between blank lines), line or file.")
    ] = "paragraph",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenizer file or folder, as in data.tokenizer.path.", show_default="CLIP's tokenizer"),
    ] = None,
    context_length: Annotated[
        int, typer.Option(min=3, help="Maximum number of tokens per sample, start and end included.")
    ] = 77,
    pack: Annotated[bool, typer.Option(help="Join short documents, one per line, until a sample is full.")] = True,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Maximum number of samples per shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    *,
    workers: Workers,
) -> None:
    """Build shuffled, equal-sized WebDataset shards of text alone, in samples that training need not cut.

    Documents longer than a sample are cut at the end of a sentence if that wastes little, else between words. Runs of
    whitespace become one space; no other text is lost. A sample's key is the position of its beginning: the index of
    the file in manifest.json, the line, and the piece of the document.

    Examples:

      python -m data_tools build-text books/ --output data/mine/books

      python -m data_tools build-text 'crawl/*.jsonl.gz' --field content.text --output data/mine/crawl

      python -m mmpretrain.train 'objective=\\[infonce,mlm]' objective.mlm.stream=texts data.root=data/mine
          data.train.texts.shards=books
    """
    from data_tools.build_text import TextOptions
    from data_tools.build_text import build_text as build_text_shards
    from data_tools.documents import DOCUMENTS

    if document not in DOCUMENTS:
        raise ValueError(f"--document {document!r}: expected one of {', '.join(DOCUMENTS)}")
    started = time.monotonic()
    options = TextOptions(field, document, tokenizer, context_length, pack, samples_per_shard, seed)
    result = build_text_shards(inputs, output, options, workers)
    seconds = time.monotonic() - started
    print(
        f"{output}: {result.num_documents} documents in {result.num_samples} samples of "
        f"{result.num_tokens / result.num_samples:.1f} tokens, {len(result.shards)} shards, {seconds:.1f} s"
    )
    if result.num_refused:
        print(f"{result.num_refused} documents refused: {output / 'refused.jsonl'}")


@app.command()
def download(
    urls: Annotated[Path, typer.Argument(help="TSV, CSV, JSONL or Parquet with URLs; or a folder of Parquet files.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of img2dataset: -- --retries=2")
    ] = None,
    *,
    output: Annotated[Path, typer.Option(help="Folder for 00000.tar ..., their indexes, Parquet and statistics.")],
    url: Annotated[str, typer.Option(help="Column of URLs.")] = "url",
    caption: Annotated[str, typer.Option(help="Column of captions.")] = "caption",
    columns: Annotated[str, typer.Option(help="Further columns to keep in json: label,licence.")] = "",
    image_size: Annotated[int, typer.Option(min=1, help="Reduce the short side to this many pixels.")] = 256,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Number of URLs per shard.")] = 10_000,
    threads: Annotated[int, typer.Option(min=1, help="Number of downloads at a time, per process.")] = 64,
    img2dataset: Annotated[str, typer.Option(help="The program, or its path in another environment.")] = "img2dataset",
    workers: Workers,
) -> None:
    """Download images by URL with img2dataset, to shards with an index.

    img2dataset needs an environment of its own: pipx install img2dataset. Beside each tar lie its Parquet, with the status
    of each URL, and its statistics. Images that do not arrive are left out. The same command goes on after a kill.
    The exit code is 1 if a tar has problems.

    Examples:

      python -m data_tools download urls.tsv --output data/web/train

      python -m data_tools download laion.parquet --url URL --caption TEXT --output laion -- --timeout=20 --retries=2

      python -m data_tools download urls.tsv --output web --img2dataset ~/img2dataset/bin/img2dataset
    """
    from data_tools.download import DownloadOptions
    from data_tools.download import download as download_shards

    started = time.monotonic()
    kept = tuple(column.strip() for column in columns.split(",") if column.strip())
    options = DownloadOptions(
        img2dataset, url, caption, kept, image_size, samples_per_shard, threads, tuple(more or ())
    )
    result = download_shards(urls, output, options, workers)
    seconds = time.monotonic() - started
    print(
        f"{output}: {result.num_samples:,} of {result.num_urls:,} images in {len(result.tars)} shards, {seconds:.1f} s"
    )
    print_table(("failure", "images"), [(reason, f"{count:,}") for reason, count in result.failures.most_common(10)], 1)
    problems = [(tar.tar, problem) for tar in result.tars for problem in tar.problems]
    print_table(("tar", "problem"), problems)
    if problems:
        raise typer.Exit(1)


@app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="Folder for train/, val/, composition/ and classes.tsv.")],
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    train: Annotated[int, typer.Option(min=1, help="Number of training samples.")] = 8064,
    val: Annotated[int, typer.Option(min=1, help="Number of validation samples, of the trained pairs.")] = 1008,
    composition: Annotated[int, typer.Option(min=1, help="Number of samples of the held-out pairs.")] = 448,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the images, in pixels.")] = 64,
    *,
    workers: Workers,
) -> None:
    """Build the embedded data set: drawn scenes of shapes with compositional captions.

    Scenes vary in shape (8), colour (8), size, position and a second object. 8 of the 64 pairs of shape and colour
    occur only in `composition`.

    Examples:

      python -m data_tools shapes --output data/shapes

      python -m data_tools shapes --output data/shapes128 --image-size 128 --train 40320
    """
    from data_tools.shapes import ShapesOptions, build_shapes

    started = time.monotonic()
    splits = build_shapes(output, ShapesOptions(train, val, composition, image_size, seed), workers)
    counts = ", ".join(f"{sum(shard.num_samples for shard in shards)} {split}" for split, shards in splits.items())
    print(f"{output}: {counts} samples, {time.monotonic() - started:.1f} s")


@app.command()
def tokenizer(
    texts: Annotated[list[str], typer.Argument(help="Text files (one text per line), tables of pairs, or tars.")],
    output: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    caption: Annotated[
        str, typer.Option(help="Caption columns of a table, or txt or json.<field> of tars.")
    ] = "caption",
    vocab_size: Annotated[int, typer.Option(help="Number of token ids; fewer if the texts yield fewer.")] = 8192,
    lowercase: Annotated[bool, typer.Option(help="Lower-case the texts.")] = True,
) -> None:
    """Train a tokenizer on your own texts: byte-level BPE with [PAD], [BOS], [EOS] and [MASK].

    Examples:

      python -m data_tools tokenizer pairs.tsv --caption caption,tags --output tokenizer.json

      python -m data_tools tokenizer data/mine/train --caption txt --vocab-size 16384 --output tokenizer.json

      python -m mmpretrain.train data.tokenizer.path=tokenizer.json model.text.vocab_size=16384
    """
    from itertools import chain

    from data_tools.tokenizers import MAX_PIECE_CHARACTERS, read_texts, train_tokenizer, usable_texts

    left_out: list[str] = []
    cut_words: list[str] = []
    read = chain.from_iterable(read_texts(source, caption) for source in texts)
    trained = train_tokenizer(usable_texts(read, left_out, cut_words), vocab_size, lowercase)
    if left_out:
        print(f"note: {len(left_out)} texts are left out, the first because: {left_out[0]}", file=sys.stderr)
    if cut_words:
        print(
            f"note: {len(cut_words)} texts are cut inside words of more than {MAX_PIECE_CHARACTERS} characters, the "
            f"first begins {cut_words[0]!r}",
            file=sys.stderr,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    trained.save(str(output))
    print(f"{output}: {trained.get_vocab_size():,} tokens")


for command in (tar_commands.index, tar_commands.verify, tar_commands.stats):
    app.command()(command)


if __name__ == "__main__":
    sys.exit(main())
