"""A synthetic timer of a real machine: armed on a processor, judged by the machine's clock, told in a recording."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emu.machine import Machine
from emu.recording import Recording
from emu.vmexit import HostBell
from tests.system.commands import call, objects, report, wait_for
from tools.ctl_guest import ask_guest
from tools.state_tree import StateTree

NAME = f"t-timer-{os.getpid()}"
SECOND_NS = 1_000_000_000
CPU = 1


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with two processors that records, and stops at the end."""
    done = call(tmp_path, "run", "--detach", "--name", NAME, "--device", "echo:1", "--record", str(tmp_path / "t.rec"))
    assert done.returncode == 0, done.stderr
    machine = Machine.attach(NAME)
    try:
        yield machine
    finally:
        machine.close()
        call(tmp_path, "stop", "--machine", NAME)
        assert objects(NAME) == []


def vp_of(machine: Machine) -> dict[str, Any]:
    """The processor as `inspect` shows it."""
    vps: Any = StateTree(machine).root()["vps"]
    found: dict[str, Any] = next(vp for vp in (one() for one in vps().values()) if vp["cpu"] == CPU)
    return found


def clock_events(machine: Machine) -> int:
    """How many clock events the processor has had."""
    count: int = vp_of(machine)["guest"]()["clock_events"]
    return count


def test_clock_event_comes_when_the_machine_clock_says(machine: Machine, tmp_path: Path) -> None:
    """A minute is a minute of the machine's clock: held, nothing comes; advanced, it comes at once; `check` agrees."""
    bell = HostBell(machine.doorbells.view, machine.wakeup("host"))
    machine.clock.hold()
    before = ask_guest(machine, "timer", cpu=CPU, after_ns=60 * SECOND_NS)["clock_events"]
    wait_for(lambda: vp_of(machine)["stimer"]["0"]["enabled"] and vp_of(machine)["stimer"]["0"]["count"], "the timer")
    armed = vp_of(machine)["stimer"]["0"]
    waited = (clock_events(machine), armed["expiration_time"] * 100 - machine.clock.now())

    machine.clock.advance(60 * SECOND_NS)
    bell.wake()
    wait_for(lambda: clock_events(machine) == before + 1, "the clock event")
    machine.clock.release()

    assert waited[0] == before
    assert 60 * SECOND_NS - 100 < waited[1] <= 60 * SECOND_NS
    assert (armed["sint"], armed["periodic"], armed["expiration_time"]) == (2, False, armed["count"])
    wait_for(lambda: not vp_of(machine)["stimer"]["0"]["enabled"], "the timer to be disabled")
    stopped = call(tmp_path, "stop", "--machine", NAME)
    checked = call(tmp_path, "check", str(tmp_path / "t.rec"), "--json")
    assert (stopped.returncode, checked.returncode) == (0, 0), (stopped.stderr, checked.stdout)
    assert report(checked.stdout)["violations"] == []
    records = [one for one in Recording(tmp_path / "t.rec").records() if one.event.name.startswith(("timer_", "clock"))]
    assert [one.event.name for one in records] == ["timer_armed", "timer_expired", "timer_delivered", "clock_event"]
    assert {one.arguments["expiration_time"] for one in records} == {armed["count"]}
