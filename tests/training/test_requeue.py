"""Jobs of submitit that are preempted or reach their time limit: they save, are requeued, and go on."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests import runs

SWEEP = ("-m", "sweep=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1")
SETTINGS = ("trainer.duration=100steps", "checkpoint.every=1000steps")


def tasks(folder: Path, number: int = 0) -> dict[str, int]:
    """The processes of the tasks, which work in the folder, of the job with this number, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if (
                os.readlink(entry / "cwd") == str(folder)
                and b"submitit.core._submit" in (entry / "cmdline").read_bytes()
            ):
                variables = dict(re.findall(r"SUBMITIT_LOCAL_(\w+)=(\d+)", (entry / "environ").read_text()))
                (job,) = folder.rglob(f"{variables['JOB_ID']}_submitted.pkl")
                if f"job_id_for_{number}".encode() in job.read_bytes():
                    found[variables["GLOBALID"]] = int(entry.name)
        except OSError:  # no process, or one that has just ended
            continue
    return found


def send_after_some_steps(command: runs.Command, folder: Path, number: signal.Signals) -> None:
    """Send a signal to all tasks, as Slurm and submitit do."""
    before = runs.num_records(folder / "run")
    command.wait_for(lambda: runs.num_records(folder / "run") >= before + 3, "some steps")
    for task in tasks(folder).values():
        os.kill(task, number)


def logs(folder: Path) -> str:
    """What the tasks wrote to stderr."""
    return "".join(path.read_text() for path in sorted(folder.rglob(".submitit/*/*_log.err")))


@pytest.fixture
def undisturbed(pairs: Path, tmp_path: Path) -> Path:
    """The run of two processes that nothing has interrupted."""
    return runs.trained_group(tmp_path / "undisturbed", 2, f"data.root={pairs}", *SETTINGS)


@pytest.mark.slow
def test_a_preempted_job_of_two_tasks_ends_as_if_nothing_had_happened(
    undisturbed: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "preempted"
    folder.mkdir()
    run = folder / "run"
    command = runs.start_train(folder, *SWEEP, "hydra.launcher.timeout_min=60", f"data.root={pairs}", *SETTINGS)
    # As Slurm sends them; the first asks for a checkpoint alone.
    send_after_some_steps(command, folder, signal.SIGTERM)
    command.wait_for(lambda: runs.checkpoints(run), "a checkpoint")
    send_after_some_steps(command, folder, signal.SIGUSR2)
    finished = command.wait()
    assert finished.code == 0, finished.stderr + logs(folder)
    assert not finished.errors
    stopped = re.search(r"stopped by a signal at step (\d+)", logs(folder))
    assert stopped is not None and f"at step {stopped[1]}\n" in logs(folder).partition("resumed from")[2]
    assert runs.exact_outcome(run) == runs.exact_outcome(undisturbed)


@pytest.mark.slow
def test_a_signal_to_another_task_alone_requeues_the_job(undisturbed: Path, pairs: Path, tmp_path: Path) -> None:
    """On several nodes it reaches the tasks at different times."""
    folder = tmp_path / "preempted"
    folder.mkdir()
    command = runs.start_train(folder, *SWEEP, "hydra.launcher.timeout_min=60", f"data.root={pairs}", *SETTINGS)
    command.wait_for(lambda: runs.num_records(folder / "run") >= 3, "some steps")
    os.kill(tasks(folder)["1"], signal.SIGUSR2)
    finished = command.wait()
    assert finished.code == 0, finished.stderr + logs(folder)
    assert "resumed from" in logs(folder)
    assert runs.exact_outcome(folder / "run") == runs.exact_outcome(undisturbed)


@pytest.mark.slow
def test_a_signal_to_another_task_alone_requeues_the_job_in_an_evaluation(pairs: Path, tmp_path: Path) -> None:
    many = (f"data.val.val.shards=[{','.join(['val'] * 20)}]", "data.val_batch_size=1", "trainer.duration=4steps")
    command = runs.start_train(tmp_path, *SWEEP, "hydra.launcher.timeout_min=60", f"data.root={pairs}", *many)
    command.wait_for(lambda: runs.checkpoints(tmp_path / "run"), "the last checkpoint")
    os.kill(tasks(tmp_path)["1"], signal.SIGUSR2)
    finished = command.wait()
    assert finished.code == 0, finished.stderr + logs(tmp_path)
    assert "stopped by a signal at step 4" in logs(tmp_path)
    assert runs.results(tmp_path / "run")["steps"] == 4


@pytest.mark.slow
def test_a_preempted_job_of_which_a_task_is_stopped_goes_on(undisturbed: Path, pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "preempted"
    folder.mkdir()
    run = folder / "run"
    command = runs.start_train(folder, *SWEEP, "hydra.launcher.timeout_min=60", f"data.root={pairs}", *SETTINGS)
    command.wait_for(lambda: runs.num_records(run) >= 3, "some steps")
    first, second = (tasks(folder)[rank] for rank in ("0", "1"))
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGUSR2)
    command.wait_for(lambda: "0" not in tasks(folder), "end of the first task")
    os.kill(second, signal.SIGKILL)
    finished = command.wait()
    assert finished.code == 0, finished.stderr + logs(folder)
    assert runs.exact_outcome(run) == runs.exact_outcome(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "tasks_per_node"), [(signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_a_job_without_a_result_is_named_after_the_others_have_ended(
    number: signal.Signals, tasks_per_node: int, pairs: Path, tmp_path: Path
) -> None:
    """A task that is killed, as for lack of memory, has no result, and neither has one that SIGINT ends with 85."""
    jobs = ("run.seed=0,1", "run.dir=run${run.seed}", f"hydra.launcher.tasks_per_node={tasks_per_node}")
    command = runs.start_train(tmp_path, *SWEEP, *jobs, f"data.root={pairs}", *SETTINGS)
    command.wait_for(lambda: runs.num_records(tmp_path / "run0") >= 3, "some steps of job 0")
    for task in tasks(tmp_path).values():
        os.kill(task, number)
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    (line,) = finished.errors
    assert line.startswith("error: job 0 has no result: a task of it was killed, stopped or failed; see ")
    assert "run.seed=0" in line.partition("(")[2] and "Traceback" not in finished.stderr
    found = re.search(r"see (\S+_0_log\.err)", line)
    assert found is not None and (tmp_path / found[1]).exists()
    assert runs.results(tmp_path / "run1")["steps"] == 100, "did not wait for the other job"


@pytest.mark.slow
def test_a_job_of_which_another_task_was_killed_has_one_message(pairs: Path, tmp_path: Path) -> None:
    command = runs.start_train(tmp_path, *SWEEP, f"data.root={pairs}", *SETTINGS)
    command.wait_for(lambda: runs.num_records(tmp_path / "run") >= 3, "some steps")
    os.kill(tasks(tmp_path)["1"], signal.SIGKILL)
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    (line,) = finished.errors
    assert "rank 1 is lost: killed" in line and "(job 0: " in line


@pytest.mark.slow
def test_a_job_goes_on_after_its_time_limit_as_often_as_it_may(pairs: Path, tmp_path: Path) -> None:
    # Of so short a limit, submitit takes any moment for its end.
    limits = ("hydra.launcher.timeout_min=10", "+hydra.launcher.max_num_timeout=1")
    long = ("trainer.duration=100000steps", "checkpoint.every=100000steps", "schedule=constant")
    command = runs.start_train(tmp_path, *SWEEP, *limits, *long, f"data.root={pairs}")
    for _ in range(2):
        send_after_some_steps(command, tmp_path, signal.SIGUSR2)
    finished = command.wait()
    assert finished.code == 1, finished.stderr
    (line,) = finished.errors
    assert "does not requeue the job (Job not requeued because: timed-out too many times); " in line
    assert "raise hydra.launcher.max_num_timeout (job 0: " in line
    assert "Traceback" not in finished.stderr + logs(tmp_path)
    first, last = sorted({int(step) for step in re.findall(r"stopped by a signal at step (\d+)", logs(tmp_path))})
    assert 0 < first < last
    assert runs.checkpoints(tmp_path / "run")[-1].name == f"step_{last:08d}"
    assert [record["step"] for record in runs.records(tmp_path / "run")] == list(range(1, last + 1))
