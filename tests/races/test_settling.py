"""What a schedule waits for is looked at in real machines whose processes get no core for a while."""

from __future__ import annotations

import os
import signal

from tools.director import Director, Seen
from tools.launch import launch
from tools.races import exhibits
from tools.schedule import Schedule


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
