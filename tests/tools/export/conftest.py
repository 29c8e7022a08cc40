"""The recordings that every export is tried on: one of a real run, and one that holds every event."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.commands import call
from tests.tools.recordings import record_every_event


@pytest.fixture(scope="session")
def real_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the default machine: boot, eight devices, some packets, shutdown; with the bytes."""
    home = tmp_path_factory.mktemp("recorded")
    done = call(home, "run", "--duration", "0.1", "--record", "run.rec", "--record-bytes")
    assert done.returncode == 0, done.stderr
    return home / "run.rec"


@pytest.fixture(scope="session")
def every_event(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every event of the table once."""
    return record_every_event(tmp_path_factory.mktemp("every") / "every.rec")


@pytest.fixture(params=["real_recording", "every_event"])
def recording(request: pytest.FixtureRequest) -> Path:
    """Each of the two in turn."""
    path: Path = request.getfixturevalue(request.param)
    return path
