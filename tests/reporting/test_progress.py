"""Progress and results on the console."""

import logging
from pathlib import Path

import pytest

from mmpretrain.reporting.progress import ProgressBar, print_results, table_of


def test_progress_without_a_terminal_is_a_line_a_logged_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressBar(100, 0, enabled=True) as progress:
        progress.advance(10)
        progress.show(10, loss=1.25, speed=320.4, seconds_left=61.0)
    assert caplog.messages == ["step 10/100  loss 1.2500  320 pairs/s  1:01 left"]


def test_other_processes_show_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressBar(100, 0, enabled=False) as progress:
        progress.show(10, loss=1.25, speed=320.4, seconds_left=61.0)
    assert caplog.messages == []


def test_table_has_every_result_and_says_where_things_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    print_results({"eval-val/acc1": 0.51239, "samples": 1234567}, tmp_path, {})
    shown = capsys.readouterr().out
    for fragment in ("eval-val/acc1", "0.5124", "1,234,567", f"{tmp_path}/checkpoints", f"--logdir {tmp_path}"):
        assert fragment in shown


def test_small_values_are_no_zeros() -> None:
    values = {
        1e-6: "1e-06",
        -2.5e-9: "-2.5e-09",
        4.9e-5: "4.9e-05",
        5e-5: "0.0001",
        0.0: "0.0000",
        1234.5: "1,234.5000",
    }
    _, rows = table_of({text: value for value, text in values.items()}, {})
    assert rows == [[text, text] for text in values.values()]
