"""Ranks from the variables of srun and submitit."""

import os
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
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_JOB_ID": str(os.getpid() + 1),
    }


@pytest.mark.parametrize("launcher", [of_srun, of_submitit])
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
        {**of_srun(1), "WORLD_SIZE": "4"},  # torchrun in a task of srun
        {},
    ],
)
def test_what_is_no_task_among_others_stays_as_it_is(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_ranks(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "host"), [("a1", "a1"), ("a1,a2", "a1"), ("n[3,5]", "n3"), ("n[03-05]-ib,x", "n03-ib")]
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    environment = of_srun(0, SLURM_STEP_NODELIST=nodes)
    adopt_ranks(environment)
    assert environment["MASTER_ADDR"] == host


def test_tasks_that_are_spread_in_turns_are_refused() -> None:
    with pytest.raises(UsageError, match="expected consecutive tasks on each node: --distribution=block"):
        adopt_ranks(of_srun(0, SLURM_DISTRIBUTION="cyclic"))
