"""A run's directory."""

from pathlib import Path

from tests import runs
from tests.data.test_files import write_image


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


def test_a_run_goes_on_with_the_classes_that_it_began_with(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(8):
            write_image(tmp_path / "photos" / name / f"{number}.png", number)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    arguments = (
        "objective=[classification]", "data.root=.", "data.train.pairs.shards=null", "data.train.pairs.caption=null",
        "+data.train.pairs.source={_target_: mmpretrain.data.files.FileSource, path: photos}",
        "data.train.pairs.label=json.label", "data.train.pairs.classes=classes.txt", "eval=[]",
    )  # fmt: skip
    assert runs.train(tmp_path, *arguments, "trainer.duration=1steps").code == 0
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    refused = runs.train(tmp_path, *arguments, "trainer.duration=2steps")
    assert refused.code == 2
    assert "was made with 2 classes of objective.classification with 'cat' as number 0, but now" in refused.errors[0]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert runs.train(tmp_path, *arguments, "trainer.duration=2steps").code == 0
