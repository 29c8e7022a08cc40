"""Channels that move between processors under traffic, and processors that go and come back: real processes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from emu.orders import OrderRefused
from emu.scenario import DeviceSpec, MachineSpec, Scenario
from emu.task_board import Program, TaskBoard, TaskState
from emu.wire.versions import VERSION_WIN10
from tests.system.commands import assert_gone
from tools.ctl import ask_host
from tools.ctl_guest import ask_guest
from tools.launch import RunningMachine, launch

NAME = f"t-move-{os.getpid()}"
VCPUS = 3
DEVICES = 3
MOVES = 60
PACKETS = 400


@pytest.fixture(scope="module")
def running() -> Iterator[RunningMachine]:
    """A machine whose VPs are numbered in reverse, with an echo channel for each of its processors."""
    scenario = Scenario(MachineSpec(name=NAME, vcpus=VCPUS, vp_order="reverse"), (DeviceSpec(count=DEVICES),))
    with launch(scenario) as running:
        running.wait_ready()
        yield running
    assert_gone(NAME)


def move(running: RunningMachine, relid: int, cpu: int) -> dict[str, Any]:
    """What `ctl move` asks."""
    return ask_guest(running.machine, "move", device=str(relid), cpu=cpu)


def switch(running: RunningMachine, cpu: int, *, online: bool) -> dict[str, Any]:
    """What `ctl online` and `ctl offline` ask."""
    return ask_guest(running.machine, "cpu_online", cpu=cpu, online=online)


def test_no_packet_is_lost_on_the_way(running: RunningMachine, seed: int = 1) -> None:
    """Every processor sends and checks while channels move to and fro; each packet comes back, in order."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    board = TaskBoard(running.machine.control)
    moves = packets = 0
    while moves < MOVES:
        rows = [running.order(Program.ECHO_CHECK, cpu, wanted=PACKETS) for cpu in range(VCPUS)]
        while any(board.row(row).state in (TaskState.ORDERED, TaskState.RUNNING) for row in rows):
            relid, cpu = rng.randint(1, DEVICES), rng.randrange(VCPUS)
            assert move(running, relid, cpu)["cpu"] == cpu
            moves += 1
        ended = running.take_tasks(rows, 60)
        assert [row.state for row in ended] == [TaskState.DONE] * VCPUS
        packets += sum(row.packets for row in ended)

    assert packets >= PACKETS


def test_processor_goes_and_comes_back(running: RunningMachine) -> None:
    """Gone, nothing new is placed on it and a program that is ordered there waits; back again, it does both."""
    for relid in range(1, DEVICES + 1):
        move(running, relid, 1)
    with pytest.raises(OrderRefused, match="EBUSY.*interrupts of relid 1 go to CPU 1"):
        switch(running, 1, online=False)
    assert switch(running, 2, online=False)["online"] is False
    with pytest.raises(OrderRefused, match="EINVAL"):
        move(running, 1, 2)
    row = running.order(Program.ECHO_CHECK, 2, wanted=PACKETS)
    assert switch(running, 2, online=False)["online"] is False
    assert TaskBoard(running.machine.control).row(row).state == TaskState.ORDERED

    assert switch(running, 2, online=True)["online"] is True
    assert running.take_tasks([row], 60)[0].state == TaskState.DONE
    assert move(running, 1, 2) == {"relid": 1, "from": 1, "cpu": 2}
    row = running.order(Program.ECHO_CHECK, 2, wanted=PACKETS)
    done = running.take_tasks([row], 60)[0]
    assert (done.state, done.packets) == (TaskState.DONE, PACKETS)


def test_machine_ends_while_a_processor_is_offline(running: RunningMachine) -> None:
    """The last one of this machine: how it ends is the fixture's to see."""
    move(running, 1, 0)

    assert switch(running, 2, online=False)["online"] is False


def test_cure_for_a_held_processor_works_in_its_version() -> None:
    """Below 4.1 no channel moves, so the device has to go; once it has gone, the processor may."""
    name = f"{NAME}-old"
    scenario = Scenario(MachineSpec(name=name, vcpus=2, host_version=VERSION_WIN10), (DeviceSpec(count=2),))
    with launch(scenario) as running:
        running.wait_ready()
        with pytest.raises(OrderRefused, match="EBUSY.*relid 2 go to CPU 1; `vmbus-emu ctl rescind 2`"):
            switch(running, 1, online=False)
        ask_host(running.machine, "rescind", relid=2, instance="")
        running.wait_until(lambda: ask_host(running.machine, "lives")["held"] == 1, 20, "its end")

        assert switch(running, 1, online=False)["online"] is False
    assert_gone(name)
