"""The guest's programs: their claims do not hold rescinds up, and ECHO_CHECK finds what comes back wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.ring import Packet
from emu.task_board import Program as Number
from emu.task_board import TaskRow, TaskState
from emu.wire.device_classes import ECHO, NETLIKE, DeviceClass
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND
from guestproc.current import Current
from guestproc.net_check import net_check
from guestproc.tally import Tally
from guestproc.tasks import crunch, echo_check
from guestproc.vcpu import Vcpu
from tests.guestproc.world import World

Program = Callable[[Current, Vcpu, TaskRow], Tally]
RELIDS = (9, 10)


@pytest.mark.parametrize(
    ("program", "device"),
    [(echo_check, ECHO), (crunch, ECHO), (net_check, NETLIKE)],
    ids=["echo_check", "crunch", "net_check"],
)
@pytest.mark.parametrize("order", [RELIDS, RELIDS[::-1]], ids=["first first", "last first"])
def test_rescind_of_one_device_is_not_held_up_by_the_wait_on_another(
    booted: World, program: Program, device: DeviceClass, order: tuple[int, ...]
) -> None:
    """Two devices that do not answer are taken back in either order: the program ends at once, and nothing is wrong."""
    booted.machine.config["device"] = [
        {"class": device.name, "instance": f"00000000-0000-0000-0000-{relid:012}", "subchannels": 0, "ring_pages": 40}
        for relid in RELIDS
    ]
    for relid in RELIDS:
        booted.host.device(relid, class_id=device.guid)
        booted.host.on_packet[relid] = lambda packet: []
    booted.settle()
    cpu = 0
    for relid in RELIDS:
        booted.channel(relid).target_cpu.store(cpu)
    row = TaskRow(0, TaskState.RUNNING, Number.ECHO_CHECK, cpu, 0, 5, 0, 0, 0, b"", "")
    tally = booted.start(lambda current: program(current, booted.cpus[cpu], row), cpu=cpu)
    booted.settle()
    assert not tally.ended()
    for relid in order:
        booted.host.rescind(relid)
    booted.pass_time(0.5)

    assert tally.ended() and tally.result.errors == 0
    assert sorted(booted.host.released) == list(RELIDS)


def as_it_is(packet: Packet) -> list[Packet]:
    """What an echo answers."""
    _packet_type, flags, trans_id, payload = packet
    completes = flags & COMPLETION_REQUESTED and trans_id
    return [(VM_PKT_COMP if completes else VM_PKT_DATA_INBAND, 0, trans_id, payload)]


def changed(packet: Packet) -> list[Packet]:
    """Its first byte is another."""
    ((kind, flags, trans_id, payload),) = as_it_is(packet)
    return [(kind, flags, trans_id, bytes([payload[0] ^ 1]) + payload[1:])]


def as_the_other_kind(packet: Packet) -> list[Packet]:
    """A completion that was not asked for, or none where one was."""
    ((kind, flags, trans_id, payload),) = as_it_is(packet)
    return [(VM_PKT_DATA_INBAND if kind == VM_PKT_COMP else VM_PKT_COMP, flags, trans_id or 7, payload)]


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [(as_it_is, 0), (changed, 40), (as_the_other_kind, 40), (lambda packet: as_it_is(packet) * 2, None)],
    ids=["right", "changed", "other kind", "twice"],
)
def test_echo_check_counts_each_answer_that_is_not_what_was_sent(
    booted: World, answer: Callable[[Packet], list[Packet]], wrong: int | None
) -> None:
    """Each of 40 that is another, or of another kind; also one that comes when nothing is out any more."""
    booted.host.device(9)
    booted.settle()
    booted.host.on_packet[9] = answer
    row = TaskRow(0, TaskState.RUNNING, Number.ECHO_CHECK, 0, 9, 40, 0, 0, 0, b"", "")
    tally = booted.start(lambda current: echo_check(current, booted.cpus[0], row), cpu=0)
    booted.pass_time(0.5)

    assert tally.ended()
    assert tally.result.errors == wrong if wrong is not None else tally.result.errors > 0
