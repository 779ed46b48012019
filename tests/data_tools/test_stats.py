"""The command `stats`: figures, estimates, duplicates and the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.histograms import Histogram, bin_edges, draw_histograms
from data_tools.measuring import MAX_TOKENS
from data_tools.stats import Stats, histograms_of, measure_tars
from tests.servers import http_server
from tests.tars import encode, make_samples, smooth_pixels, write_tar, write_tars


def described(output: Path, *arguments: object) -> int:
    return main(["stats", *map(str, arguments), "--output", str(output), "--workers", "1"])


def measured(*tars: object, caption: str = "txt", max_samples: int = 1000) -> Stats:
    return measure_tars([*map(str, tars)], None, caption, None, max_samples, workers=1)


def sized(height: int, width: int, format: str = "JPEG") -> bytes:
    return encode(smooth_pixels(height, width), format)


def row(out: str, name: str) -> list[str]:
    """The figures of a row of the table."""
    line = next(line for line in out.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_table_has_the_quantiles_of_each_measure(tmp_path: Path, capsys) -> None:
    widths = list(range(10, 111))
    samples = [{"png": sized(20, width, "PNG"), "txt": "word " * (width - 10)} for width in widths]
    write_tars(tmp_path, samples, [60, 41])
    assert described(tmp_path / "stats.png", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("101 samples in 2 tars\n") and "of all samples" in out
    assert row(out, "image width (pixels)") == ["10", "15", "60", "60", "105", "110"]
    assert row(out, "image height (pixels)") == ["20"] * 6
    assert row(out, "aspect ratio (width / height)") == ["0.5", "0.75", "3", "3", "5.25", "5.5"]
    sizes = [len(sample["png"]) for sample in samples]
    assert row(out, "encoded image (bytes)")[0] == f"{min(sizes):,}"
    assert row(out, "encoded image (bytes)")[-1] == f"{max(sizes):,}"
    # The text without a word is no caption; start and end tokens count, and lengths are told beyond 77 tokens.
    assert row(out, "caption (tokens)")[0] == "3" and row(out, "caption (tokens)")[-1] == "102"
    assert "captions: 100, 25 (25.0 %) longer than 77 tokens" in out
    assert "unreadable captions: 1; python -m data_tools verify tells which" in out


def test_formats_are_those_of_the_content(tmp_path: Path, capsys) -> None:
    contents = [sized(9, 9), sized(9, 9), sized(9, 9), sized(9, 9, "PNG"), sized(9, 9, "WEBP"), b"no image"]
    path = write_tar(tmp_path / "0.tar", [{"jpg": content, "txt": f"{i}"} for i, content in enumerate(contents)])
    assert described(tmp_path / "stats.png", path) == 0
    out = capsys.readouterr().out
    assert "images: 5 (jpg 3, png 1, webp 1)" in out and "unreadable images: 1" in out


def test_sizes_come_from_the_header_alone(tmp_path: Path) -> None:
    whole = encode(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    path = write_tar(tmp_path / "0.tar", [{"jpg": whole[:1000], "txt": "cut off behind its header"}])
    stats = measured(path)
    assert (stats.measured.widths.tolist(), stats.measured.heights.tolist()) == ([48], [64])


def test_formats_that_training_does_not_read_are_not_opened(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [{"jpg": encode(smooth_pixels(9, 9), "PPM"), "txt": "a"}])
    assert measured(path).measured.unreadable == {"images": 1}


def test_more_samples_than_allowed_are_estimated_from_evenly_spaced_ones(tmp_path: Path, capsys) -> None:
    samples = [{"png": sized(8, 10 + i, "PNG"), "txt": "a"} for i in range(20)]
    write_tars(tmp_path, samples, [13, 2, 5])
    assert measured(tmp_path, max_samples=5).measured.widths.tolist() == [10, 14, 18, 22, 26]
    assert described(tmp_path / "stats.png", tmp_path, "--max-samples", 5) == 0
    out = capsys.readouterr().out
    assert "20 samples in 3 tars, estimated from 5 evenly spaced samples" in out
    assert "estimated from 5 samples" in out and "of all samples" not in out
    assert measured(tmp_path, max_samples=20).measured.widths.tolist() == list(range(10, 30))


def test_duplicates_are_counted_over_all_tars(tmp_path: Path, capsys) -> None:
    texts = ["one", "two", "two", "three", "two", "three"]
    paths = write_tars(tmp_path, [{"jpg": sized(9, 9), "txt": text} for text in texts], [2, 4])
    assert described(tmp_path / "stats.png", tmp_path) == 0
    out = capsys.readouterr().out
    assert "duplicates: 3 (50.0 %) have the text of an earlier caption" in out
    assert f"one text occurs 3 times, first in {paths[0]}: 000001" in out
    assert row(out, "captions with the same text") == ["1", "1.1", "2", "2", "2.9", "3"]


def test_each_caption_of_a_list_counts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(4))
    stats = measured(path, caption="json.captions")
    assert stats.measured.samples.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(stats.repeats) == 12


def test_texts_alone_have_rows_of_captions_only(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", [{"txt": f"text {i}"} for i in range(3)])
    assert described(tmp_path / "stats.png", path) == 0
    out = capsys.readouterr().out
    assert "images: 0\n" in out and "pixels" not in out and row(out, "caption (tokens)")[0] == "4"


def test_images_alone_have_rows_of_images_only(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", [{"jpg": sized(9, 9)}])
    assert described(tmp_path / "stats.png", path) == 0
    out = capsys.readouterr().out
    assert "captions: 0\n" in out and "duplicates" not in out and "tokens" not in out


def test_a_very_long_caption_counts_up_to_the_limit(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [{"jpg": sized(9, 9), "txt": "word " * (MAX_TOKENS + 1)}])
    assert measured(path).measured.tokens.tolist() == [MAX_TOKENS]


def test_lengths_are_of_the_given_tokenizer(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", [{"jpg": sized(9, 9), "txt": "zebra"}] * 3)
    tokenizer = tmp_path / "tokenizer.json"
    assert main(["tokenizer", path, "--caption", "txt", "--vocab-size", "300", "--output", str(tokenizer)]) == 0
    assert described(tmp_path / "stats.png", path, "--tokenizer", tokenizer) == 0
    assert row(capsys.readouterr().out, "caption (tokens)")[0] == "3"
    assert described(tmp_path / "stats.png", path, "--tokenizer", "ViT-Z-99") == 2
    assert "--tokenizer 'ViT-Z-99': no such file or folder, nor a model of open_clip" in capsys.readouterr().err


def test_several_processes_measure_what_one_does(tmp_path: Path, capsys) -> None:
    write_tars(tmp_path, make_samples(9), [3, 3, 3])
    outputs = []
    for workers in ("1", "2"):
        assert main(["stats", str(tmp_path), "--output", str(tmp_path / "stats.png"), "--workers", workers]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_remote_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_tars(tmp_path / "data", make_samples(4), [2, 2])
    assert main(["index", str(tmp_path / "data")]) == 0
    with http_server(tmp_path / "data") as server:
        stats = measured(f"{server.url}/{{000..001}}.tar")
    assert stats.measured.widths.tolist() == measured(tmp_path / "data").measured.widths.tolist() == [24, 23, 22, 21]


def test_the_picture_is_a_png_in_a_new_folder(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(5))
    output = tmp_path / "new" / "stats.png"
    assert described(output, path) == 0
    with Image.open(output) as picture:
        assert picture.format == "PNG" and picture.width > 1200 and picture.height > 600
    assert [file.name for file in output.parent.iterdir()] == ["stats.png"]


def test_each_measure_has_a_histogram_with_its_unit(tmp_path: Path) -> None:
    histograms = histograms_of(measured(write_tar(tmp_path / "0.tar", make_samples(5))))
    assert {histogram.name: histogram.counted for histogram in histograms} == {
        "image width (pixels)": "images",
        "image height (pixels)": "images",
        "aspect ratio (width / height)": "images",
        "encoded image (bytes)": "images",
        "caption (tokens)": "captions",
        "captions with the same text": "distinct texts",
    }
    assert [histogram.mark for histogram in histograms if histogram.mark] == [(77, "77 tokens: cut here")]


@pytest.mark.parametrize(
    "values",
    [[7], [7] * 100, [1, 10**9], [*range(1, 2000)], [0.5], [0.5, 0.5], [0.01, 5.0, 90.0], [1.0, 1.5]],
    ids=lambda values: f"{len(values)} from {values[0]}",
)
def test_histograms_hold_every_value(tmp_path: Path, values: list[Any]) -> None:
    array = np.array(values)
    bins = np.asarray(bin_edges(array))
    counts, _ = np.histogram(array, bins)
    assert counts.sum() == len(values) and (np.diff(bins) > 0).all() and len(bins) <= 62
    assert array.dtype.kind == "f" or (bins % 1 == 0.5).all()  # no integer is an edge
    draw_histograms([Histogram("value (unit)", "things", array, (3.0, "three"), True)], "title $x", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_output_has_to_be_a_png(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", make_samples(1))
    assert described(tmp_path / "stats.jpg", path) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err


def test_a_damaged_tar_ends_the_command(tmp_path: Path, capsys) -> None:
    (tmp_path / "zip.tar").write_bytes(b"PK" * 1000)
    assert described(tmp_path / "stats.png", tmp_path) == 2
    assert "expected a plain, uncompressed tar" in capsys.readouterr().err


def test_problems_of_tars_are_told(tmp_path: Path, capsys) -> None:
    path = write_tar(tmp_path / "0.tar", [{"jpg": sized(9, 9), "txt": "a"}, {"jpg": sized(9, 9)}])
    assert described(tmp_path / "stats.png", path) == 0
    assert f"problems of tars: 1, the first: {path}: 1 samples without a caption" in capsys.readouterr().out
