"""Writers of online services with their own packages: MLflow's store in a folder, and W&B offline."""

import json
import os
import signal
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpretrain.errors import UsageError
from mmpretrain.objectives.base import Example
from mmpretrain.reporting.writers import RunWriter
from tests import runs

RECALL = "eval-val/image_retrieval_recall@1"
MLFLOW = {"mlflow": {"_target_": "mmpretrain.reporting.mlflow.MLflow"}}
WANDB = {"wandb": {"_target_": "mmpretrain.reporting.wandb.WandB", "mode": "offline"}}
TO_A_FOLDER = {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_MODE": "offline"}


def log_steps(writer: RunWriter, steps: range) -> None:
    writer.settings({"lr": 0.1, "init_from": ""})
    for step in steps:
        writer.image("eval-val/gallery", 16 * step, np.zeros((8, 8, 3), np.uint8))
        writer.scalars(step, 16 * step, {"train/loss": 1 / step, RECALL: float("nan") if step == 2 else step})


def log_and_die(folder: str, nodes: Mapping[str, Any], num_steps: int) -> None:
    """In a process of its own: log some steps, and be killed."""
    os.environ.update(TO_A_FOLDER)
    log_steps(RunWriter(Path(folder), 0, 0, nodes), range(1, num_steps + 1))
    os.kill(os.getpid(), signal.SIGKILL)


def kill_and_resume(folder: Path, nodes: Mapping[str, Any]) -> None:
    """Log steps 1 to 5, and after a kill resume at step 3 and log up to step 7."""
    killed = runs.start(log_and_die, str(folder), nodes, 5)
    killed.join(runs.DEADLINE_SECONDS)
    assert killed.exitcode == -signal.SIGKILL
    writer = RunWriter(folder, 3, 48, nodes)
    log_steps(writer, range(4, 8))
    writer.examples("objectives/text", 112, [Example([], "a <text>")])
    writer.close()


def mlflow_run(folder: Path, store: Path) -> tuple[Any, Any]:
    """MLflow's client with the only run of its store, which is the one of `folder`."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{store}")
    experiment = client.get_experiment_by_name("mmpretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert f'"{run.info.run_id}"' in (folder / "mlflow.json").read_text()
    return client, run


def records_of_wandb(folder: Path) -> list[Any]:
    """The whole records of an offline run's file, which is a log of LevelDB with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    content, place, begun, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)  # 1: whole, 2: first, 3: middle, 4: last
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(content):
            records.append(Record.FromString(begun))
            begun = b""
    return records


def logged_by_wandb(folder: Path) -> list[dict[str, str]]:
    """The history of an offline run: values as JSON by name. W&B's own process writes it once `finish` has returned."""
    runs.poll(
        lambda: any(record.WhichOneof("record_type") == "exit" for record in records_of_wandb(folder)),
        "the record of the run's end",
        lambda: True,
    )
    return [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records_of_wandb(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def test_mlflow_holds_each_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store, run = tmp_path / "store", tmp_path / "first"
    run.mkdir()
    nodes = {"mlflow": {**MLFLOW["mlflow"], "tracking_uri": f"file:{store}"}}
    kill_and_resume(run, nodes)
    client, found = mlflow_run(run, store)
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(16 * step, 1 / step) for step in range(1, 8)]
    recall = client.get_metric_history(found.info.run_id, RECALL.replace("@", "_at_"))
    assert [point.step for point in recall] == [16 * step for step in range(1, 8)] and np.isnan(recall[1].value)
    assert found.info.run_name == "first" and found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.1", "init_from": ""}
    pictures = [file.path for file in client.list_artifacts(found.info.run_id, "eval-val/gallery")]
    assert pictures == [f"eval-val/gallery/{16 * step:012d}.png" for step in range(1, 8)]
    assert [file.path for file in client.list_artifacts(found.info.run_id, "objectives/text")] == [
        "objectives/text/000000000112.txt"
    ]


def test_mlflow_says_in_one_line_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for uri, message in (
        (
            "https://me:secret@host",
            r"^writer\.mlflow: tracking_uri has a password, which would be saved in config\.yaml",
        ),
        ("gopher://host", r"^writer\.mlflow: .*unsupported URI 'gopher://host'"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            RunWriter(tmp_path, 0, 0, {"mlflow": {**MLFLOW["mlflow"], "tracking_uri": uri}})
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_mlflow_server_that_is_down_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        writer = RunWriter(tmp_path, 0, 0, {"mlflow": {**MLFLOW["mlflow"], "tracking_uri": "http://127.0.0.1:9"}})
    log_steps(writer, range(1, 3))
    writer.close()
    (warning,) = [message for message in caplog.messages if "writer.mlflow" in message]
    assert warning.startswith("writer.mlflow failed (MlflowException: ") and "\n" not in warning
    assert len(runs.records(tmp_path)) == 2


@pytest.mark.slow
def test_wandb_offline_has_each_step_once_in_its_newest_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    kill_and_resume(tmp_path, WANDB)
    newest = (tmp_path / "wandb" / "latest-run").resolve()
    assert newest.name.startswith("offline-run-")
    history = [record for record in logged_by_wandb(newest) if "samples" in record]
    assert [(record["samples"], float(record["train/loss"])) for record in history] == [
        (str(16 * step), 1 / step) for step in range(1, 8)
    ]
    assert all(record["_step"] == record["samples"] for record in history)
    # offline-run-DATE_TIME-ID, and -COUNT after it where another run of this id began within the same second.
    run_id = json.loads((tmp_path / "wandb.json").read_text())["run_id"]
    assert newest.name.split("-")[3] == run_id
    assert list(newest.rglob("*.png"))
    (text,) = newest.rglob("*.html")
    assert "a &lt;text&gt;" in text.read_text()


def test_wandb_without_a_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match=r"^writer\.wandb: No API key configured[^\n]*$"):
        RunWriter(tmp_path, 0, 0, {"wandb": {**WANDB["wandb"], "mode": "online"}})


@pytest.mark.slow
def test_writers_may_change_on_a_resume_and_change_nothing(pairs: Path, tmp_path: Path) -> None:
    """A run that is killed, and goes on with other writers, is bit for bit the run without any."""
    for package in ("mlflow", "wandb"):
        pytest.importorskip(package)
    plain, other, store = tmp_path / "plain", tmp_path / "other", tmp_path / "store"
    plain.mkdir()
    other.mkdir()
    overrides = (f"data.root={pairs}", "trainer.duration=40steps", "checkpoint.every=5steps")
    finished = runs.train(plain, *overrides, "writer=[]")
    assert finished.code == 0, finished.stderr
    assert not (plain / "run" / "tensorboard").exists() and "tensorboard" not in finished.stdout
    services = ("writer=[tensorboard,mlflow]", f"writer.mlflow.tracking_uri=file:{store}")
    killed = runs.start_train(other, *overrides, *services, environment=TO_A_FOLDER)
    killed.wait_for(lambda: len(runs.checkpoints(other / "run")) > 1, "checkpoints")
    killed.send(signal.SIGKILL)
    killed.wait()
    services = ("writer=[mlflow,wandb]", f"writer.mlflow.tracking_uri=file:{store}")
    finished = runs.train(other, *overrides, *services, environment=TO_A_FOLDER)
    assert finished.code == 0, finished.stderr
    assert "resumed from" in finished.stderr
    assert runs.exact_outcome(other / "run") == runs.exact_outcome(plain / "run")

    steps = [record["samples"] for record in runs.records(other / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client, found = mlflow_run(other / "run", store)
        history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == steps
    logged = logged_by_wandb((other / "run" / "wandb" / "latest-run").resolve())
    assert [int(record["samples"]) for record in logged if "samples" in record] == steps
