"""Ranks of processes that srun or submitit has started, under the names of torchrun."""

import os
import re
from collections.abc import Mapping, MutableMapping

from mmpretrain.errors import UsageError

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
queued_jobs: set[str] = set()
"""Jobs of Slurm that this process has submitted for a sweep. They do not end with it."""


def adopt_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if a launcher tells them otherwise.

    Nothing is changed under torchrun, for a single task, and in a batch script outside of srun.

    Raises: UsageError if the tasks of a node have no consecutive numbers; the variables are set all the same.
    """
    if "WORLD_SIZE" in environment:
        return
    # A task of submitit may have inherited the variables of a shell that srun has started.
    found = _of_submitit_local(environment) or _of_slurm(environment)
    if found is not None and int(found["WORLD_SIZE"]) > 1:
        for name, value in found.items():
            environment.setdefault(name, value)
        if not _is_submitit_local(environment):
            _check_consecutive(environment)


def has_own_gpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True for a task of srun, which may see one GPU alone that is numbered 0 (--gpus-per-task=1)."""
    is_of_srun = "SLURM_PROCID" in environment and not _is_submitit_local(environment)
    return is_of_srun and "TORCHELASTIC_RUN_ID" not in environment


def _is_submitit_local(environment: Mapping[str, str]) -> bool:
    return environment.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environment


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the variables of a task of srun, which alone has SLURM_STEP_NUM_TASKS."""
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return None
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_per_node(environment)[_node(environment)]),
        "MASTER_ADDR": _first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": _port(environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")),
    }


def _check_consecutive(environment: Mapping[str, str]) -> None:
    """Raises: UsageError if srun has not given this node consecutive tasks, after those of the nodes before."""
    tasks, node = _tasks_per_node(environment), _node(environment)
    first = sum(tasks[:node])
    # SLURM_GTIDS has the numbers of all tasks on this node, so that all of them refuse.
    alone = str(int(environment["SLURM_PROCID"]) - int(environment["SLURM_LOCALID"]))
    numbers = [int(number) for number in environment.get("SLURM_GTIDS", alone).split(",")]
    if numbers != list(range(first, first + len(numbers))):
        raise UsageError(
            f"srun has given node {node} the tasks {','.join(map(str, numbers))}; expected consecutive tasks on each node, "
            f"here from {first} on: srun --distribution=block"
        )


def _of_submitit_local(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the variables of a task of submitit on this machine."""
    if not _is_submitit_local(environment):
        return None
    return {
        "RANK": environment["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
        "LOCAL_RANK": environment["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": _port(environment["SUBMITIT_LOCAL_JOB_ID"], "0"),
    }


def _node(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_NODEID", 0))


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """Return the number of tasks on each node of a step: [2, 2, 2, 1] of `2(x3),1`."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"])
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected numbers such as 8(x4)")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """Return the first host of a list of SLURM: `gpu007` of `gpu[007-010,12],cpu1`, `rack1n3` of `rack[1-2]n[3-4]`."""
    found = re.match(r"(\[[^\]]*\]|[^,\[])*", nodes)
    assert found is not None  # it matches any text
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def _port(job: str, step: str) -> str:
    """Return a port that all tasks of a step know, and that other jobs on the same node rarely have."""
    digits = [int(re.sub(r"\D", "", each) or 0) for each in (job, step)]
    return str(_FIRST_PORT + (digits[0] * 17 + digits[1]) % _NUM_PORTS)
