"""Weights & Biases."""

import html
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpretrain.reporting.writers import Setting, read_run_id, write_run_id

_FINISH_SECONDS = 120.0


class WandB:
    """Write to a run of Weights & Biases, whose id is kept in `wandb.json` in the run's directory.

    A resumed run continues the same run of W&B after the last record that it holds. With mode `offline` each process begins a
    new folder `wandb/offline-run-*` with all records of the run: upload the newest one with `wandb sync`. The API key comes
    from `wandb login` or the environment variable WANDB_API_KEY, never from the configuration.

    Args:
        folder: the run's directory; the name of the run is its name.
        project: project of the run.
        entity: user or team of the project; None: the default of the API key.
        tags: tags of the run.
        mode: `online` or `offline`; None: the environment variable WANDB_MODE, else online.

    Raises: ValueError if W&B refuses the arguments or there is no valid API key; wandb.Error if it cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        project: str = "mmpretrain",
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["online", "offline"] | None = None,
    ) -> None:
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        self._wandb: Any = wandb
        path = folder / "wandb.json"
        if (run_id := read_run_id(path)) is None:
            run_id = uuid.uuid4().hex
            write_run_id(path, run_id)
        # W&B's own handling of the console would replace stdout and stderr.
        quiet = wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_SECONDS)
        try:
            self._run: Any = wandb.init(
                dir=folder, id=run_id, resume="allow", name=folder.name, project=project, entity=entity, tags=list(tags),
                mode=mode, settings=quiet,
            )  # fmt: skip
        except (AuthenticationError, UsageError) as error:
            raise ValueError(" ".join(str(error).split())) from error
        # The summary has the last values; pictures alone, which may come before a step's record, do not change it.
        self.logged = int(self._run.summary.get("samples") or 0)

    def settings(self, values: Mapping[str, Setting]) -> None:
        """Write the settings to the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, with samples seen as W&B's step."""
        self._run.log({**values, "step": step, "samples": samples}, step=samples)

    def image(self, name: str, samples: int, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [h, w, 3]."""
        self._log(name, samples, self._wandb.Image(pixels))

    def text(self, name: str, samples: int, text: str) -> None:
        """Write a text."""
        self._log(name, samples, self._wandb.Html(f"<pre>{html.escape(text)}</pre>"))

    def _log(self, name: str, samples: int, value: Any) -> None:
        if samples >= self.logged:  # W&B refuses to go back
            self._run.log({name: value}, step=samples)

    def close(self) -> None:
        """End the run of W&B, and wait up to two minutes for its uploads."""
        self._run.finish()
