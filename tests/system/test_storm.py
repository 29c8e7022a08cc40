"""Storms over real machines: whatever is ordered at random, each relid is released once and nothing leaks."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from emu.scenario import Scenario, parse_device
from tests.system.commands import objects
from tests.system.storm import Storm
from tools.ctl import ask_host, wait_until_open, wait_until_released
from tools.launch import RunningMachine, launch


def machine(name: str, devices: str = "echo:4", vcpus: int = 4, era: str = "current") -> RunningMachine:
    """A machine that boots; era `seed` asks for 4.0 at most."""
    scenario = Scenario.default().with_overrides(
        name=f"{name}-{os.getpid()}", vcpus=vcpus, devices=[parse_device(devices)]
    )
    return launch(replace(scenario, machine=replace(scenario.machine, era=era)))


def weather(seed: int, operations: int, era: str) -> Storm:
    """One storm on one machine, to its very end."""
    print(f"storm with seed {seed}, {operations} operations, era {era}")
    with machine("t-storm", era=era) as running:
        running.wait_ready()
        storm = Storm(running, seed)
        storm.blow(operations)
        storm.settle()
        storm.rescind_all()
        storm.settle()
        lives = ask_host(running.machine, "lives")
        assert lives["held"] == 0 and lives["offered"] == lives["released"], f"seed {seed}: {lives}"
        tasks = [running.wait_tasks([row], 1)[0] for row in storm.tasks]
        assert [row.errors for row in tasks if row.errors] == [], f"seed {seed}"
        assert running.shut_down_guest(), f"seed {seed}: the guest does not unload"
        control = running.machine.control
        assert control.leaked == 0, f"seed {seed}: {running.log[-20:]}"
        refused, last = control.refusals()
        assert refused == {}, f"seed {seed}: {refused} {last}"
        assert not [line for line in running.log if "[" in line and "offer-" in line], f"seed {seed}"
        print(dict(storm.orders), dict(storm.refusals), lives, control.ignored())
    assert objects(running.name) == []
    return storm


@pytest.mark.parametrize(("seed", "era"), [(1, "current"), (2, "seed")])
def test_storm_of_adds_removes_and_binds(seed: int, era: str) -> None:
    """60 operations on 4 vCPUs, of host and guest at the same time, with traffic and faults."""
    storm = weather(seed, 60, era)

    assert storm.orders.total() == 60


@pytest.mark.soak
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("era", ["current", "seed"])
def test_storm_that_lasts(era: str) -> None:
    """10,000 operations; VMBUS_EMU_SEED replays what was ordered."""
    storm = weather(int(os.environ.get("VMBUS_EMU_SEED", "0")), 10_000, era)

    assert storm.orders.total() == 10_000


def test_hot_add_and_hot_remove_of_one_device_a_hundred_times() -> None:
    """Each time opened, each time released; always the same relid, nothing leaks."""
    with machine("t-hundred", "echo", vcpus=2) as running:
        running.wait_ready()
        for _ in range(100):
            (one,) = ask_host(running.machine, "offer", **OFFER)["offered"]
            wait_until_open(running.machine, one["relid"], one["generation"])
            assert one["relid"] == 2
            gone = ask_host(running.machine, "rescind", relid=one["relid"], instance="")
            wait_until_released(running.machine, gone["relid"], gone["generation"])
            running.pump(0)

        assert ask_host(running.machine, "lives") == {"offered": 101, "released": 100, "held": 1, "rescinded": 0}
        assert running.shut_down_guest()
        assert running.machine.control.leaked == 0
        assert running.machine.control.refusals()[0] == {}


OFFER = {"class": "echo", "backend": "echo", "count": 1, "instance": None}
