"""MLflow."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from mmpretrain.reporting.writers import Setting, read_run_id, write_run_id

_MAX_METRICS = 900  # a request of MLflow takes 1000


class MLflow:
    """Write to a run of MLflow, whose id is kept in `mlflow.json` in the run's directory.

    A resumed run continues the same run of MLflow after the last record that it holds. MLflow does not allow parameters to
    change: they stay as they were when the run was first started. A password for the server comes from the environment
    variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, never from the configuration.

    Args:
        folder: the run's directory; the name of the run is its name.
        tracking_uri: address of the server, such as http://localhost:5000; None: the environment variable
            MLFLOW_TRACKING_URI, else MLflow's default.
        experiment: MLflow's experiment, which is made if it does not exist.

    Raises: ValueError if MLflow refuses the arguments, or for a password in `tracking_uri`; MlflowException if the server
        cannot be reached.
    """

    def __init__(self, folder: Path, tracking_uri: str | None = None, experiment: str = "mmpretrain") -> None:
        if tracking_uri is not None and urlsplit(tracking_uri).password is not None:
            raise ValueError(
                "tracking_uri has a password, which would be saved in config.yaml; expected none: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        # By default MLflow retries for many minutes, during which the run would stand still.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self._run_id = self._open(folder, experiment)
            self._parameters = self._client.get_run(self._run_id).data.params
            self.logged = max(
                (point.step for point in self._client.get_metric_history(self._run_id, "step")), default=0
            )
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ValueError(" ".join(str(error).split())) from error

    def _open(self, folder: Path, experiment: str) -> str:
        """Return the id of the run in `mlflow.json`, or of a new run if there is none on this server."""
        from mlflow.exceptions import MlflowException

        path = folder / "mlflow.json"
        if (run_id := read_run_id(path)) is not None:
            try:
                self._client.update_run(run_id, status="RUNNING")
                return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if known is None else known.experiment_id
        run = self._client.create_run(experiment_id, run_name=folder.name)
        write_run_id(path, run.info.run_id)
        return str(run.info.run_id)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Write the settings that the run does not have yet as parameters."""
        from mlflow.entities import Param

        new = [Param(name, str(value)) for name, value in values.items() if name not in self._parameters]
        self._client.log_batch(self._run_id, params=new)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, with samples seen as MLflow's step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        # `step` comes last: with it the record is complete.
        named = {**{_name(name): value for name, value in values.items()}, "step": step}
        points = [Metric(name, value, now, samples) for name, value in named.items()]
        for start in range(0, len(points), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=points[start : start + _MAX_METRICS])

    def image(self, name: str, samples: int, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [h, w, 3], as an artifact."""
        self._client.log_image(self._run_id, pixels, artifact_file=f"{_name(name)}/{samples:012d}.png")

    def text(self, name: str, samples: int, text: str) -> None:
        """Write a text as an artifact."""
        self._client.log_text(self._run_id, text, artifact_file=f"{_name(name)}/{samples:012d}.txt")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


def _name(name: str) -> str:
    """Replace the characters that MLflow refuses in names: `recall@1` becomes `recall_at_1`."""
    return re.sub(r"[^\w\-./ ]", "_", name.replace("@", "_at_"))
