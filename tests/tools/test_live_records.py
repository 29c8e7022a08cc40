"""Records as they come: in the order of time, and none without what it followed from."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from emu.control import ActorKind
from emu.ipc.segments import unlink_objects
from emu.machine import Machine
from emu.tracing import E_OFFER, E_PROBE, Context, Drain
from tools.live_records import LiveRecords


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that records, without processes."""
    name = f"t-live{os.getpid()}"
    made = Machine.create(name, {}, ram_bytes=1 << 20, vp_indices=[0], cpuid=[])
    try:
        made.control.set_recording()
        yield made
    finally:
        unlink_objects(name)
        made.close()


def test_an_effect_is_not_given_without_its_cause(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host does behind the look at its ring comes at the next look, with the record that follows from it."""
    rows = [machine.enlist(kind, kind.name.lower())[0] for kind in (ActorKind.HYPERVISOR, ActorKind.WORKER)]
    host, worker = [machine.recorder(row, vp=0, context=Context.HOST) for row in rows]
    assert host is not None and worker is not None
    live = LiveRecords(machine)
    host.record(E_OFFER, 1)
    take = Drain.take

    def amid_the_look(drain: Drain, slot: int) -> bytes:
        taken = take(drain, slot)
        if slot == rows[0].slot:
            host.record(E_OFFER, 2)
            worker.record(E_PROBE, 2)
        return taken

    monkeypatch.setattr(Drain, "take", amid_the_look)
    first = live.take()
    monkeypatch.undo()
    second = live.take()

    told = [[(record.event.name, record.arguments["relid"]) for record in look] for look in (first, second)]
    assert told == [[("offer", 1)], [("offer", 2), ("probe", 2)]]
