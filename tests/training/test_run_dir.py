"""A run's directory."""

from pathlib import Path

from tests import runs


def test_a_finished_run_shows_nothing_of_the_environment_and_keeps_what_it_should(pairs: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "geheim"
    hidden.symlink_to(pairs)
    settings = ("data.root=${oc.env:HIDDEN}", "trainer.duration=4steps", "checkpoint.every=1steps", "run.name=a")
    environment = {"HIDDEN": str(hidden)}
    finished = runs.train(tmp_path, *settings, "checkpoint.keep_last=0", environment=environment)
    assert finished.code == 0, finished.stderr
    run = tmp_path / "run"
    for file in [run / "config.yaml", run / "report.html", *(run / "tensorboard").iterdir()]:
        assert b"geheim" not in file.read_bytes(), file
    assert "root: ${oc.env:HIDDEN}" in (run / "config.yaml").read_text()
    assert len(runs.checkpoints(run)) == 4
    # As a kill between the last save and the deletion leaves it; the same command then only says its results.
    finished = runs.train(tmp_path, *settings, "checkpoint.keep_last=2", environment=environment)
    assert finished.code == 0 and "is finished" in finished.stderr
    assert [path.name for path in runs.checkpoints(run)] == ["step_00000003", "step_00000004"]
    finished = runs.run("mmpretrain.evaluate", [f"checkpoint={run}"], tmp_path, environment)
    assert finished.code == 2
    (line,) = finished.errors
    assert "data.root is '${oc.env:HIDDEN}'" in line and "geheim" not in line
    finished = runs.run(
        "mmpretrain.evaluate", [f"checkpoint={run}", "eval=[retrieval]", f"data.root={pairs}"], tmp_path
    )
    assert finished.code == 0, finished.stderr
