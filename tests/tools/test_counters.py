"""A machine's counters and its recording: the same things, counted twice, are the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from emu.control import ActorKind
from emu.scenario import Scenario, parse_device
from emu.tracing import Kick
from tests.tools.recorded import read
from tools.draining import recording
from tools.launch import launch
from tools.run_machine import exercise


def test_counters_are_what_the_recording_counts(tmp_path: Path) -> None:
    """Interrupts, kicks, polls, exits, doorbells, tasklets, works: none is counted twice, none told that was not."""
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:3")])
    with launch(scenario, record=True) as running, recording(running, tmp_path / "counted.rec"):
        running.wait_ready()
        exercise(running)
        running.shut_down_guest()
        running.stop()
        control = running.machine.control
        # The launcher's own orders are interrupts, too, but it records nothing.
        orders = next(row for row in control.rows() if row.kind == ActorKind.LAUNCHER)
        totals = Counter(control.counter_totals()) - Counter(control.counter_values(orders.slot))
    records = read(tmp_path / "counted.rec")
    events = Counter(one.event.name for one in records)
    kicks = Counter(one.arguments["how"] for one in records if one.event.name == "kick")
    polls = Counter(one.arguments["paid"] for one in records if one.event.name == "poll")

    assert totals["interrupts"] > 0 and totals["doorbells"] > 0
    counted = {
        "requested": events["irq_raise"],
        "merged": kicks[Kick.MERGED],
        "kicks_semaphore": kicks[Kick.SEMAPHORE],
        "kicks_signal": kicks[Kick.SIGNAL],
        "kicks_none": kicks[Kick.NONE],
        "interrupts": events["isr_enter"],
        "polls_paid": polls[1],
        "polls_vain": polls[0],
        "exits": events["vmexit"],
        "doorbells": events["doorbell"],
        "messages_posted": sum(one.event.name == "post" and one.actor.kind != "HYPERVISOR" for one in records),
        "messages_taken": events["slot_read"],
        "tasklets": events["tasklet_run"],
        "works": events["work_run"],
    }
    assert {name: totals[name] for name in counted} == counted
