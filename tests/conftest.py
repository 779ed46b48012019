"""Fixtures for every test: seeded generators, and real data where a checkout has it."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that are marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, for libraries that still draw from it
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests' commands leave nothing in the user's cache folder, and find nothing there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets beside the checkout; the test is skipped where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.root` of 200 pairs to train on and 40 held out, of 32 pixels; not to be changed."""
    return runs.write_pairs(tmp_path_factory.mktemp("pairs"))
