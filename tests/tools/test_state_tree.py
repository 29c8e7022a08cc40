"""The tree of a machine's state: both ends of a channel under one relid, registers, queues, and no foreign RAM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from emu.control import ActorKind
from emu.errors import UserError
from emu.host_tables import NO_TIMERS, SINTS, HostGpadl, HostTables, HostTimer, HostVp
from emu.layout import D_CONNECTION, D_CONNECTION_SUMMARY, VP_REQUEST, vp_page_offset
from emu.machine import Machine
from emu.mirror import Left, Mirror, MirrorChannel
from emu.wire.device_classes import BY_NAME
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, message_slot, stimer_config
from guestproc.protocol.numbers import Works
from hostproc.protocol.states import ChannelState, GpadlState
from tests.tools.sysfs_records import Guest, guest_of, idle_machine
from tools.crash import state_of
from tools.inspect import saved_record
from tools.state_node import find, whole
from tools.state_tree import StateTree

SIMP_GPA = 0xA0000


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that nothing runs in."""
    with idle_machine("state") as machine:
        yield machine


@pytest.fixture
def guest(machine: Machine) -> Guest:
    """Its guest's records, with one device whose channel has rings and a GPADL, which the host knows, too."""
    guest = guest_of(machine)
    guest.driver(1, "hv_echo")
    _device, channel = guest.device(7, 5, driver=1, cpu=1)
    out, _inward = guest.rings(channel)
    guest.ring_words(out, write=128, read=64, mask=1)
    Mirror(machine.control).write_channel(
        MirrorChannel(7, ChannelState.OPEN, 2, 0, 0xE1E10, 1, 1, 0x2007, 0, BY_NAME["echo"].guid, UUID(int=5))
    )
    HostTables(machine.control).write_gpadls(
        7, (HostGpadl(7, 0xE1E10, GpadlState.ACCEPTED, 8, True, ((0x100, 6), (0x200, 2))),)
    )
    return guest


def at(machine: Machine, path: str) -> Any:
    """What is at a path, all of it."""
    return whole(find(StateTree(machine).root(), path))


def test_both_ends_of_a_channel_are_joined(machine: Machine, guest: Guest) -> None:
    """The host's state, the guest's, the rings' words and the GPADLs stand under one relid."""
    found = at(machine, "channels/7")

    assert found["host"]["state"] == "OPEN"
    assert found["guest"]["state"] == "OPENED"
    assert found["ring"]["out"]["bytes_to_read"] == 64
    assert found["ring"]["out"]["interrupt_mask"] == 1
    assert found["gpadls"] == {"0xe1e10": {"state": "ACCEPTED", "pages": 8, "ring": True, "pfns": "0x100+6,0x200+2"}}
    assert at(machine, "gpadls/7") == found["gpadls"]
    assert at(machine, "ports/events") == {"0x2007": {"relid": 7, "state": "OPEN"}}
    assert at(machine, f"devices/{UUID(int=5)}/driver") == "hv_echo"


def test_channel_that_one_end_knows_alone_is_shown(machine: Machine, guest: Guest) -> None:
    """What the host offers and the guest has not seen, and what the guest still has of one that is gone."""
    guest.device(9, 6)
    Mirror(machine.control).write_channel(
        MirrorChannel(8, ChannelState.CLOSED, 1, 0, 0, 0, 0xFFFFFFFF, 0, 0, BY_NAME["echo"].guid, UUID(int=8))
    )

    assert [sorted(at(machine, f"channels/{relid}")) for relid in (7, 8, 9)] == [
        ["gpadls", "guest", "host", "ring"],
        ["gpadls", "host"],
        ["gpadls", "guest", "ring"],
    ]
    assert at(machine, "channels/8/host/target_vp") is None


def test_vp_has_its_words_registers_and_slots(machine: Machine, guest: Guest) -> None:
    """Requested vectors, SINT 2 and what waits for it, and the message in its slot with the pending bit."""
    registers = HostVp(1, SIMP_GPA | 1, 0, (0x10000,) * 2 + (0xF3,) + (0x10000,) * 13, (0, 0, 5) + (0,) * 13)
    registers = replace(registers, stimer=(HostTimer(stimer_config(2, auto_enable=True), 900, 900), *NO_TIMERS[1:]))
    HostTables(machine.control).write_vp(0, registers)
    machine.vps.view.store_u64(vp_page_offset(0) + VP_REQUEST + 24, 1 << (0xF3 - 192))
    slot = SIMP_GPA + message_slot(2)
    guest.store(slot, HVMSG_CHANNEL_MESSAGE)
    guest.store(slot + 5, 1, 1)
    guest.store(slot + 16, 1)

    found = at(machine, "vps/0")

    assert found["irr"] == ["0xf3"] and found["isr"] == []
    assert found["sint"]["2"] == {
        "vector": "0xf3",
        "masked": False,
        "auto_eoi": False,
        "polling": False,
        "value": "0xf3",
        "waiting": 5,
    }
    assert len(found["sint"]) == SINTS
    assert found["stimer"]["0"] == {
        "enabled": True,
        "periodic": False,
        "lazy": False,
        "auto_enable": True,
        "sint": 2,
        "config": "0x20009",
        "count": 900,
        "expiration_time": 900,
    }
    assert found["stimer"]["3"]["expiration_time"] is None
    assert found["slot"]["2"]["msgtype"] == "OFFERCHANNEL" and found["slot"]["2"]["msg_pending"] is True


def test_ram_of_a_foreign_guest_is_not_read(machine: Machine) -> None:
    """Whatever lies there: the host's half is all there is."""
    guest_of(machine).device(7, 5)
    machine.config["no_guest"] = True
    HostTables(machine.control).write_vp(0, HostVp(1, SIMP_GPA | 1, 1, (0,) * SINTS, (0,) * SINTS))

    tree = whole(StateTree(machine).root())

    assert tree["channels"] == tree["queues"] == tree["devices"] == {}
    assert "guest" not in tree["connection"] and "guest" not in tree["vps"]["0"]
    assert tree["machine"]["guest"] == "foreign"


@pytest.mark.parametrize(
    ("left", "told"),
    [(Left.NOBODY, None), (Left.UNLOADED, "unloaded"), (Left.DETACHED, "detached"), (Left.DIED, "died")],
)
def test_connection_says_how_the_guest_left(machine: Machine, left: Left, told: str | None) -> None:
    """That of the newest guest that is gone, whoever made it: the host knows."""
    machine.config["no_guest"] = True
    numbers: dict[str, Any] = dict.fromkeys(
        ("version", "offers", "open_channels", "gpadls", "to_slots", "outgoing", "incoming"), 0
    )
    Mirror(machine.control).write_head(**numbers, attached_pid=0, disconnects=1, left=left)

    assert at(machine, "connection/host/guest_left") == told


def test_doorbell_that_nobody_announced_is_named(machine: Machine) -> None:
    """A bit whose summary bit is missing is never seen by the host; one with both is on its way."""
    view = machine.doorbells.view
    assert at(machine, "connection/host/unannounced_doorbells") == []

    view.store_u64(D_CONNECTION + 8 * 128, 0b10)
    view.store_u64(D_CONNECTION + 8 * 200, 1 << 63)
    assert at(machine, "connection/host/unannounced_doorbells") == ["0x2001", "0x323f"]

    view.store_u64(D_CONNECTION_SUMMARY + 8 * 2, 1)
    assert at(machine, "connection/host/unannounced_doorbells") == ["0x323f"]


def test_queue_names_the_work_that_waits(machine: Machine, guest: Guest) -> None:
    """Function, serial and age of each piece of work, by its place in the queue."""
    item = guest.tables.work_queues.allocate(Works.VMBUS_ONMESSAGE_WORK, serial=44)
    assert item is not None
    item.queue, item.sequence = 1, 3
    work = at(machine, "queues/rescind/work")

    assert list(work) == ["3"]
    assert work["3"]["serial"] == 44 and not work["3"]["function"].startswith("?")


def test_only_a_processor_has_a_cpu(machine: Machine) -> None:
    """A worker has the number of its semaphore in that place of the table, the hypervisor nothing."""
    machine.control.enlist(ActorKind.HYPERVISOR, "hypervisor")
    machine.control.enlist(ActorKind.VCPU, "vcpu1", cpu=1)
    machine.control.enlist(ActorKind.WORKER, "kworker/pri_chan", cpu=3)

    assert (at(machine, "processes/vcpu1/cpu"), at(machine, "processes/kworker/pri_chan/semaphore")) == (1, "actor.3")
    told = at(machine, "processes")
    assert [name for name, row in told.items() if "cpu" in row] == ["vcpu1"]


def test_state_of_a_damaged_machine_is_still_a_record(machine: Machine, guest: Guest) -> None:
    """Whatever a dying guest left: the rest is there, and all of it goes into a file."""
    machine.control.enlist(ActorKind.VCPU, "vcpu0")
    channel = next(guest.tables.channels.live())
    channel.ring_gpa = machine.ram.size - 4096
    channel.state.store(99)

    state = state_of(machine)

    assert state["channels"]["7"]["guest"]["state"] == "?99"
    assert state["processes"]["vcpu0"]["kind"] == "vcpu"
    assert json.loads(json.dumps(state))["machine"]["name"] == machine.name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": {"name": "other"}}', '{"schema": {"name": "vmbus-emu.crash"}}']
)
def test_file_that_is_no_crash_record_is_refused(tmp_path: Path, text: str) -> None:
    """One line that names the file."""
    path = tmp_path / "file.json"
    path.write_text(text)

    with pytest.raises(UserError, match="crash record"):
        saved_record(path)
