"""Energy of a run: measured by codecarbon, or estimated from its wall time."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpretrain import files

FILE = "energy.json"
_SECONDS_BETWEEN_WRITES = 60.0
_MAX_PROCESSES = 1_000_000  # a larger number in run.json is none that a run wrote
# Largest power of a board in watts, by its name in torch; NVIDIA's data sheets.
_GPU_WATTS = {
    "NVIDIA A100 80GB PCIe": 300,
    "NVIDIA A100-PCIE-40GB": 250,
    "NVIDIA A100-SXM4-40GB": 400,
    "NVIDIA A100-SXM4-80GB": 400,
    "NVIDIA GeForce RTX 3090": 350,
    "NVIDIA GeForce RTX 4090": 450,
    "NVIDIA H100 80GB HBM3": 700,
    "NVIDIA H100 PCIe": 350,
    "NVIDIA H200": 700,
    "NVIDIA L4": 72,
    "NVIDIA L40S": 350,
    "Tesla T4": 70,
    "Tesla V100-SXM2-16GB": 300,
    "Tesla V100-SXM2-32GB": 300,
}


class Energy:
    """Measure the energy of process 0's machine with codecarbon, without a network, and write it to energy.json.

    GPUs are read by their counters. Where the CPU has no counter that may be read, codecarbon estimates it by model and load;
    memory is always an estimate. All of the machine is counted, also what others run on it. The energy of a resumed run is
    the sum over its starts; a kill loses up to a minute.

    Args:
        folder: the run's directory.
        seconds: time between two measurements of power, in seconds.
    """

    def __init__(self, folder: Path, seconds: float = 15.0) -> None:
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        import codecarbon

        self._path = folder / FILE
        before = read_energy(folder) or {}
        self._before_kwh, self._before_seconds = before.get("kwh", 0.0), before.get("seconds", 0.0)
        self._by = f"codecarbon {codecarbon.__version__}"
        # The country is for emissions, which are not written; without one the tracker would not be offline.
        self._tracker = codecarbon.OfflineEmissionsTracker(
            country_iso_code="USA", measure_power_secs=seconds, tracking_mode="machine", allow_multiple_runs=True,
            output_methods=[], log_level="error",
        )  # fmt: skip
        self._tracker.start()
        self._started = self._written = time.monotonic()

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Write the energy so far, at most once a minute."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._tracker.flush()
            self._write()

    def close(self) -> None:
        """Write the energy of the run."""
        self._tracker.stop()
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        # Not public, but `final_emissions_data` exists only after the end.
        kwh = self._before_kwh + self._tracker._total_energy.kWh
        seconds = self._before_seconds + self._written - self._started
        files.write_text(self._path, json.dumps({"kwh": kwh, "seconds": seconds, "by": self._by}) + "\n")


def read_energy(folder: Path) -> dict[str, Any] | None:
    """Read FOLDER/energy.json; None if there is none. Raises: ValueError if it is not as `Energy` writes it."""
    path = folder / FILE
    if not path.exists():
        return None
    found = files.read_json(path)
    numbers = [found.get(key) for key in ("kwh", "seconds")]
    are_numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
    if not are_numbers or not isinstance(found.get("by"), str):
        raise ValueError(f"{path} holds {found}; expected kwh, seconds and by, as the run wrote it: remove it")
    return found


def describe_energy(folder: Path, facts: Mapping[str, Any], wall_seconds: float | None) -> str:
    """Return the energy of a run and how it is known: measured, estimated or unknown.

    Args:
        folder: the run's directory.
        facts: content of its run.json.
        wall_seconds: its wall time.
    """
    measured = read_energy(folder)
    if measured is not None:
        return (
            f"{measured['kwh']:.4g} kWh in {measured['seconds'] / 3600:.4g} h, measured by {measured['by']} on the machine "
            "of process 0 (GPUs by their counters; CPU by counters or, without them, by its load; memory estimated)"
        )
    device, count = facts.get("device"), facts.get("processes")
    watts = _GPU_WATTS.get(str(device))
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_PROCESSES:
        count = None
    if watts is None or count is None or wall_seconds is None:
        return "unknown: not measured (writer=[tensorboard,energy]), and no estimate for the device"
    kwh = count * watts * wall_seconds / 3.6e6
    return (
        f"{kwh:.4g} kWh, estimated: {count} × {watts} W, the largest power of {device}, over the whole wall time; CPU, "
        "memory and cooling are not counted"
    )
