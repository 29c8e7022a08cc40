"""A machine of real processes comes to rest, and shows nothing then that it should not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emu.scenario import DeviceSpec, Scenario
from tools.ctl import ask_host, offer_devices
from tools.invariants_settled import judge
from tools.launch import launch
from tools.settled import SettleTest

TIMEOUT_S = 30.0


@pytest.mark.parametrize("era", ["current", "seed"])
def test_healthy_machine_settles_without_a_finding(era: str) -> None:
    """After its boot, and after devices came and went; threads say themselves when they sleep."""
    scenario = Scenario.default().with_overrides(devices=[DeviceSpec(count=2), DeviceSpec("netlike")])
    scenario = replace(scenario, machine=replace(scenario.machine, era=era))
    with launch(scenario, record=True, races=True) as running:
        running.wait_ready()
        test = SettleTest(running.machine)
        assert test.wait(TIMEOUT_S, running.pump).text() == "settled"
        assert judge(test.view) == []

        relids = [int(one["relid"]) for one in offer_devices(running.machine, "echo:2")]
        ask_host(running.machine, "rescind", relid=relids[0], instance="")

        assert test.wait(TIMEOUT_S, running.pump).text() == "settled"
        assert judge(test.view) == []
        assert relids[1] in {channel.relid for channel in test.view.channels()}
        assert relids[0] not in {channel.relid for channel in test.view.channels()}
