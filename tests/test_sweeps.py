"""Sweeps by every launcher: killed in the middle and started again, they end as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from tests import runs

EXPERIMENT = """# @package _global_
defaults:
  - override /model: clip_tiny
  - override /eval: [contrastive_loss]
trainer: {duration: 30steps, batch_size: 16, device: cpu, precision: fp32, log_every: 1steps, eval_every: 100%%}
checkpoint: {every: 5steps}
data: {workers: 0, root: %s}
model:
  embed_dim: 16
  image: {image_size: 32, args: {embed_dim: 32, depth: 1, num_heads: 2}}
  text: {width: 32, depth: 1, num_heads: 2, context_length: 16}
"""
LAST = "step_00000030"
JOBS = [f"objective={objective},run.seed={seed}" for objective in ("infonce", "sigmoid") for seed in (0, 1, 2)]
LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra.launcher.n_jobs=2",),
    "submitit_local": ("hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"),
}


def sweep(folder: Path, pairs: Path, launcher: str) -> subprocess.Popen[str]:
    """`-m objective=infonce,sigmoid run.seed=0,1,2` in a process group of its own."""
    path = folder / "conf" / "experiment" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EXPERIMENT % pairs)
    arguments = ["-m", f"sweep={launcher}", "experiment=tiny", "objective=infonce,sigmoid", "run.seed=0,1,2"]
    return subprocess.Popen(
        [sys.executable, "-m", "mmpretrain.train", *arguments, f"hydra.searchpath=[file://{folder}/conf]",
         *LAUNCHERS[launcher]],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: runs.exact_outcome(path) for path in sorted((folder / "runs" / "tiny").iterdir())}


@pytest.fixture(scope="module")
def undisturbed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = sweep(folder, pairs, "basic")
    out, _ = process.communicate(timeout=runs.DEADLINE_SECONDS)
    assert process.returncode == 0, out
    return outcomes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_sweep_is_finished_by_the_same_command(
    launcher: str, undisturbed: dict[str, dict[str, Any]], pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "tiny"
    process = sweep(tmp_path, pairs, launcher)

    def reached() -> bool:
        saved = [{path.name for path in run.glob("checkpoints/step_*")} for run in folder.glob("*")]
        is_one_finished = any(folder.glob(f"*/checkpoints/{LAST}/scores.json"))  # written last
        return is_one_finished and any(steps and LAST not in steps for steps in saved)

    runs.poll(reached, "a finished job and one in the middle", lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    runs.kill_stragglers(str(tmp_path))
    finished = {
        path.parents[2].name: (path.parents[2] / "results.json").stat().st_mtime_ns
        for path in folder.glob(f"*/checkpoints/{LAST}/scores.json")
    }
    assert 1 <= len(finished) < len(JOBS)

    again = sweep(tmp_path, pairs, launcher)
    out, _ = again.communicate(timeout=runs.DEADLINE_SECONDS)
    assert again.returncode == 0, out
    assert {name: (folder / name / "results.json").stat().st_mtime_ns for name in finished} == finished, "repeated"
    assert outcomes(tmp_path) == undisturbed
    assert sorted(undisturbed) == JOBS


LONG = ("run.dir=run${run.seed}", "trainer.duration=100000steps", "checkpoint.every=100000steps", "schedule=constant")


def start_long_jobs(folder: Path, pairs: Path, launcher: str, seeds: str) -> runs.Command:
    """A sweep whose jobs of the seeds 0 and 1 have taken some steps."""
    before = [runs.num_records(folder / f"run{seed}") for seed in (0, 1)]
    command = runs.start_train(
        folder, "-m", f"sweep={launcher}", f"run.seed={seeds}", f"data.root={pairs}", *LONG, *LAUNCHERS[launcher]
    )
    command.wait_for(
        lambda: all(runs.num_records(folder / f"run{seed}") >= before[seed] + 3 for seed in (0, 1)), "some steps"
    )
    return command


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "seeds"), [("joblib", "0,1,2"), ("submitit_local", "0,1")])
def test_a_signal_to_a_sweep_ends_its_jobs_with_checkpoints(
    launcher: str, seeds: str, pairs: Path, tmp_path: Path
) -> None:
    for start in (0, 1):
        command = start_long_jobs(tmp_path, pairs, launcher, seeds)
        command.send(signal.SIGTERM)
        command.send(signal.SIGTERM)  # as launchers forward it
        finished = command.wait()
        assert finished.code == 85, finished.stderr
        lines = finished.stderr.splitlines()
        assert lines.count("stopped by a signal; the same command goes on") == 1
        assert not finished.errors and "Traceback" not in finished.stderr
        for run in (tmp_path / "run0", tmp_path / "run1"):
            assert len(runs.checkpoints(run)) == start + 1
            assert runs.checkpoints(run)[-1].name == f"step_{runs.records(run)[-1]['step']:08d}"
    assert not (tmp_path / "run2").exists(), "joblib has started another job"


@pytest.mark.slow
def test_a_killed_worker_of_joblib_is_one_line(pairs: Path, tmp_path: Path) -> None:
    command = start_long_jobs(tmp_path, pairs, "joblib", "0,1")
    workers = [
        each for each in runs.children(command.pid) if b"popen_loky" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    (line,) = finished.errors
    assert line.startswith("error: the launcher of the jobs failed (TerminatedWorkerError: ")


@pytest.mark.slow
def test_an_error_in_own_code_keeps_its_traceback_from_a_job_in_another_process(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from mmpretrain.objectives.infonce import InfoNCE\n\n\n"
        "class Broken(InfoNCE):\n    def after_step(self, *args):\n        1 / 0\n"
    )
    finished = runs.train(
        tmp_path, "-m", "sweep=joblib", "run.seed=0,1", "objective.infonce._target_=own.Broken", *LONG, f"data.root={pairs}",
        environment={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert finished.code == 1
    assert "ZeroDivisionError: division by zero" in finished.stderr.splitlines()
    assert not finished.errors


def test_a_signal_to_a_sweep_says_which_jobs_of_slurm_go_on(tmp_path: Path) -> None:
    # Programs that answer as Slurm's do, since there is no Slurm here.
    answers = {
        "srun": "",
        "sbatch": "Submitted batch job 7",
        "sacct": "JobID|State|NodeList\n7_0|RUNNING|a\n7_1|RUNNING|a",
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/{name}.called\nprintf '{answer}\\n'\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = runs.start_train(tmp_path, "-m", "sweep=slurm", "run.seed=0,1", environment=environment)
    command.wait_for((tmp_path / "sacct.called").exists, "a submitted job")
    command.send(signal.SIGTERM)
    finished = command.wait()
    assert finished.code == 85, finished.stderr
    message = "stopped by a signal; Slurm's jobs 7 go on; before the same command, wait for them or scancel 7"
    assert finished.stderr.splitlines()[-1] == message


def hparams(run: Path) -> tuple[dict[str, Any], list[str]]:
    """(settings, names of metrics) of a run in TensorBoard's table."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    content = events.summary_metadata
    settings: dict[str, Any] = {}
    data = plugin_data_pb2.HParamsPluginData.FromString
    start = data(content["_hparams_/session_start_info"].plugin_data.content).session_start_info
    for name, value in start.hparams.items():
        settings[name] = getattr(value, value.WhichOneof("kind"))
    experiment = data(content["_hparams_/experiment"].plugin_data.content).experiment
    assert [i.name for i in experiment.hparam_infos if i.differs] == ["seed", "objective", "model", "batch_size", "lr"]
    return settings, [info.name.tag for info in experiment.metric_infos]


@pytest.mark.slow
def test_every_run_stands_in_the_table_of_runs_under_the_same_keys(pairs: Path, tmp_path: Path) -> None:
    for name, objective in (("a", "infonce"), ("b", "sigmoid")):
        finished = runs.train(
            tmp_path, f"data.root={pairs}", "trainer.duration=2steps", f"objective=[{objective}]", f"run.dir={name}"
        )
        assert finished.code == 0, finished.stderr
    (first, metrics), (second, _) = hparams(tmp_path / "a"), hparams(tmp_path / "b")
    assert first.keys() == second.keys()
    assert {"objective", "lr", "batch_size", "seed", "precision", "duration"} <= first.keys()
    assert (first["objective"], second["objective"]) == ("1 infonce", "1 sigmoid")
    assert {"train/loss", "eval-val/image_retrieval_recall@1"} <= set(metrics)
