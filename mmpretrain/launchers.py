"""Ranks of processes that srun or submitit has started, under the names of torchrun."""

import os
import re
from collections.abc import Mapping, MutableMapping

from mmpretrain.errors import UsageError

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


def adopt_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if a launcher tells them otherwise.

    Nothing is changed under torchrun, for a single task, and in a batch script outside of srun.

    Raises: UsageError if srun has spread the tasks over the nodes in turns: ranks of a machine have to be consecutive.
    """
    if "WORLD_SIZE" in environment:
        return
    found = _of_slurm(environment) or _of_submitit_local(environment)
    if found is not None and int(found["WORLD_SIZE"]) > 1:
        for name, value in found.items():
            environment.setdefault(name, value)


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the variables of a task of srun, which alone has SLURM_STEP_NUM_TASKS."""
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return None
    if "cyclic" in environment.get("SLURM_DISTRIBUTION", "").split(":")[0]:
        raise UsageError(
            f"srun --distribution={environment['SLURM_DISTRIBUTION']}: expected consecutive tasks on each node: "
            "--distribution=block"
        )
    tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks[int(environment.get("SLURM_NODEID", 0))]),
        "MASTER_ADDR": _first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": _port(environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")),
    }


def _of_submitit_local(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the variables of a task of submitit on this machine."""
    if "SUBMITIT_LOCAL_GLOBALID" not in environment:
        return None
    return {
        "RANK": environment["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
        "LOCAL_RANK": environment["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": environment["SUBMITIT_LOCAL_NTASKS"],
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": _port(environment["SUBMITIT_LOCAL_JOB_ID"], "0"),
    }


def _tasks_per_node(text: str) -> list[int]:
    """Parse `2(x3),1` to [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected numbers such as 8(x4)")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """Return the first host of a list of SLURM: `gpu007` of `gpu[007-010,12],cpu1`."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    assert found is not None  # it matches any text
    return "".join(part or "" for part in found.groups())


def _port(job: str, step: str) -> str:
    """Return a port that all tasks of a step know, and that other jobs on the same node rarely have."""
    digits = [int(re.sub(r"\D", "", each) or 0) for each in (job, step)]
    return str(_FIRST_PORT + (digits[0] * 17 + digits[1]) % _NUM_PORTS)
