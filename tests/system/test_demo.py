"""`vmbus-emu demo` as a user runs it: through a pipe, for a program, and interrupted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from emu.control import ActorRow, Control
from emu.scenario import MachineSpec, Scenario
from tests.system.commands import assert_gone, call, ended, objects, report, start, wait_for
from tools import demo
from tools.testing import running


def test_demo_tells_a_whole_life_in_80_columns(tmp_path: Path) -> None:
    """Boot, three devices, packets, a hot remove, the end; plain lines, no escape sequence, nothing left."""
    done = call(tmp_path, "demo", "--fast")

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 or "\x1b" in line or "\r" in line] == []
    assert [line[0] for line in lines if line[1:3] == ". "] == list("1234567")
    for function in (
        "hyperv_vector_handler",
        "vmbus_isr",
        "vmbus_on_msg_dpc",
        "vmbus_process_offer",
        "vmbus_add_channel_work",
        "vmbus_open",
        "vmbus_release_relid",
    ):
        assert function in done.stdout
    assert lines[-1].endswith("docs/writing-a-driver.md")


def test_demo_waits_for_a_processor_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gets no core while guest and host agree is not there yet; it is told all the same, with its pid."""
    alive, looks = demo._alive, []

    def late(control: Control) -> list[ActorRow]:
        looks.append(control)
        return [row for row in alive(control) if row.name != "vcpu1" or len(looks) > 2]

    monkeypatch.setattr(demo, "_alive", late)
    with running(Scenario(MachineSpec(vcpus=demo.VCPUS), ()), record=True) as machine:
        story = demo.Story(machine, None)
        story.boot()

    assert {one["name"] for one in story.told["processes"]} == {*demo.ROLES}


def test_demo_for_programs_has_every_step_of_every_device(tmp_path: Path) -> None:
    """Times rise, the contexts are those of the article, the processes those of this machine."""
    done = call(tmp_path, "demo", "--json")

    assert done.returncode == 0, done.stderr
    told = report(done.stdout)
    assert told["schema"] == {"name": "vmbus-emu.demo", "version": 1}
    assert (told["version"], told["leaked"], told["echo"]["errors"]) == ("5.3", 0, 0)
    assert told["echo"]["packets"] > 0
    assert [device["class"] for device in told["devices"]] == ["echo", "scsi", "kbd"]
    pids = {one["name"]: one["pid"] for one in told["processes"]}
    for story in (*told["devices"], told["removal"]):
        steps = story["steps"]
        times = [step["at_us"] for step in steps]
        assert times == sorted(times) and times[0] == 0
        assert abs(sum(step["took_us"] for step in steps) / 1e3 - story["took_ms"]) < 0.01
        assert all(step["pid"] == pids[step["process"]] for step in steps)
        contexts = list(dict.fromkeys(step["context"] for step in steps))
        assert contexts[:3] == ["host", "ISR", "tasklet"]
    assert {step["context"] for step in told["devices"][0]["steps"]} >= {"queue work", "queue pri_chan"}
    assert told["devices"][0]["steps"][-1]["event"] == "probe"
    assert told["removal"]["steps"][-1]["event"] == "release"
    assert_gone(told["machine"])


def test_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C amid the narration: status 130, no traceback, nothing left."""
    with ended(start(tmp_path, "demo")) as process:
        name = f"vm{process.pid}"
        wait_for(lambda: bool(objects(name)), "the demo's machine to be made")
        os.killpg(process.pid, signal.SIGINT)
        _output, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (130, "")
    assert_gone(name)
