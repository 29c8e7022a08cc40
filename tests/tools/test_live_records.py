"""Records as they come: in the order of time, and none without what it followed from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emu.control import ActorKind
from emu.machine import Machine
from emu.tracing import E_OFFER, E_PROBE, Context, Drain
from tests.tools.recorded import recording_machine
from tools.live_records import LiveRecords


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that records."""
    with recording_machine() as made:
        yield made


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
