"""The benchmarks' checks, what they refuse, and all that fit this machine at a small size."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis.benchmarks import __main__ as all_of_them
from analysis.benchmarks import data, hold_out, jpeg_tars
from analysis.benchmarks.cluster import by_link
from analysis.benchmarks.gpu import PARTS, PartRun, write_table
from analysis.benchmarks.machine import demand
from analysis.benchmarks.step import OpenClip, Work, check_groups, gaps, make_sides, trace
from analysis.benchmarks.training_commands import read_open_clip_log
from mmpretrain.data.loader import build_loader
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.schedules import Clock
from mmpretrain.training.traffic import Collective

SMALL = {
    "cluster": ["--model", "emoji_clip", "--batch", "32", "--ranks", "2,16", "--micro-batch", "2"],
    "data": ["--sides", "256", "--images", "64", "--rounds", "1"],
    "evaluators": ["--samples", "200", "--width", "16", "--classes", "4"],
    "grad_cache": ["--batch", "16", "--micro-batch", "8", "--image-size", "64"],
    "loss_memory": ["--batch", "256", "--width", "32", "--rounds", "1"],
    "order": ["--samples", "1e6", "--rounds", "1"],
    "packing": ["--batch", "8", "--rounds", "1"],
    "randomness": ["--batch", "4", "--rounds", "1", "--precision", "fp32"],
    "open_shards": ["--shards", "20", "--samples", "100", "--processes", "1,2"],
    "scaling": ["--processes", "1,2", "--batch", "8", "--steps", "1", "--timed", "1", "--rounds", "1"],
    "step": ["--model", "emoji_clip", "--batch", "4", "--steps", "2", "--rounds", "1", "--round-steps", "1"],
}


@pytest.mark.parametrize("difference", [2e-9, float("nan"), float("inf")])
def test_what_differs_or_is_no_number_ends_a_benchmark(difference: float) -> None:
    demand("gradients", 1e-9, 1e-9)
    with pytest.raises(SystemExit, match=r"gradients differ by .* expected 1e-09 at most"):
        demand("gradients", difference, 1e-9)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("step --precision fp16", "argument --precision: 'fp16'; expected one of fp32, bf16"),
        ("step --model nosuch", "argument --model: 'nosuch'; expected emoji_clip, or a model of open_clip"),
        (
            "step --captions nowhere",
            "argument --captions: no *.tar in 'nowhere'; expected a folder of tars or a number",
        ),
        ("step --captions 1", "argument --captions: '1' tokens; expected 2 at least"),
        ("step --batch 0", "argument --batch: '0'; expected a whole number of at least 1"),
        ("data --sides 512,abc", "argument --sides: 'abc'; expected a whole number"),
        ("data --images 65", "--images 65: expected a multiple of 64"),
        ("data --photographs nowhere", "argument --photographs: 'nowhere' does not exist"),
        ("loss_memory --rounds 0", "argument --rounds: '0'; expected"),
        ("grad_cache --batch 96", "--batch 96: expected a multiple of 2 processes x 64 of --micro-batch"),
        ("grad_cache --image-size x", "argument --image-size: 'x'; expected"),
        ("packing --rows 16", "--rows 16: expected 24 at least, the longest caption's length"),
        ("scaling --strategies zero", "argument --strategies: 'zero'; expected one of ddp, fsdp"),
        ("scaling --processes 3 --batch 8", "--batch 8: expected a multiple of 3 processes"),
        ("order --samples 1e6,1.5", "argument --samples: '1.5'; expected a whole number"),
        ("order --output nowhere/order.json", "argument --output: 'nowhere/order.json'; expected a file in a folder"),
        ("hold_out nowhere.tsv --by a --image b --output c", "argument table: 'nowhere.tsv' does not exist"),
        ("jpeg_tars --output x --tars -1", "argument --tars: '-1'; expected a whole number"),
        (
            "train_vs_open_clip --data emoji --data-root x --open-clip-python nowhere --output o.json",
            "argument --open-clip-python: 'nowhere' does not exist",
        ),
        (
            "train_vs_open_clip --data speed --data-root x --open-clip-python . --output o --device cuda --precision fp32",
            "--precision fp32 with --device cuda: open_clip's command computes it in TF32; expected bf16",
        ),
        (
            "train_vs_open_clip --data speed --data-root . --open-clip-python . --output o --recipe objective=flip",
            "--recipe 'objective=flip' with --data speed: expected data with scores that it is to reach",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = command.split()
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(f"analysis.benchmarks.{module}").main(arguments)
    assert raised.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


def emoji_work(captions: str = "8") -> Work:
    return Work("emoji_clip", 4, captions, "fp32", torch.device("cpu"))


def test_steps_of_both_sides_agree_and_others_end_the_benchmark() -> None:
    """One pixel of one image on one side is enough."""
    sides = make_sides(emoji_work(), 1, best=False)
    assert max(trace(sides, 1, "fp32").values()) < 1e-5
    sides = make_sides(emoji_work(), 1, best=False)
    theirs = sides["open_clip"]
    assert isinstance(theirs, OpenClip)
    theirs.batches[0][0][0, 0, 5, 5] += 3.0
    with pytest.raises(SystemExit, match=r"^losses of mmpretrain differ by .* expected 1e-05 at most$"):
        trace(sides, 1, "fp32")


def test_sides_that_update_differently_end_the_benchmark() -> None:
    sides = make_sides(emoji_work(), 1, best=False)
    ours, theirs = sides["mmpretrain"], sides["open_clip"]
    check_groups(ours, theirs)  # type: ignore[arg-type]
    theirs.optimizer.param_groups[1]["weight_decay"] = 0.2
    with pytest.raises(SystemExit, match=r"is updated by .*'weight_decay': 0\.1.* here and by .*0\.2.* in open_clip$"):
        check_groups(ours, theirs)  # type: ignore[arg-type]


def test_captions_longer_than_the_context_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"^--captions 99: emoji_clip has a context of 77 tokens at most$"):
        make_sides(emoji_work("99"), 1, best=False)


def test_other_tokens_end_the_benchmark_of_data(tmp_path: Path) -> None:
    tar = tmp_path / "0.tar"
    images = jpeg_tars.write_tar(tar, [], 256, 64)
    (batch,) = build_loader({"pairs": data.mmpretrain_stream(tar)}, ClipTokenizer(), Clock(1, 1), 0, 1)
    assert 0 <= data.check(tar, images[:2], [batch]) < 3
    text = batch.streams["pairs"].text
    assert text is not None
    text[3, 2] += 1
    with pytest.raises(SystemExit, match=r"has other tokens here than in open_clip$"):
        data.check(tar, images[:2], [batch])


LOG = """2026-11-21,10:00:00 | INFO | Start epoch 0
2026-11-21,10:00:05 | INFO | Train Epoch: 0 [ 128/1280 (10%)] Data (t): 5.000 Batch (t): 5.100, 9/s LR: 0.1
2026-11-21,10:00:06 | INFO | Train Epoch: 0 [1280/1280 (100%)] Data (t): 0.000 Batch (t): 0.100, 9/s LR: 0.1
2026-11-21,10:00:11 | INFO | Train Epoch: 1 [ 128/1280 (10%)] Data (t): 5.000 Batch (t): 5.100, 9/s LR: 0.1
2026-11-21,10:00:26 | INFO | Train Epoch: 1 [1280/1280 (100%)] Data (t): 0.000 Batch (t): 1.600, 9/s LR: 0.1
"""


def test_open_clips_log_is_weighed_by_the_steps_that_a_line_tells_of() -> None:
    read = read_open_clip_log(LOG, 2)
    assert read["pairs"] == 2560
    assert read["pairs_per_second"] == pytest.approx((2560 - 128) / 21)
    assert read["data_wait"] == pytest.approx(5 / (9 * 0.1 + 5.1 + 9 * 1.6))


@pytest.mark.parametrize(("log", "seconds"), [("", 0), ("\n".join(LOG.splitlines()[:3]), 1)])
def test_a_log_too_short_for_a_speed_is_refused(log: str, seconds: int) -> None:
    with pytest.raises(SystemExit, match=rf"^open_clip's log tells {seconds} s of training; expected 10 at least"):
        read_open_clip_log(log, 1)


def test_values_are_held_out_whole_and_the_same_every_time(tmp_path: Path) -> None:
    table = tmp_path / "pairs.tsv"
    rows = [f"{i // 3}\tpictures/{i}.png\ta caption" for i in range(300)]
    table.write_text("\n".join(["base\timage\tcaption", *rows]) + "\n")
    arguments = [str(table), "--by", "base", "--image", "image", "--output"]
    parts: list[dict[str, list[dict[str, str]]]] = []
    for name in ("one", "other"):
        hold_out.main([*arguments, str(tmp_path / name)])
        parts.append(
            {
                part: list(csv.DictReader((tmp_path / name / f"{part}.tsv").open(), delimiter="\t"))
                for part in ("train", "val")
            }
        )
    assert parts[0] == parts[1]
    bases = {part: {row["base"] for row in parts[0][part]} for part in ("train", "val")}
    assert not bases["train"] & bases["val"] and 0 < len(bases["val"]) < 30
    assert sum(map(len, parts[0].values())) == 300
    assert Path(parts[0]["val"][0]["image"]).is_absolute()


def test_photographs_that_are_not_there_are_not_asked_for(tmp_path: Path) -> None:
    """`make bench` measures pictures of noise then."""
    there = all_of_them.commands(tmp_path, tmp_path)["data"]
    assert there[-2:] == ["--photographs", str(tmp_path)]
    assert all_of_them.commands(tmp_path, tmp_path / "nowhere")["data"] == there[:-2]


@pytest.mark.parametrize(
    ("spans", "share"),
    [([], 1.0), ([(0.0, 1.0)], 0.0), ([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0)], 0.25), ([(0.0, 4.0), (1.0, 2.0)], 0.0)],
)
def test_gaps_are_what_no_kernel_covers(spans: list[tuple[float, float]], share: float) -> None:
    assert gaps(spans) == pytest.approx(share)


def test_bytes_are_those_of_nvlink_and_of_one_network_card() -> None:
    machine, pair, all_ranks = tuple(range(8)), (0, 8), tuple(range(16))
    seen = [Collective("allgather", machine, 8.0), Collective("allreduce", pair, 16.0)]
    assert by_link(seen, per_machine=8) == ({"allgather": 8.0}, {"allreduce": 16.0})
    assert by_link([Collective("allreduce", all_ranks, 16.0)], per_machine=8) == (
        {"allreduce": 16.0},
        {"allreduce": 2.0},
    )


def gpu_table(folder: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """What the benchmarks of a GPU print at a tiny size, and their table."""
    command = [sys.executable, "-m", "analysis.benchmarks.gpu", "--size", "tiny", "--output", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, (folder / "table.md").read_text(encoding="utf-8")


def test_the_table_of_a_gpu_leaves_out_other_commits_and_records_that_are_not_whole(tmp_path: Path) -> None:
    run = PartRun("tests", tmp_path, "tiny", sys.executable, 1.0)
    record, asked = tmp_path / "tests.json", tmp_path / "tests.asked.json"
    record.write_text(json.dumps({"outcomes": {"passed": 7}}), encoding="utf-8")
    asked.write_text(json.dumps(run._described()), encoding="utf-8")
    assert "| tests | 7 passed |" in write_table(tmp_path, {"tests": run}) and run.is_done
    for other in ({"commit": "another"}, {"machine": {"gpu": "another"}}):
        asked.write_text(json.dumps({**run._described(), **other}), encoding="utf-8")
        assert "7 passed" not in write_table(tmp_path, {"tests": run}) and not run.is_done
    asked.write_text(json.dumps(run._described()), encoding="utf-8")
    record.write_text('{"outcomes": {', encoding="utf-8")  # as a kill leaves it
    assert not run.is_done and "tests" not in write_table(tmp_path, {"tests": run})


@pytest.mark.slow
def test_a_part_of_the_gpu_benchmarks_that_takes_too_long_is_stopped_and_the_others_run(tmp_path: Path) -> None:
    printed, table = gpu_table(tmp_path, "--parts", "step_b32", "--part-minutes", "0.01", code=1)
    assert "step_b32: stopped after 0.01 minutes" in printed and "step_b32" not in table


@pytest.mark.slow
def test_the_benchmarks_of_a_gpu_run_on_the_cpu_and_are_not_repeated(tmp_path: Path) -> None:
    printed, table = gpu_table(tmp_path, "--parts", "step_b32")
    assert "step_b32 ..." in printed and "| step_b32 | mmpretrain, bf16 |" in table
    # The other parts of `step_` and `train_` are these two with other models.
    parts = [name for name in PARTS if not name.startswith(("step_", "train_")) or name.endswith("_b32")]
    printed, table = gpu_table(tmp_path, "--parts", ",".join(parts))
    assert "step_b32 ..." not in printed and "data ..." in printed
    for row in (
        "| step_b32 | open_clip, bf16 |",
        "| train_b32 | open_clip: failed: exit code 1",
        "| train_b32 | mmpretrain | ",
        "| tests | 0 passed, 0 failed, ",
        "| data | mmpretrain, ",
    ):
        assert row in table, table


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"analysis.benchmarks.{name}", *SMALL[name], "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["machine"]["cores"] > 0 and len(record) > 3
