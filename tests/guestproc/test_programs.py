"""The guest's programs and devices that are taken away under them: claims do not hold rescinds up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emu.task_board import Program as Number
from emu.task_board import TaskRow, TaskState
from emu.wire.device_classes import ECHO, NETLIKE, DeviceClass
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
