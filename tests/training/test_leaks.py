"""A long run holds no more memory and no more open files at its end than after its start."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests import runs

NUM_STEPS, LOOK_EVERY = 2000, 50
MAX_GROWTH_MIB = 32.0  # the allocator may keep the memory of a checkpoint, 20 MiB; a batch in each step would be 47


def is_lasting(file: Path) -> bool:
    """Return whether an entry of /proc/*/fd is still open and no batch in shared memory."""
    with suppress(FileNotFoundError):
        return not str(file.readlink()).startswith("/dev/shm/torch_")
    return False


def measured(pid: int) -> tuple[float, int]:
    """Return (MiB, number of open files) of a process and its descendants.

    Of pages that n processes share, an n-th counts. A process that ends meanwhile, such as an evaluation's, counts as zero.
    Batches in shared memory count as memory, not as files: their number depends on how far ahead the workers are.
    """
    process = Path(f"/proc/{pid}")
    memory, num_files = 0.0, 0
    with suppress(FileNotFoundError, ProcessLookupError):
        children = [int(child) for child in (process / f"task/{pid}/children").read_text().split()]
        (line,) = [line for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
        memory, num_files = int(line.split()[1]) / 1024, sum(map(is_lasting, (process / "fd").iterdir()))
        for more_memory, more_files in map(measured, children):
            memory, num_files = memory + more_memory, num_files + more_files
    return memory, num_files


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_with_the_steps(pairs: Path, tmp_path: Path) -> None:
    command = runs.start_train(
        tmp_path, f"data.root={pairs}", f"trainer.duration={NUM_STEPS}steps", "data.workers=2", "trainer.log_every=10steps",
        "eval=[]", "checkpoint.every=100steps", "checkpoint.keep_last=2",
    )  # fmt: skip
    looks: list[tuple[int, float, int]] = []
    for step in range(LOOK_EVERY, NUM_STEPS, LOOK_EVERY):
        command.wait_for(lambda step=step: runs.num_records(tmp_path / "run") * 10 >= step, f"step {step}")
        looks.append((step, *measured(command.pid)))
    finished = command.wait()
    assert finished.code == 0, finished.stderr
    _, memory, files = np.array(looks[len(looks) // 4 :]).T
    # Batches and checkpoints under way hold memory and files, so that both move: the least of each half is compared.
    half = len(files) // 2
    growth, more_files = (values[half:].min() - values[:half].min() for values in (memory, files))
    print(f"{memory.mean():.0f} MiB, {growth:+.2f} MiB; {files.mean():.0f} open files, {more_files:+.0f}")
    assert growth < MAX_GROWTH_MIB, looks
    assert more_files <= 2, looks
