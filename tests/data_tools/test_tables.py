"""Tables as users have them, quotation marks above all."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.tables import caption_text, is_quoted_tsv, read_pairs, row_json

ROWS = [
    {"path": "a.png", "caption": 'a "quoted" word'},
    {"path": "b.png", "caption": "tab\tand\nline"},
    {"path": "c.png", "caption": '"'},
]


def written(rows: list[dict[str, str]], quoting: int) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t", quoting=quoting, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_quoted_tsv_is_seen_as_such(tmp_path: Path, quoting: int) -> None:
    text = written(ROWS, quoting)
    assert is_quoted_tsv(text)
    (tmp_path / "pairs.tsv").write_bytes(text.encode())
    assert read_pairs(tmp_path / "pairs.tsv").rows == ROWS
    assert is_quoted_tsv(written([{"path": "a.png", "caption": "plain"}], csv.QUOTE_ALL))


@pytest.mark.parametrize(
    "captions",
    [
        ['"A quoted title"', "another"],  # a whole caption in quotation marks is no quoting
        ['"Hello" she said', 'and "bye"'],
        ['5" nails', "10' rope"],
        ['"', "x"],
        ['he said ""hi""', "x"],
        ['"start', 'end"'],
        ["no quotation mark"],
    ],
)
def test_quotation_marks_in_an_unquoted_tsv_stay(tmp_path: Path, captions: list[str]) -> None:
    lines = ["path\tcaption", *(f"{i}.png\t{caption}" for i, caption in enumerate(captions))]
    (tmp_path / "pairs.tsv").write_bytes("\r\n".join([*lines, ""]).encode())
    table = read_pairs(tmp_path / "pairs.tsv")
    assert [row["caption"] for row in table.rows] == captions and table.refused == []


def test_unusual_line_separators_do_not_cut_rows(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_bytes("\ufeffpath\tcaption\na.png\tone\u2028two\x0bthree\n".encode())
    table = read_pairs(tmp_path / "pairs.tsv")
    assert table.columns == ["path", "caption"] and table.rows == [
        {"path": "a.png", "caption": "one\u2028two\x0bthree"}
    ]


def test_csv_jsonl_and_parquet_hold_the_same(tmp_path: Path) -> None:
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "pairs.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        table = read_pairs(tmp_path / f"pairs.{suffix}")
        assert table.rows == ROWS and table.columns == ["path", "caption"] and table.row_numbers == [1, 2, 3]
        assert table.folder == tmp_path


def test_bad_rows_are_refused_by_number(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("path\tcaption\na.png\tfine\nb.png\n\nc.png\tx\ty\n")
    table = read_pairs(tmp_path / "pairs.tsv")
    assert table.row_numbers == [1]
    assert table.refused == [(2, "1 fields, the header has 2"), (4, "3 fields, the header has 2")]
    (tmp_path / "pairs.jsonl").write_text('{"path": "a"}\n{"path"\n[1]\n')
    assert [number for number, _ in read_pairs(tmp_path / "pairs.jsonl").refused] == [2, 3]


def test_a_folder_of_images_with_captions_beside(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "b.txt", "sub/a.JPG", "sub/a.txt", "alone.jpg", "notes.md"):
        (tmp_path / name).write_text(f"caption of {name}")
    table = read_pairs(tmp_path)
    assert table.rows == [
        {"image": "b.png", "caption": "caption of b.txt"},
        {"image": "sub/a.JPG", "caption": "caption of sub/a.txt"},
    ]
    assert [reason for _, reason in table.refused] == ["alone.jpg: no alone.txt beside it"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.tsv", None, "no such file; expected a .tsv"),
        ("pairs.xlsx", b"x", "unknown kind '.xlsx'; expected a folder or a file in .tsv"),
        ("pairs.tsv", b"path\tcaption\n", "no rows in it; expected at least one"),
        ("pairs.tsv", b"", "no rows in it"),
        ("pairs.tsv", b"path\tcaption\na\t\xff\n", "not UTF-8 at byte 15; convert it"),
        ("pairs.tsv", b"path\tpath\na\tb\n", "names a column twice"),
        ("pairs.csv", b'path,caption\na,"b"c\n', "not a readable table"),
        ("pairs.parquet", b"PAR1", "not a readable Parquet file"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_captions_are_joined_without_empty_ones() -> None:
    row = {"a": " one ", "b": "", "c": None, "d": ["two", "", "three"], "e": 4, "f": float("nan")}
    assert caption_text(row, list("abcdef")) == "one, two, three, 4"
    assert caption_text(row, ["b", "c", "f"]) == ""


def test_json_holds_what_json_can(tmp_path: Path) -> None:
    row = {"text": "naïve", "none": None, "nan": float("nan"), "list": [1, 2.5], "bytes": b"abc", "path": tmp_path}
    expected = {**row, "nan": None, "bytes": "3 bytes", "path": str(tmp_path)}
    assert json.loads(row_json(row)) == expected
