"""What a schedule waits for is looked at in real machines whose processes get no core for a while."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tools.director import Director, Seen
from tools.launch import launch
from tools.races import exhibits
from tools.schedule import Schedule

LATE_WORKERS = """
import threading

start = threading.Thread.start

def late(thread):
    if thread.name.startswith("kworker/system"):
        run = thread.run
        thread.run = lambda: (open({gate!r}).close(), run())
    start(thread)

threading.Thread.start = late
"""
"""A `sitecustomize`: the threads of this queue begin when somebody opens the other end of a pipe."""


def test_timer_of_a_held_clock_is_due_when_somebody_pushes_the_hands() -> None:
    """A host that is still asleep then has it before it: the machine has not settled, however long that takes."""
    schedule = Schedule.load(exhibits()["timer-slot-livelock"]).with_fix()
    with launch(schedule.scenario, record=True, races=True, faults=True) as running:
        running.wait_ready()
        director = Director(running, Seen())
        steps = iter(schedule.steps)
        for step in steps:
            if step.text.startswith("advance"):
                break
            director.do(step)
        director.settle()
        host = running.inner["hypervisor"].pid
        os.kill(host, signal.SIGSTOP)
        try:
            director.do(step)
            found = director.settling.take()
        finally:
            os.kill(host, signal.SIGCONT)
        for step in steps:
            director.do(step)
        director.release_all()
        director.settle()
        assert running.shut_down_guest()

    # On a computer that is busy a task of the guest may not have come to rest either.
    assert "a timer of hypervisor is due" in found.moving


def test_work_that_nobody_takes_yet_is_no_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The seed's rescinds are work for `system`, whose threads a loaded computer starts long behind the boot."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "sitecustomize.py").write_text(LATE_WORKERS.format(gate=str(gate)), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    schedule = Schedule.load(exhibits()["percpu-list-torn"]).with_fix()
    with launch(schedule.scenario, record=True, races=True, faults=True) as running:
        running.wait_ready()
        director = Director(running, Seen())
        for step in schedule.steps:
            if step.text.startswith("rescind"):
                break
            director.do(step)
        director.do(step)
        director.release_all()
        only = ("work waits on queue SYSTEM, and a worker of it has not begun",)
        running.wait_until(lambda: director.settling.take().moving == only, 10.0, "the rescind to wait alone")
        gate.write_bytes(b"")
        director.settle()

        assert list(director.settling.view.work()) == []
        assert running.shut_down_guest()
