import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpretrain.batch import Batch, Samples
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.errors import UsageError
from mmpretrain.objectives.base import Example
from mmpretrain.reporting.records import read_records
from mmpretrain.reporting.writers import RunWriter, check_writers
from tests import runs


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def open_at(folder: Path, step: int = 0, samples: int = 0) -> RunWriter:
    return RunWriter(folder, step, samples, runs.TENSORBOARD)


def log_steps(writer: RunWriter, steps: range, value: float) -> None:
    for step in steps:
        writer.scalars(step, 16 * step, {"train/loss": value + step})


def test_values_stand_in_both_places_on_the_axis_of_samples(tmp_path: Path) -> None:
    writer = open_at(tmp_path)
    log_steps(writer, range(1, 4), 0.5)
    writer.close()
    assert read_records(tmp_path / "metrics.jsonl") == [
        {"step": step, "samples": 16 * step, "train/loss": step + 0.5} for step in (1, 2, 3)
    ]
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")] == [
        (16, 1.5),
        (32, 2.5),
        (48, 3.5),
    ]


def test_value_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    writer = open_at(tmp_path)
    writer.scalars(1, 16, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "step": 1,
        "samples": 16,
        "train/loss": None,
        "train/grad_norm": None,
        "train/lr": 0.1,
    }


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_what_was_logged_beyond_the_checkpoint_is_taken_back(resumed_at: int, tmp_path: Path) -> None:
    killed = open_at(tmp_path)
    log_steps(killed, range(1, 6), 100.0)
    killed.image("train/pairs", 0, np.zeros((8, 8, 3), np.uint8))
    # No close: a kill does not close.
    resumed = open_at(tmp_path, resumed_at, 16 * resumed_at)
    log_steps(resumed, range(resumed_at + 1, 8), 200.0)
    if resumed_at == 0:
        resumed.image("train/pairs", 0, np.zeros((8, 8, 3), np.uint8))
    resumed.close()

    expected = [(step, (100.0 if step <= resumed_at else 200.0) + step) for step in range(1, 8)]
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["train/loss"]) for record in records] == expected
    shown = events(tmp_path)
    assert [(event.step // 16, event.value) for event in shown.Scalars("train/loss")] == expected
    assert [event.step for event in shown.Images("train/pairs")] == [0]


def test_tensorboard_gets_what_was_logged_while_it_was_left_out(tmp_path: Path) -> None:
    first = open_at(tmp_path)
    log_steps(first, range(1, 4), 100.0)
    (path,) = (tmp_path / "tensorboard").glob("events*")
    with path.open("ab") as file:
        file.write(path.read_bytes()[:20])  # a record that a kill cut short
    without = RunWriter(tmp_path, 2, 32, {})
    log_steps(without, range(3, 6), 200.0)
    without.close()
    resumed = open_at(tmp_path, 5, 80)
    log_steps(resumed, range(6, 8), 300.0)
    resumed.close()
    shown = [(event.step // 16, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert shown == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0), (6, 306.0), (7, 307.0)]


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "samples": 16}\n{"step": 2, "samp')
    assert read_records(path) == [{"step": 1, "samples": 16}]
    open_at(tmp_path, 1, 16).close()
    assert path.read_text() == '{"step": 1, "samples": 16}\n'


def test_texts_and_pictures_of_objectives_are_logged_at_their_moment(tmp_path: Path) -> None:
    writer = open_at(tmp_path)
    picture = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    writer.examples("objectives/both", 64, [Example([picture, picture], "a text\n(another)")] * 2)
    writer.examples("objectives/text", 64, [Example([], "only words")])
    text = torch.tensor([[49406, 320, 49407]])
    samples = Samples(torch.arange(1), torch.arange(1), torch.arange(1), None, text, torch.tensor([3]), (3,))
    writer.pairs(Batch({"texts": samples}), ClipTokenizer())
    writer.close()
    logged = events(tmp_path)
    assert logged.Images("objectives/both")[0].step == 64
    page = np.asarray(Image.open(tmp_path / "pictures" / "objectives.both.png"))
    assert page.shape == (2 * 160, 2 * 160 + 460, 3)
    assert (page[40:120, 40:120] == 77).all() and (page[40:120, 200:280] == 77).all()
    assert (page[:160, 320:] < 128).any(), "the text stands beside them"
    shown = {tag: logged.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in logged.Tags()["tensors"]}
    assert "a text" in shown["objectives/both/text_summary"] and "(another)" in shown["objectives/both/text_summary"]
    assert "only words" in shown["objectives/text/text_summary"]
    assert shown["train/texts/text_summary"].strip() == "a"
    assert not (tmp_path / "pictures" / "objectives.text.png").exists()


def test_everything_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = open_at(tmp_path)
    log_steps(writer, range(1, 4), 0.0)
    assert len(read_records(tmp_path / "metrics.jsonl")) == 3
    assert len(events(tmp_path).Scalars("train/loss")) == 3
    writer.close()


def test_no_point_is_lost_when_the_clock_was_set_back(tmp_path: Path) -> None:
    first = open_at(tmp_path)
    log_steps(first, range(1, 6), 100.0)
    first.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    ahead = int(file.name.split(".")[3]) + 3600
    file.rename(file.with_name(f"events.out.tfevents.{ahead}.host.1.0"))
    second = open_at(tmp_path, 3, 48)
    log_steps(second, range(4, 8), 200.0)
    second.close()
    expected = [(step, (100.0 if step <= 3 else 200.0) + step) for step in range(1, 8)]
    assert [(event.step // 16, event.value) for event in events(tmp_path).Scalars("train/loss")] == expected


class Recorder:
    """Writer of which a test reads what it got; `arguments` are those that it was built with."""

    opened: ClassVar[list["Recorder"]] = []

    def __init__(self, folder: Path, samples: int, logged: int | None = None, fails: str = "") -> None:
        self.logged, self.fails, self.samples = logged, fails, samples
        self.got: list[tuple[int, int, dict[str, float]]] = []
        self.settled: dict[str, Any] = {}
        Recorder.opened.append(self)
        if fails == "argument":
            raise ValueError("fails is 'argument'; expected another")
        if fails == "package":
            raise ModuleNotFoundError("No module named 'absent'", name="absent")
        if fails == "start":
            raise ConnectionError("no route to host")

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        self.got.append((step, samples, dict(values)))
        if self.fails == "service":
            raise ConnectionError("no route\nto host")
        if self.fails == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")

    def settings(self, values: Mapping[str, Any]) -> None:
        self.settled.update(values)


def recorder(**arguments: Any) -> dict[str, Any]:
    return {"recorder": {"_target_": f"{__name__}.Recorder", **arguments}}


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "opened", [])
    return Recorder.opened


@pytest.mark.parametrize(("logged", "expected"), [(None, [4, 5]), (0, [1, 2, 3, 4, 5]), (32, [3, 4, 5]), (64, [5])])
def test_resumed_writer_gets_every_record_that_it_lacks_once(
    logged: int | None, expected: list[int], tmp_path: Path, opened: list[Recorder]
) -> None:
    killed = RunWriter(tmp_path, 0, 0, {})
    log_steps(killed, range(1, 5), 0.0)
    resumed = RunWriter(tmp_path, 3, 48, recorder(logged=logged))
    log_steps(resumed, range(4, 6), 0.0)
    resumed.close()
    (writer,) = opened
    assert writer.samples == 48
    assert writer.got == [(step, 16 * step, {"train/loss": step}) for step in expected]


@pytest.mark.parametrize("fails", ["service", "start"])
def test_service_that_fails_is_left_out_with_one_warning(
    fails: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, opened: list[Recorder]
) -> None:
    writer = RunWriter(tmp_path, 0, 0, recorder(fails=fails) | runs.TENSORBOARD)
    log_steps(writer, range(1, 4), 0.0)
    writer.close()
    (warning,) = caplog.messages
    assert warning.startswith("writer.recorder failed (ConnectionError: no route to host) and is left out")
    assert len(opened[0].got) == (fails == "service")
    assert len(read_records(tmp_path / "metrics.jsonl")) == len(events(tmp_path).Scalars("train/loss")) == 3


def test_full_disk_of_a_writer_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        log_steps(RunWriter(tmp_path, 0, 0, recorder(fails="disk")), range(1, 2), 0.0)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("argument", r"^writer\.recorder: fails is 'argument'; expected another$"),
        (
            "package",
            r"^writer\.recorder needs the package 'absent', which is not installed; pip install absent, or leave",
        ),
    ],
)
def test_bad_argument_and_missing_package_are_one_line(fails: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        RunWriter(tmp_path, 0, 0, recorder(fails=fails))


class Misspelt:
    def __init__(self) -> None: ...
    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None: ...
    def imges(self, name: str, samples: int, pixels: np.ndarray) -> None: ...


class Mute:
    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Misspelt", r"^writer\.own: Misspelt\.imges is no method of a metric writer .* did you mean image\?$"),
        ("Mute", r"^writer\.own: Mute has no method scalars\(step, samples, values\)"),
    ],
)
def test_methods_are_checked_before_the_run(kind: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_writers({"own": {"_target_": f"{__name__}.{kind}"}})


def test_tensorboard_that_is_chosen_later_has_the_earlier_records(tmp_path: Path) -> None:
    first = RunWriter(tmp_path, 0, 0, {})
    log_steps(first, range(1, 4), 0.0)
    first.close()
    second = open_at(tmp_path, 2, 32)
    log_steps(second, range(3, 5), 0.0)
    second.close()
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [16, 32, 48, 64]
