"""The distribution: what an installation holds, and what the repository must not."""

import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DISTRIBUTION = "multimodal-pretrain"


def repository_files() -> list[Path]:
    """What git tracks, or would track: ignored files are left out."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def test_version_is_the_projects() -> None:
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "(.+)"$', pyproject, flags=re.MULTILINE)
    assert match is not None
    assert importlib.metadata.version(DISTRIBUTION) == match[1], "stale installation: make environment"


def test_conf_is_a_package_resource() -> None:
    assert importlib.resources.files("mmpretrain.conf").joinpath("train.yaml").is_file()


def test_hydra_finds_conf_from_anywhere(tmp_path: Path) -> None:
    code = (
        "from hydra import compose, initialize_config_module as initialize\n"
        "from hydra.core.global_hydra import GlobalHydra\n"
        "with initialize('mmpretrain.conf', version_base='1.3'):\n"
        "    loader = GlobalHydra.instance().config_loader()\n"
        "    assert 'train' in loader.get_group_options('')\n"
        "    assert loader.get_group_options('objective')\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    code = "import mmpretrain, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout == f"{expected} False\n"


@pytest.mark.parametrize("script", ["mmpretrain-train", "mmpretrain-evaluate", "mmpretrain-data"])
def test_console_script_resolves(script: str) -> None:
    entry_points = importlib.metadata.distribution(DISTRIBUTION).entry_points
    (entry_point,) = [entry for entry in entry_points if entry.name == script]
    assert callable(entry_point.load())


def test_wheel_holds_every_module_and_yaml(tmp_path: Path) -> None:
    names = [path.relative_to(REPOSITORY).as_posix() for path in repository_files()]
    # From a copy, since setuptools leaves build/ behind and packs what is stale there; without the network.
    for name in names:
        if name.startswith(("mmpretrain/", "data_tools/", "analysis/", "conf/")) or "/" not in name:
            copy = tmp_path / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    process = subprocess.run(
        [*build, "--wheel-dir", tmp_path, tmp_path / "source"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}

    modules = {name for name in names if re.fullmatch(r"(mmpretrain|data_tools|analysis)/.*\.py", name)}
    conf = {f"mmpretrain/{name}" for name in names if re.fullmatch(r"conf/(.*\.yaml|__init__\.py)", name)}
    prompts = {name for name in names if name.startswith("mmpretrain/evals/prompts/")}
    missing = (modules | conf | prompts) - packed
    assert not missing, f"not in the wheel (is an __init__.py missing?): {sorted(missing)}"
    assert not [name for name in packed if name.startswith(("tests/", "conf/"))]


def test_repository_names_no_package_index() -> None:
    # Where packages come from is the machine's affair: pip's own settings, never the repository's.
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "anaconda" + ".org"]
    options = ["--" + "index-url", "--" + "extra-index-url", "--" + "find-links"]
    found = []
    for path in repository_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(REPOSITORY)}: {word}" for word in hosts + options if word in text]
    assert not found


def test_repository_has_no_lock_file() -> None:
    locks = {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pylock.toml"}
    assert not [path for path in repository_files() if path.name in locks]
