"""Recordings for tests, made by the recorder itself on a machine without processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

from emu.control import ActorKind
from emu.event_fields import Argument, guid_value, text_value
from emu.ipc.segments import unlink_objects
from emu.machine import Machine
from emu.recording import RecordingWriter
from emu.tracing import EVENTS, Context, Recorder


@contextmanager
def recorders(path: Path, *actors: tuple[ActorKind, str, int, Context]) -> Iterator[list[Recorder]]:
    """A recorder for each actor (kind, name, CPU, context); what they record is in `path` afterwards."""
    name = f"trace{os.getpid()}"
    machine = Machine.create(name, {}, ram_bytes=1 << 20, vp_indices=[0, 1], cpuid=[])
    try:
        machine.control.set_recording()
        made = []
        for kind, actor, cpu, context in actors:
            row, _counters = machine.enlist(kind, actor, cpu=cpu)
            recorder = machine.recorder(row, vp=cpu, context=context)
            assert recorder is not None
            made.append(recorder)
        writer = RecordingWriter(path, machine)
        yield made
        writer.close()
    finally:
        unlink_objects(name)
        machine.close()


def record_every_event(path: Path) -> Path:
    """Record every event once, by two actors in turn, with a value of its own for each argument."""
    vcpus = [(ActorKind.VCPU, f"vcpu{cpu}", cpu, Context.ISR) for cpu in range(2)]
    with recorders(path, *vcpus) as made:
        for number, spec in enumerate(EVENTS.values()):
            values = (sample(field, at) for at, field in enumerate(spec.fields, 1))
            made[number % 2].record(spec.number, *spec.pack(*values))
    return path


def sample(field: Argument, at: int) -> int:
    """A value that the type can hold, and that tells the arguments of one event apart."""
    if field.type == "guid":
        return guid_value(uuid5(NAMESPACE_OID, field.name).bytes_le)
    if field.text:
        return text_value(f"{field.name} {at}", field.width // 8)
    return -at if field.signed else at & (1 << field.bits) - 1
