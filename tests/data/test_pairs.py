"""Tables as users have them, quotation marks above all."""

import csv
import io
import json
import re
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mmpretrain.data.pairs import caption_texts, is_quoted_tsv, read_pairs, row_json

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
        ("pairs.tsv", "path\tcaption\na\tb\n".encode("utf-16"), "its header is not UTF-8; convert the table"),
        ("pairs.csv", b"path,caf\xe9\na,b\n", "its header is not UTF-8; convert the table, e.g. with iconv"),
        ("pairs.jsonl", b"[1]\n", "every row is refused, the first because: list, expected a JSON object"),
        ("pairs.tsv", b"path\tpath\na\tb\n", "names a column twice"),
        ("pairs.csv", b'path,"capt"ion\na,b\n', "its header is not a record of a quoted table"),
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


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_rows_that_are_not_utf8_are_refused_alone(tmp_path: Path, suffix: str) -> None:
    rows = {"tsv": "{}\t{}", "csv": "{},{}", "jsonl": '{{"path": "{}", "caption": "{}"}}'}
    lines = [rows[suffix].format(*pair) for pair in [("a", "ü"), ("b", "café"), ("c", "d")]]
    data = [line.encode("latin-1" if "café" in line else "utf-8") for line in lines]
    header = [] if suffix == "jsonl" else [rows[suffix].format("path", "caption").encode()]
    (tmp_path / f"pairs.{suffix}").write_bytes(b"\n".join(header + data))
    table = read_pairs(tmp_path / f"pairs.{suffix}")
    assert table.rows == [{"path": "a", "caption": "ü"}, {"path": "c", "caption": "d"}]
    assert table.refused == [(2, "not UTF-8; convert the table, e.g. with iconv -t utf-8")]


def test_a_line_that_begins_no_record_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('path,caption\na,"b"c\nd,"e\nf"\ng,"h\ni,j\n')
    table = read_pairs(tmp_path / "pairs.csv")
    assert table.rows == [{"path": "d", "caption": "e\nf"}, {"path": "i", "caption": "j"}]
    reason = "not a record of a quoted table"
    assert table.row_numbers == [2, 4] and [number for number, _ in table.refused] == [1, 3]
    assert all(text.startswith(reason) for _, text in table.refused)


@pytest.mark.parametrize("end", ["", '"z"z\n'])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_quotation_marks_that_never_close_take_linear_time(tmp_path: Path, suffix: str, end: str) -> None:
    comma = "," if suffix == "csv" else "\t"
    lines = 16_000 * f'x"{comma}"y\n'
    (tmp_path / f"pairs.{suffix}").write_text(f'"path"{comma}"caption"\n{lines}{end}')
    started = time.process_time()
    table = read_pairs(tmp_path / f"pairs.{suffix}")
    assert time.process_time() - started < 4  # where each line was read to the file's end, it took 10
    assert len(table.rows) + len(table.refused) >= 16_000


def test_a_record_behind_lines_that_are_none_is_read(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('path,caption\na,"b\nc,d\ne,"f\ng"x\nh,"i\nj"\n')
    table = read_pairs(tmp_path / "pairs.csv")
    assert [row["path"] for row in table.rows] == ["c", "h"] and table.rows[1]["caption"] == "i\nj"
    assert [number for number, _ in table.refused] == [1, 3, 4]


def test_a_wrong_quotation_mark_does_not_make_a_quoted_tsv_plain(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text('"path"\t"caption"\n"a"\t"b"c"\n"d"\t"e\tf"\n')
    table = read_pairs(tmp_path / "pairs.tsv")
    assert table.rows == [{"path": "d", "caption": "e\tf"}] and [number for number, _ in table.refused] == [1]


def test_a_field_may_be_long_up_to_the_limit_of_a_row(tmp_path: Path) -> None:
    caption = "x" * 200_000  # beyond what Python's csv takes unasked
    (tmp_path / "pairs.csv").write_text(f"path,caption\na,{caption}\n")
    assert read_pairs(tmp_path / "pairs.csv").rows == [{"path": "a", "caption": caption}]
    assert csv.field_size_limit() < 200_000  # nobody else's reading is changed


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_row_beyond_the_limit_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpretrain.data.pairs.MAX_ROW_CHARACTERS", 30)
    rows = {"tsv": "{}\t{}\n", "csv": "{},{}\n", "jsonl": '{{"p": "{}", "c": "{}"}}\n'}
    lines = [rows[suffix].format(*pair) for pair in [("p", "c"), ("a", "b"), ("a", "b" * 40)]]
    (tmp_path / f"pairs.{suffix}").write_text("".join(lines))
    table = read_pairs(tmp_path / f"pairs.{suffix}")
    assert table.rows[-1] == {"p": "a", "c": "b"}
    (reason,) = [reason for _, reason in table.refused]
    assert reason.endswith("characters, more than the limit of 30")


@pytest.mark.parametrize("depth", [65, 500, 100_000])
def test_rows_that_are_nested_too_deeply_are_refused(tmp_path: Path, depth: int) -> None:
    lines = [f'{{"path": "a", "x": {"[" * n}1{"]" * n}}}' for n in (depth, 62)]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, f'{{"x": {"[" * depth}{"]" * depth}}}']))
    table = read_pairs(tmp_path / "pairs.jsonl")
    assert table.row_numbers == [2] and json.loads(row_json(table.rows[0])) == table.rows[0]
    assert table.refused == [(number, "lists or objects nested more than 64 deep") for number in (1, 3)]


def test_a_table_beyond_the_memory_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "pairs.tsv", "wb") as file:
        file.truncate(10**13)  # sparse
    with pytest.raises(ValueError, match=r"pairs\.tsv: 10000000000000 bytes; expected at most a quarter of the memory"):
        read_pairs(tmp_path / "pairs.tsv")


def test_values_of_parquet_that_python_does_not_hold(tmp_path: Path) -> None:
    stamps = pyarrow.array([1_000, 1, 2], pyarrow.timestamp("ns"))
    years = pyarrow.array([0, 0, 2**60], pyarrow.timestamp("us"))
    broken = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"stamp": stamps, "year": years, "caption": broken})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    read = read_pairs(tmp_path / "pairs.parquet")
    assert read.row_numbers == [1, 3]
    assert [row["caption"] for row in read.rows] == ["a", "c"]
    assert str(read.rows[1]["stamp"]) == "1970-01-01 00:00:00.000000002"
    ((number, reason),) = read.refused
    assert number == 2 and reason.startswith("a value cannot be read ('utf-8' codec")


def test_texts_beside_images_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with open(tmp_path / "c.txt", "wb") as file:
        file.truncate(10**12)  # sparse
    (tmp_path / "d.txt").symlink_to("d.txt")
    table = read_pairs(tmp_path)
    assert table.rows == [{"image": "a.png", "caption": "one\ntwo"}]
    assert table.refused == [
        (2, "b.png: b.txt is not UTF-8 (unexpected end of data at byte 3); convert it"),
        (3, "c.png: c.txt: 1000000000000 bytes, more than the limit of 16777216"),
        (4, "d.png: no d.txt beside it"),
    ]


def test_captions_are_joined_without_empty_ones() -> None:
    row = {"a": " one ", "b": "", "c": None, "d": ["two", "", "three"], "e": 4, "f": float("nan")}
    assert caption_texts(row, list("abcdef")) == ["one, two, three, 4"]
    assert caption_texts(row, ["b", "c", "f"]) == []
    assert caption_texts({"texts": ["one", " ", "two"]}, ["texts"]) == ["one", "two"]


def test_json_holds_what_json_can(tmp_path: Path) -> None:
    row = {"text": "naïve", "none": None, "nan": float("nan"), "list": [1, 2.5], "bytes": b"abc", "path": tmp_path}
    expected = {**row, "nan": None, "bytes": "3 bytes", "path": str(tmp_path)}
    assert json.loads(row_json(row)) == expected


def test_json_is_valid_unicode() -> None:
    assert json.loads(row_json({"a\ud800": ["x\udfff", {"\ud834\udd1e": "𝄞"}]}).decode()) == {
        "a\ufffd": ["x\ufffd", {"\ufffd\ufffd": "𝄞"}]
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.json", "--coco reads captions of COCO"),
        ("a.tar", "training reads tars as they are: data.train.pairs.shards=/"),
        ("a.tgz", "unpack it first: tar xzf "),
        ("a.tar.gz", "unpack it first: tar xzf "),
        ("a.tsv.gz", "unpack it first: gunzip -k "),
        ("a.zip", "unpack it first: unzip "),
    ],
)
def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=re.escape(f"; {hint}")):
        read_pairs(tmp_path / name)
