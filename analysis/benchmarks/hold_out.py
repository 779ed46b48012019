r"""Split a table by the values of a column, for choices that must not be made on validation data.

    python -m analysis.benchmarks.hold_out emoji/train.tsv --by base --image filepath --output emoji_dev

Rows with the same value stay together. They go to val.tsv if the SHA-256 of the value, as a number, is a multiple of
`--one-in`, and to train.tsv otherwise. Image paths become absolute, so that the tables may be moved.
"""

import argparse
import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

from analysis.benchmarks import arguments


def is_held_out(value: str, one_in: int) -> bool:
    """Return True if rows with this value go to val.tsv."""
    return int(hashlib.sha256(value.encode()).hexdigest(), 16) % one_in == 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=arguments.existing, help="TSV with a header")
    parser.add_argument("--by", required=True, help="the column whose values are kept together")
    parser.add_argument("--image", required=True, help="the column of image paths, relative to the table's folder")
    parser.add_argument("--one-in", type=arguments.positive, default=10, help="of the values (default 10)")
    parser.add_argument("--output", required=True, type=Path, help="folder for train.tsv and val.tsv")
    args = parser.parse_args(argv)
    with args.table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        columns = list(reader.fieldnames or [])
        if missing := {args.by, args.image} - set(columns):
            parser.error(f"{args.table} has no column {sorted(missing)[0]!r}; it has {', '.join(columns)}")
        rows = list(reader)
    args.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
    for row in rows:
        row[args.image] = str((args.table.parent / row[args.image]).resolve())
        parts["val" if is_held_out(row[args.by], args.one_in) else "train"].append(row)
    for name, part in parts.items():
        with (args.output / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(part)
        values = len({row[args.by] for row in part})
        print(f"{args.output / name}.tsv: {len(part):,} rows of {values:,} values of {args.by}")


if __name__ == "__main__":
    main()
