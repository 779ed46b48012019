"""The writer of energy, with codecarbon itself."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from mmpretrain.reporting.energy import Energy, read_energy


@pytest.mark.slow  # codecarbon takes seconds to start
def test_energy_is_summed_over_starts_and_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("codecarbon")
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = []
    for _ in range(2):
        writer = Energy(tmp_path, seconds=0.5)
        writer.scalars(1, 16, {})
        time.sleep(1)
        writer.close()
        found.append(read_energy(tmp_path))
    first, second = found
    assert first is not None and second is not None
    assert 0 < first["kwh"] < second["kwh"] and 1 <= first["seconds"] < second["seconds"]
    assert first["kwh"] < 0.01, "seconds of a machine below 10 kW"
    assert first["by"].startswith("codecarbon ")
    assert not asked
    assert [file.name for file in tmp_path.iterdir()] == ["energy.json"]
