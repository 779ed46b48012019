"""torchrun restarts a group of which a process or a machine is lost; the run goes on from its last checkpoint."""

import os
import signal
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests import runs
from tests.runs import Command

NUM_STEPS = 100
SETTINGS = (f"trainer.duration={NUM_STEPS}steps", "checkpoint.every=5steps")
EVERY_SECOND = "--rdzv-conf=keep_alive_interval=1,last_call_timeout=10"

pytestmark = pytest.mark.slow


def torchrun(folder: Path, pairs: Path, *options: str) -> Command:
    arguments = [*options, "-m", "mmpretrain.train", *runs.TINY_RUN, *SETTINGS, f"data.root={pairs}"]
    return Command("torch.distributed.run", arguments, folder)


def workers(agent: Command) -> dict[str, int]:
    """The processes of an agent of torchrun, by rank."""
    found = {}
    for pid in runs.children(agent.pid):
        variables = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        if "RANK" in variables:
            found[variables["RANK"]] = pid
    return found


@pytest.fixture
def undisturbed(pairs: Path, tmp_path: Path) -> Path:
    """The run of two processes that nothing has interrupted."""
    return runs.trained_group(tmp_path / "undisturbed", 2, f"data.root={pairs}", *SETTINGS)


@pytest.mark.parametrize("lost", ["0", "1"])
def test_a_group_of_which_one_is_killed_is_restarted(lost: str, undisturbed: Path, pairs: Path, tmp_path: Path) -> None:
    agent = torchrun(tmp_path, pairs, "--standalone", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=1")
    agent.wait_for(lambda: runs.checkpoints(tmp_path / "run"), "a checkpoint")
    os.kill(workers(agent)[lost], signal.SIGKILL)
    finished = agent.wait()
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count("resumed from run/checkpoints/step_") == 1, finished.stderr
    assert runs.exact_outcome(tmp_path / "run") == runs.exact_outcome(undisturbed)


def test_a_run_goes_on_with_the_machine_that_is_left(undisturbed: Path, pairs: Path, tmp_path: Path) -> None:
    port = runs.group(1)[0]["MASTER_PORT"]
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run", EVERY_SECOND)
    options = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1", *rendezvous)
    agents = [torchrun(tmp_path, pairs, *options)]
    agents[0].wait_for(lambda: runs.is_listening(port), "the agents' store")
    agents.append(torchrun(tmp_path, pairs, *options))
    agents[0].wait_for(lambda: runs.checkpoints(tmp_path / "run"), "a checkpoint")
    for pid in (agents[1].pid, *workers(agents[1]).values()):
        os.kill(pid, signal.SIGKILL)
    agents[1].wait()
    finished = agents[0].wait()
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count("resumed from run/checkpoints/step_") == 1, finished.stderr
    assert [record["step"] for record in runs.records(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))
    found, expected = (runs.weights(each, NUM_STEPS) for each in (tmp_path / "run", undisturbed))
    # The biases of keys have no gradient but by rounding, which Adam enlarges.
    assert_close(found, expected, rtol=1e-4, atol=2e-4)
