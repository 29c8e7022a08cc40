"""What `latency` says is true: a device that answers 200 us later moves the round trip by just that."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from emu.scenario import DeviceSpec
from tests.tools.late_echo import LATE_NS
from tools.latency import measure
from tools.plugins import scenario_of

RUNS = 7
WINDOW_S = 1.0
TOLERANCE_NS = 20_000


def round_trip_ns(backend: str) -> float:
    """p50 of a machine whose one device has this back end."""
    plugin = Path(__file__).with_name("late_echo.py")
    scenario = scenario_of(None, [plugin]).with_overrides(vcpus=1, devices=[DeviceSpec("echo", backend)])
    measured = measure(scenario, 0, 64, WINDOW_S, record=False)
    assert measured.lost == 0
    return median(measured.round_trips)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_device_that_answers_later_moves_the_round_trip_by_that() -> None:
    """200 us, give or take 20, in the median of machines that run in turn."""
    moved = sorted(round_trip_ns("late") - round_trip_ns("prompt") for _ in range(RUNS))

    assert abs(median(moved) - LATE_NS) <= TOLERANCE_NS, moved
