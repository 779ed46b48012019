"""Random damage to a run's directory: every reader answers in one line, and nothing is written or run elsewhere.

FUZZ_SECONDS=600 goes on with new random examples for that long.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from analysis.__main__ import main as analysis
from analysis.runs import read_run
from mmpretrain.checkpoints.load import load_checkpoint
from mmpretrain.config import config_yaml
from mmpretrain.reporting import report
from mmpretrain.reporting.writers import RunWriter
from mmpretrain.training import resume
from tests import runs
from tests.checkpoints.test_untrusted import sign
from tests.saved_runs import save_whole_run

STEP = "checkpoints/step_00000005"
FILES = (
    "config.yaml", "metrics.jsonl", "results.json", "quarantine.jsonl", "checkpoints/latest",
    f"{STEP}/state.json", f"{STEP}/manifest.json", f"{STEP}/model.safetensors", f"{STEP}/optimizer.safetensors",
)  # fmt: skip
HOSTILE = st.sampled_from(
    [
        {"_target_": "os.mkdir", "path": "MARK"}, [{"_target_": "os.mkdir", "path": "MARK", "_partial_": True}],
        "${oc.env:HOME}", "${", "../../../x", "/etc/passwd", "hf-hub:a/b", "local-dir:/etc", "<script>", "[/red]",
        "$\\frac{$",
        "\x1b[2J", "\u202e", "", 10**9, 10**30, -1, 0, 1e308, 1e999, float("nan"), True, None, {}, [], {"a": {"b": [1]}},
    ]
)  # fmt: skip
VALUES = st.one_of(HOSTILE, st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    save_whole_run(folder / "whole")
    yield folder
    shutil.rmtree(folder)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of a plain structure."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def damage_value(data: st.DataObject, plain: Any) -> Any:
    """One value of a plain structure replaced, removed or added."""
    *parents, key = data.draw(st.sampled_from(places(plain)[1:] or [("a",)]))
    node = plain
    for parent in parents:
        node = node[parent]
    kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "remove" and isinstance(node, dict):
        node.pop(key, None)
    elif kind == "add" and isinstance(node, dict):
        node[data.draw(st.one_of(st.text(max_size=10), st.sampled_from(["_target_", "../x", "a/b", "$x"])))] = (
            data.draw(VALUES)
        )
    else:
        node[key] = data.draw(VALUES)
    return plain


def damage(data: st.DataObject, run: Path) -> None:
    """Change one file of a run's directory."""
    whole = [name for name in FILES if (run / name).is_file() and not (run / name).is_symlink()]
    name = data.draw(st.sampled_from(whole))
    path, content = run / name, (run / name).read_bytes()
    kind = data.draw(
        st.sampled_from(["value", "value", "value", "bytes", "cut", "repeat", "nest", "absent", "pipe", "link"])
    )
    if (kind == "value" and b"[[" in content) or b'{"a":{' in content:
        kind = "bytes"  # it is damaged already, beyond what this test itself can parse
    if kind == "value" and name == "config.yaml":
        path.write_text(yaml.safe_dump(damage_value(data, config_yaml.from_yaml(content.decode()))))
    elif kind == "value" and name.endswith(".json"):
        path.write_text(json.dumps(damage_value(data, json.loads(content))))
    elif kind == "value" and name.endswith(".jsonl"):
        lines = [json.loads(line) for line in content.splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in damage_value(data, lines)))
    elif kind in ("value", "bytes"):
        changed, place = bytearray(content), data.draw(st.integers(0, min(len(content) - 1, 2000)))
        changed[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=8))
        path.write_bytes(bytes(changed))
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif kind == "repeat":
        path.write_bytes(content * data.draw(st.integers(2, 4)))
    elif kind == "nest":
        path.write_bytes(
            data.draw(st.sampled_from([b"[", b'{"a":', b"a: [", b"- "])) * data.draw(st.integers(1, 50_000))
        )
    else:
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(data.draw(st.sampled_from(["/etc/passwd", "/dev/zero", "/nowhere", ".", path.name])))
    if data.draw(st.booleans()) and (run / STEP).is_dir():
        manifest = run / STEP / "manifest.json"
        if not manifest.is_fifo() and not manifest.is_symlink():
            sign(run / STEP)


def compare(run: Path) -> None:
    """`python -m analysis compare`, whose error is its exit code."""
    analysis(["compare", str(run)])


READERS: tuple[Callable[[Path], Any], ...] = (
    load_checkpoint,
    report.write,
    compare,
    lambda run: read_run(run).curve("train/loss", "samples"),
    lambda run: resume.read_state(run / STEP),
    lambda run: RunWriter(run, 1, 16, runs.TENSORBOARD).close(),
)


def check(data: st.DataObject, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Damage a copy of the run, and read it in one way."""
    run = whole / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole / "whole", run)
    for _ in range(data.draw(st.integers(1, 3))):
        with suppress(ValueError, IndexError, TypeError, KeyError, yaml.YAMLError):  # damaged before, no more to change
            damage(data, run)
    before = sorted(path.name for path in whole.iterdir())
    try:
        data.draw(st.sampled_from(READERS))(run)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error), error
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out + shown.err and "Traceback" not in shown.err
    assert sum(line.startswith("error: ") for line in shown.err.splitlines()) <= 1
    assert sorted(path.name for path in whole.iterdir()) == before
    assert not Path("MARK").exists()


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
@pytest.mark.slow
def test_readers_of_a_damaged_run_answer_in_one_line(
    data: st.DataObject, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check(data, whole, capfd)


@pytest.mark.slow
@pytest.mark.skipif("FUZZ_SECONDS" not in os.environ, reason="FUZZ_SECONDS says how long")
def test_readers_of_a_damaged_run_answer_for_as_long_as_is_asked(
    whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    end = time.monotonic() + float(os.environ["FUZZ_SECONDS"])

    @settings(
        max_examples=50, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def fuzz(data: st.DataObject) -> None:
        check(data, whole, capfd)

    while time.monotonic() < end:
        fuzz()
