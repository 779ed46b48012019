"""Ranks from the variables of srun and submitit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmpretrain.errors import UsageError
from mmpretrain.launchers import adopt_ranks
from tests import runs

SETTINGS = ("trainer.duration=4steps", "checkpoint.every=2steps")


def of_srun(rank: int, num_tasks: int = 2, **others: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(num_tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        **others,
    }


def of_submitit(rank: int) -> dict[str, str]:
    return {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_JOB_ID": str(os.getpid() + 1),
    }


def tasks_of_srun(tasks_per_node: str, numbers: list[list[int]]) -> list[dict[str, str]]:
    """The variables of all tasks of a step, of which each node has these numbers."""
    return [
        of_srun(
            number,
            sum(map(len, numbers)),
            SLURM_LOCALID=str(local),
            SLURM_NODEID=str(node),
            SLURM_GTIDS=",".join(map(str, here)),
            SLURM_STEP_TASKS_PER_NODE=tasks_per_node,
        )
        for node, here in enumerate(numbers)
        for local, number in enumerate(here)
    ]


@pytest.mark.parametrize("launcher", [of_srun, pytest.param(of_submitit, marks=pytest.mark.slow)])
def test_tasks_train_as_the_ranks_of_torchrun(launcher, pairs: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, environments in (("torchrun", runs.group(2)), ("launcher", [launcher(rank) for rank in range(2)])):
        folder = tmp_path / name
        folder.mkdir()
        started = [runs.start_train(folder, f"data.root={pairs}", *SETTINGS, environment=each) for each in environments]
        for command in started:
            finished = command.wait()
            assert finished.code == 0, finished.stderr
        outcomes.append(runs.exact_outcome(folder / "run"))
    assert outcomes[0] == outcomes[1]


def test_the_variables_of_several_nodes() -> None:
    environment = of_srun(
        9,
        10,
        SLURM_LOCALID="1",
        SLURM_NODEID="2",
        SLURM_STEP_TASKS_PER_NODE="4(x2),2",
        SLURM_STEP_NODELIST="gpu[007-010,12],x",
    )
    adopt_ranks(environment)
    expected = {"RANK": "9", "WORLD_SIZE": "10", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu007"}
    assert {name: environment[name] for name in expected} == expected
    other = of_srun(0, 10, SLURM_STEP_TASKS_PER_NODE="4(x2),2")
    adopt_ranks(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"] and 20_000 <= int(other["MASTER_PORT"]) < 30_000


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # a batch script
        of_srun(0, 1),
        of_srun(0, 1, SLURM_DISTRIBUTION="cyclic,pack", SLURM_GTIDS="0"),  # as plain srun sets them
        {**of_srun(1), "WORLD_SIZE": "4"},  # torchrun in a task of srun
        {},
    ],
)
def test_what_is_no_task_among_others_stays_as_it_is(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_ranks(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a1", "a1"), ("a1,a2", "a1"), ("n[3,5]", "n3"), ("n[03-05]-ib,x", "n03-ib"), ("rack[1-2]n[3-4],x", "rack1n3")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    environment = of_srun(0, SLURM_STEP_NODELIST=nodes)
    adopt_ranks(environment)
    assert environment["MASTER_ADDR"] == host


@pytest.mark.parametrize(
    ("tasks_per_node", "numbers"),
    [("1(x3)", [[0], [1], [2]]), ("2(x2)", [[0, 1], [2, 3]]), ("3,1", [[0, 1, 2], [3]])],
)
def test_consecutive_tasks_are_adopted_whatever_srun_calls_their_order(
    tasks_per_node: str, numbers: list[list[int]]
) -> None:
    for environment in tasks_of_srun(tasks_per_node, numbers):
        environment["SLURM_DISTRIBUTION"] = "cyclic"  # srun's own value for one task on each node
        adopt_ranks(environment)
        assert environment["RANK"] == environment["SLURM_PROCID"]


@pytest.mark.parametrize(
    ("tasks_per_node", "numbers"), [("2(x2)", [[0, 2], [1, 3]]), ("3,1", [[0, 2, 3], [1]]), ("1(x2)", [[1], [0]])]
)
def test_tasks_that_are_not_consecutive_are_refused_by_all(tasks_per_node: str, numbers: list[list[int]]) -> None:
    for environment in tasks_of_srun(tasks_per_node, numbers):
        environment["SLURM_DISTRIBUTION"] = "plane=1"
        here = environment["SLURM_GTIDS"]
        with pytest.raises(UsageError, match=rf"^srun has given node \d the tasks {here}; .* --distribution=block$"):
            adopt_ranks(environment)
    old = tasks_of_srun("2(x2)", [[0, 2], [1, 3]])[1]
    del old["SLURM_GTIDS"]
    with pytest.raises(UsageError, match=r"^srun has given node 0 the tasks 1; "):
        adopt_ranks(old)


def test_a_task_of_submitit_in_a_shell_of_srun_belongs_to_submitit() -> None:
    shell = of_srun(0, 1, SLURM_DISTRIBUTION="cyclic,pack")
    for rank in range(2):
        environment = {**shell, **of_submitit(rank)}
        adopt_ranks(environment)
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(rank), "2")


def test_a_usage_error_of_tasks_of_srun_is_printed_once(tmp_path: Path) -> None:
    for mistakes in (("trainer.duration=fast",), ("-m", "run.seed=0,1")):
        started = [runs.start_train(tmp_path, *mistakes, environment=of_srun(rank)) for rank in range(2)]
        finished = [command.wait() for command in started]
        assert [each.code for each in finished] == [2, 2]
        assert [len(each.errors) for each in finished] == [1, 0]
    assert "-m (multirun) was given under torchrun or srun" in finished[0].errors[0]


def test_an_early_signal_to_tasks_of_srun_is_told_once(tmp_path: Path) -> None:
    code = "from mmpretrain.training import stop_signal as s; s.exit_when_asked(); print(flush=True); input()"
    outputs = []
    for rank in range(2):
        task = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **of_srun(rank)}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert task.stdout is not None and task.stdout.readline() == "\n"
        task.terminate()
        task.wait()  # communicate() closes the standard input, whose end could come before the signal
        outputs.append((task.communicate()[1], task.returncode))
    assert outputs == [("stopped by a signal; the same command goes on\n", 85), ("", 85)]
