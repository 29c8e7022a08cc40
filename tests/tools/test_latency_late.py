"""Round trips as they are measured are true: a device that answers 200 us later moves them by just that."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from emu.scenario import DeviceSpec
from tests.tools.late_echo import LATE_NS
from tools.bench_echo import round_trips
from tools.launch import launch
from tools.pinned import pin, two_cores
from tools.plugins import scenario_of

TURNS = 15
WINDOW_S = 0.3
TOLERANCE_US = 20.0
POLL_US = "2000"
"""Long enough that neither end halts meanwhile: a wake-up costs what it costs, and is not what is asked for."""


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_device_that_answers_later_moves_the_round_trip_by_that() -> None:
    """200 us, give or take 20, of the median; two devices of one machine, in turn."""
    plugin = Path(__file__).with_name("late_echo.py")
    devices = [DeviceSpec("echo", "prompt"), DeviceSpec("echo", "late")]
    scenario = scenario_of(None, [plugin]).with_overrides(vcpus=1, poll=POLL_US, devices=devices)
    moved = []
    with launch(scenario) as running:
        running.wait_ready()
        pin(running, *two_cores())
        for _ in range(TURNS):
            prompt, late = (median(round_trips(running, WINDOW_S, device)) for device in (0, 1))
            moved.append(late - prompt)
        running.shut_down_guest()

    print(sorted(moved))
    assert abs(median(moved) - LATE_NS / 1e3) <= TOLERANCE_US, sorted(moved)
