"""One recording of a real machine for all tests that read one: boot, traffic, a device that comes and goes, the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from emu.ipc.segments import unlink_objects
from emu.machine import Machine
from emu.recording import Recording, TraceRecord
from emu.scenario import Scenario, parse_device
from tools.draining import recording
from tools.latency import hot_plug
from tools.launch import launch
from tools.run_machine import exercise


def record_machine(path: Path) -> None:
    """Boot three echo devices, exchange packets, hot-plug another, shut down; everything recorded into `path`."""
    scenario = Scenario.default().with_overrides(devices=[parse_device("echo:3")])
    with launch(scenario, record=True) as running, recording(running, path):
        running.wait_ready()
        exercise(running)
        hot_plug(running, 2)
        running.shut_down_guest()
        running.stop()


def read(path: Path) -> list[TraceRecord]:
    """All its records, by time."""
    with Recording(path) as one:
        assert (one.damage, one.dropped) == ("", 0)
        return list(one.records())


class Edited:
    """A copy of some records to be changed in one place."""

    def __init__(self, records: list[TraceRecord]) -> None:
        self.records = list(records)

    def where(self, event: str, *, actor: str = "", last: bool = False, **wanted: int) -> int:
        """Index of the first (or last) record of an event with these arguments, of actors of this kind."""
        order = range(len(self.records))
        for index in reversed(order) if last else order:
            record = self.records[index]
            mine = record.event.name == event and actor in ("", record.actor.kind)
            if mine and wanted.items() <= record.arguments.items():
                return index
        raise AssertionError(f"no {event} of {actor} with {wanted}")

    def change(self, index: int, **values: int) -> None:
        """Other values for some arguments of a record."""
        record = self.records[index]
        changed = {**record.arguments, **values}
        assert changed.keys() == record.arguments.keys(), values
        self.records[index] = replace(record, values=tuple(changed.values()))

    def insert(self, index: int, like: int, context: str = "", **values: int) -> None:
        """A record like another one, with other values, before `index`; its time is that of who follows."""
        made = replace(self.records[like], t_ns=self.records[index].t_ns)
        self.records.insert(index, replace(made, context=context or made.context))
        self.change(index, **values)

    def wait(self, index: int, nanoseconds: int) -> None:
        """Everything from `index` on happens so much later."""
        self.records[index:] = [replace(one, t_ns=one.t_ns + nanoseconds) for one in self.records[index:]]


@contextmanager
def recording_machine() -> Iterator[Machine]:
    """A machine that records, without processes."""
    name = f"t-records{os.getpid()}"
    made = Machine.create(name, {}, ram_bytes=1 << 20, vp_indices=[0], cpuid=[])
    try:
        made.control.set_recording()
        yield made
    finally:
        unlink_objects(name)
        made.close()
