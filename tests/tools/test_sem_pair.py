"""The C pair: round trips that rise with their percentiles, and one line where it cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.sem_pair import sem_pair


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("gcc")
def test_round_trips_take_time() -> None:
    """On one core as well: the two take turns."""
    pair, reason = sem_pair()
    assert pair is not None and reason is None
    core = min(os.sched_getaffinity(0))

    trips = pair.run(300, (core, core))

    assert 0 < trips.p50_ns <= trips.p90_ns <= trips.p99_ns <= trips.max_ns


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure then has nothing to be compared with, and says what to install."""
    monkeypatch.setenv("CC", "no-such-compiler")

    pair, reason = sem_pair()

    assert pair is None
    assert reason is not None and "no-such-compiler" in reason
