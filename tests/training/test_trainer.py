"""The loop at a tiny size, by the real command: what is logged, the non-finite guard, refused samples, the scores."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import runs

# ---------------------------------------------------------------------------------------------- refused samples


def quarantined(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_refused_samples_are_quarantined_once_over_epochs_and_resumes(workers: int, tmp_path: Path) -> None:
    data = runs.write_pairs(tmp_path / "data", broken=(3, 50, 120))
    settings = (f"data.root={data}", "schedule=constant", "eval=[]", f"data.workers={workers}")
    assert runs.train(tmp_path, *settings, "trainer.duration=13steps").code == 0
    first = quarantined(tmp_path / "run")
    assert runs.train(tmp_path, *settings, "trainer.duration=39steps").code == 0
    refused = quarantined(tmp_path / "run")
    assert first == refused[: len(first)]
    train = data / "train"
    assert sorted((record["shard"], record["key"]) for record in refused) == [
        (f"{train}/000000.tar", "000003"),
        (f"{train}/000000.tar", "000050"),
        (f"{train}/000001.tar", "000120"),
    ]
    assert all(record["stream"] == "pairs" and "image" in record["reason"] for record in refused)
    state = json.loads((runs.checkpoints(tmp_path / "run")[-1] / "state.json").read_text())
    assert state["num_refused"] >= 9, "each of three samples is met once in each of three epochs"


def test_too_many_refused_samples_end_the_run_in_one_line(tmp_path: Path) -> None:
    data = runs.write_pairs(tmp_path / "data", broken=range(0, 200, 4))
    finished = runs.train(tmp_path, f"data.root={data}", "data.max_bad_fraction=0.02", "trainer.duration=50steps")
    assert finished.code == 1
    (line,) = [line for line in finished.stderr.splitlines() if "error: " in line]
    assert "data.max_bad_fraction = 0.02" in line
    assert "quarantine.jsonl" in line
    assert "Traceback" not in finished.stderr
    assert len(quarantined(tmp_path / "run")) > 10


# ---------------------------------------------------------------------------------------------- what is logged


@pytest.fixture(scope="module")
def finished_run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that logs every second and evaluates every third."""
    folder = tmp_path_factory.mktemp("finished")
    finished = runs.train(
        folder, f"data.root={pairs}", "trainer.duration=6steps", "trainer.log_every=2steps",
        "trainer.eval_every=3steps", "eval=[retrieval,contrastive_loss]", "objective=[infonce,mae]", *runs.TINY_MAE,
        "trainer.precision=bf16",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    return folder / "run"


def test_every_logged_step_has_the_names_of_the_design(finished_run: Path) -> None:
    logged = [record for record in runs.records(finished_run) if "train/loss" in record]
    assert [(record["step"], record["samples"]) for record in logged] == [(2, 32), (4, 64), (6, 96)]
    for record in logged:
        assert {
            "train/infonce_loss", "train/mae_loss", "train/infonce_logit_scale", "train/lr", "train/grad_norm",
            "train/grad_norm_image", "train/grad_norm_text", "train/grad_norm_heads", "system/samples_per_second",
            "system/data_wait",
        } <= set(record)  # fmt: skip
        assert record["train/loss"] == pytest.approx(record["train/infonce_loss"] + record["train/mae_loss"])
        towers = [record[f"train/grad_norm_{tower}"] for tower in ("image", "text", "heads")]
        assert record["train/grad_norm"] == pytest.approx(math.hypot(*towers), rel=1e-5)
        assert 0 <= record["system/data_wait"] <= 1


def test_evaluations_run_when_due_and_at_the_end(finished_run: Path) -> None:
    evaluated = [record["step"] for record in runs.records(finished_run) if "eval-val/contrastive_loss" in record]
    assert evaluated == [3, 6]


def test_results_hold_the_last_scores_and_the_length(finished_run: Path) -> None:
    results = runs.results(finished_run)
    last = [record for record in runs.records(finished_run) if "eval-val/contrastive_loss" in record][-1]
    scores = {name: value for name, value in last.items() if name.startswith("eval-")}
    assert {name: results[name] for name in scores} == scores
    assert {name for name in results if name not in scores} == {"steps", "samples", "wall_seconds", "pairs_per_second"}
    assert (results["steps"], results["samples"]) == (6, 96)
    assert results["wall_seconds"] > 0
    assert results["pairs_per_second"] > 96 / results["wall_seconds"]


def test_training_pairs_are_shown_in_tensorboard(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("train/pairs")] == [0]


def test_evaluate_command_gives_the_scores_of_training(finished_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = [f"checkpoint={finished_run}", "device=cpu", "data.workers=0", f"output={output}"]
    finished = runs.run("mmpretrain.evaluate", arguments, tmp_path)
    assert finished.code == 0, finished.stderr
    assert (
        "eval: no set of data.val has what these need, which give no score: zero_shot needs label and classes"
        in finished.stderr
    )
    scores, results = json.loads(output.read_text()), runs.results(finished_run)
    names = [name for name in results if name.startswith("eval-")]
    assert len(names) == 7
    expected = {name: pytest.approx(results[name], rel=1e-6) for name in names}
    assert {name: scores[name] for name in names} == expected

    # Spread over two processes, and from a path as the names of our runs are.
    named = tmp_path / "objective=infonce,run.seed=0"
    named.symlink_to(finished_run)
    arguments[0] = f"checkpoint={named}"
    ranks = [runs.Command("mmpretrain.evaluate", arguments, tmp_path, environment) for environment in runs.group(2)]
    assert [rank.wait().code for rank in ranks] == [0, 0]
    scores = json.loads(output.read_text())
    assert {name: scores[name] for name in names} == expected


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["checkpoint=nowhere"], ("nowhere", "holds no checkpoint")),
        ([], ("checkpoint has no value", "checkpoint=...")),
        (["checkpoint=RUN", "eval=[retreival]"], ("'retreival'", "did you mean 'retrieval'?")),
        (["checkpoint=RUN", "precison=fp32"], ("'precison'", "did you mean 'precision'?")),
        (["checkpoint=RUN", "data.root=/nowhere"], ("/nowhere/val", "name existing tars")),
        (["checkpoint=RUN", "data.workers=-1"], ("data.workers is -1", "at least 0")),
        (["checkpoint=RUN", "data.val_batch_size=0"], ("data.val_batch_size is 0", "at least 1")),
        (["checkpoint=RUN", "eval=[zero_shot]"], ("zero_shot needs label and classes", "+data.val.mine.label=...")),
        (["checkpoint=nowhere", "output=absent/x.json"], ("output is 'absent/x.json'", "a folder that exists")),
        (["checkpoint=nowhere", "output=/tmp"], ("output is '/tmp'", "a file in a folder that exists")),
    ],
)
def test_wrong_use_of_evaluate_is_answered_in_one_line(
    arguments: list[str], fragments: tuple[str, str], finished_run: Path, tmp_path: Path
) -> None:
    arguments = [argument.replace("RUN", str(finished_run)) for argument in arguments]
    finished = runs.run("mmpretrain.evaluate", [*arguments, "device=cpu"], tmp_path)
    assert finished.code == 2
    line = finished.stderr.splitlines()[-1]
    assert len(finished.errors) == 1
    assert line.startswith("error: ")
    assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda text: "a: 1\n", ("config.yaml has no 'data'", "as the run wrote it")),
        (lambda text: "a: [1", ("config.yaml is no YAML",)),
        (
            lambda text: text.replace("embed_dim: 16", "embed_dim: 8"),
            ("does not hold the weights", "image_projection.weight is [16, 32], expected [8, 32]"),
        ),
        (
            lambda text: text.replace("mmpretrain.models.text.TextTransformer", "os.system"),
            ("_target_ is 'os.system'",),
        ),
    ],
    ids=["another file", "no YAML", "another model", "code of others"],
)
def test_evaluate_refuses_a_configuration_that_is_not_the_runs(
    change: Callable[[str], str], fragments: tuple[str, ...], finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(finished_run / "checkpoints")
    text = (finished_run / "config.yaml").read_text()
    assert change(text) != text
    (run / "config.yaml").write_text(change(text))
    finished = runs.run("mmpretrain.evaluate", [f"checkpoint={run}", "device=cpu"], tmp_path)
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert all(fragment in line for fragment in fragments), line


# ---------------------------------------------------------------------------------------------- after a kill


@pytest.mark.parametrize("saved", [True, False], ids=["after a checkpoint", "before the first checkpoint"])
def test_no_step_appears_twice_after_a_kill(saved: bool, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (
        f"data.root={pairs}", "trainer.duration=20steps", f"trainer.eval_every={4 if saved else 1000}steps",
        f"checkpoint.every={8 if saved else 1000}steps",
    )  # fmt: skip
    command = runs.start_train(tmp_path, *settings)
    command.wait_for(lambda: runs.num_records(run) >= 13, "13 records")
    command.send(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    assert bool(runs.checkpoints(run)) == saved
    # TensorBoard writes from time to time; whatever a kill left of it must be taken back or still be there.
    finished = runs.train(tmp_path, *settings)
    assert finished.code == 0, finished.stderr

    steps = list(range(1, 21))
    records = runs.records(run)
    assert [record["step"] for record in records if "train/loss" in record] == steps
    assert [record["step"] for record in records if "eval-val/image_retrieval_recall@1" in record] == (
        [4, 8, 12, 16, 20] if saved else [20]
    )
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [step * runs.BATCH_SIZE for step in steps]
    logged = [record["train/loss"] for record in records if "train/loss" in record]
    assert [event.value for event in losses] == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in events.Images("train/pairs")] == [0]
