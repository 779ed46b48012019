"""TensorBoard's event files."""

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mmpretrain import files
from mmpretrain.reporting.writers import Setting

_EVENTS = "events.out.tfevents."
_LARGEST_SCALAR = 1 << 12  # bytes of an event

# By default TensorBoard's table shows five settings: those marked as different, in the order of their names.
_FIRST_SETTINGS = ("batch_size", "lr", "model", "objective", "seed")


class TensorBoard:
    """Write event files to `tensorboard/` in the run's directory.

    Each value is on the disk when the call that writes it returns. TensorBoard hides what an earlier process wrote beyond
    the position that the run resumes from.

    Args:
        folder: the run's directory.
        step, samples: position that the run starts or resumes from.
    """

    def __init__(self, folder: Path, step: int = 0, samples: int = 0) -> None:
        before = set((folder / "tensorboard").glob(f"{_EVENTS}*"))
        # Less than `samples` if the run went on without this writer in between.
        self.logged = max((_last_samples(path, samples) for path in before), default=0)
        purge = self.logged + 1 if step else 0
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=purge)
        (begun,) = set((folder / "tensorboard").glob(f"{_EVENTS}*")) - before
        file_writer = self._writer._get_file_writer()
        file_writer.event_writer.close()
        file_writer.event_writer = _EventFile(begun, before)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)

    def image(self, name: str, samples: int, pixels: np.ndarray) -> None:
        """Write a picture, uint8 [h, w, 3]."""
        self._writer.add_image(name, pixels, samples, dataformats="HWC")

    def text(self, name: str, samples: int, text: str) -> None:
        """Write a text, indented by four spaces so that Markdown shows it unchanged."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.split("\n")), samples)

    def embeddings(self, name: str, samples: int, rows: np.ndarray, labels: Sequence[str], images: Tensor) -> None:
        """Write rows [n, e] for the projector, each with a label and a thumbnail uint8 [n, 3, h, w]."""
        self._writer.add_embedding(rows, list(labels), images.float() / 255, samples, tag=name)

    def hparams(self, settings: Mapping[str, Setting], metrics: Sequence[str]) -> None:
        """Add the run to the table of runs with its settings and the last values of `metrics`."""
        experiment, start, end = hparams(dict(settings), dict.fromkeys(metrics, 0.0))
        plugin = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in _FIRST_SETTINGS
        plugin.content = content.SerializeToString()
        for summary in (experiment, start, end):
            self._writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _last_samples(path: Path, at_most: int) -> int:
    """Return the last position in an event file, in samples seen, up to `at_most`; 0 if it holds none."""
    last = 0
    with path.open("rb") as file:
        # A record is the length of its data, a checksum, the data and another checksum; a kill may cut the last one short.
        while len(header := file.read(12)) == 12:
            length = int.from_bytes(header[:8], "little")
            if length > _LARGEST_SCALAR:
                file.seek(length + 4, os.SEEK_CUR)
                continue
            data = file.read(length + 4)[:-4]
            if len(data) < length:
                break
            step = Event.FromString(data).step
            last = max(last, step if step <= at_most else 0)
    return last


class _EventFile:
    """TensorBoard event file, written immediately in the calling thread.

    It replaces torch's writer for two reasons. That one writes in a separate thread, in which a full disk only prints a
    traceback. And TensorBoard reads event files in the order of the timestamps in their names: if the clock was set back
    before a run is resumed, the new file would be read before the earlier ones, and the purge step in their first event
    would drop its data. The new file is therefore renamed to have the latest timestamp.

    Args:
        begun: file that torch created and closed.
        others: event files of earlier processes.
    """

    def __init__(self, begun: Path, others: Iterable[Path]) -> None:
        self._folder = begun.parent
        seconds = [int(match[1]) for path in others if (match := re.match(rf"{_EVENTS}(\d{{1,18}})\.", path.name))]
        own, _, rest = begun.name.removeprefix(_EVENTS).partition(".")
        later = max([int(own), *(second + 1 for second in seconds)])
        self._path = begun.rename(begun.with_name(f"{_EVENTS}{later:010d}.{rest}"))
        self._file = self._path.open("ab", buffering=0)

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Append one event. Raises: OSError that names the file."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        with files.naming(self._path):
            files.write_all(self._file, record.getvalue())

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
