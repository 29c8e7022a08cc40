"""Connecting, posting and unloading, against a host that does as the test says."""

from __future__ import annotations

import errno

import pytest

from emu.errors import DeadlinePassed
from emu.fault_plan import FaultPlan
from emu.wire.hypercalls import HvStatus
from emu.wire.messages import (
    InitiateContact,
    Message,
    MessageType,
    RelidReleased,
    RequestOffers,
    Unload,
    UnloadResponse,
    VersionResponse,
)
from emu.wire.versions import (
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_3,
)
from guestproc.kernel.layout import ConnectionState
from guestproc.protocol import faults
from guestproc.protocol.era import CURRENT
from guestproc.vmbus.bus import vmbus_start
from guestproc.vmbus.connection import vmbus_connect, vmbus_disconnect, vmbus_initiate_unload, vmbus_post_msg
from tests.guestproc.world import World

T = MessageType
SECOND_NS = 1_000_000_000


def contacts(world: World) -> list[tuple[int, int]]:
    """(version, connection id) of every INITIATE_CONTACT that arrived."""
    return [
        (message.vmbus_version_requested, connection)
        for message, connection in zip(world.host.posted, world.host.connections, strict=True)
        if isinstance(message, InitiateContact)
    ]


def test_connect_succeeds(world: World) -> None:
    """5.3 on connection 4: SINT 2, VP of CPU 0, both monitor pages; the host's connection id from then on."""
    world.host.msg_conn_id = 4
    world.boot_bus()

    assert world.call(vmbus_connect) == 0

    (contact,) = world.host.posted
    assert isinstance(contact, InitiateContact)
    connection = world.tables.connection
    assert contacts(world) == [(VERSION_WIN10_V5_3, 4)]
    assert (contact.msg_sint, contact.interrupt_page, contact.target_vcpu) == (2, 0, world.tables.cpus.at(0).vp_index)
    pages = [contact.monitor_page1, contact.monitor_page2, connection.int_page_gpa]
    assert len(set(pages)) == 3
    assert all(pages)
    assert connection.conn_state.load() == ConnectionState.CONNECTED
    assert connection.vmbus_proto_version == VERSION_WIN10_V5_3
    assert world.log == ["Vmbus version:5.3"]


def test_connect_adopts_the_hosts_connection_id(world: World) -> None:
    """From 5.0 on the host says on which connection it wants what follows."""
    world.host.msg_conn_id = 1
    world.boot()

    assert world.tables.connection.msg_conn_id == 1
    assert (world.host.posted[-1], world.host.connections[-1]) == (RequestOffers(), 1)


@pytest.mark.parametrize("lowest", [VERSION_WIN10_V5, VERSION_WIN10_V4_1, VERSION_WIN8_1, VERSION_WIN8])
def test_connect_falls_back_version_by_version_down_to_the_lowest(world: World, lowest: int) -> None:
    """Each version is asked for once, from 5.3 down, on the connection that it goes to; the first yes counts."""
    world.host.versions = {lowest}
    world.boot_bus()

    assert world.call(vmbus_connect) == 0

    tried = [version for version in CURRENT.versions if version >= lowest]
    assert contacts(world) == [(version, 4 if version >= VERSION_WIN10_V5 else 1) for version in tried]
    assert world.tables.connection.vmbus_proto_version == lowest
    assert world.tables.connection.msg_conn_id == (4 if lowest >= VERSION_WIN10_V5 else 1)


def test_connect_below_5_0_hands_over_the_interrupt_page(world: World) -> None:
    """Bytes 16 to 23 are the interrupt page there, and no SINT."""
    world.host.versions = {VERSION_WIN10_V4_1}
    world.boot_bus()
    world.call(vmbus_connect)

    contact = world.host.contact
    assert contact is not None
    assert contact.interrupt_page == world.tables.connection.int_page_gpa != 0


def test_connect_to_a_host_without_connection_4(world: World) -> None:
    """INVALID_CONNECTION_ID for each version from 5.0 on, at once and without delay; then 4.1 on connection 1."""
    del world.partition.connections.messages[4]
    world.host.versions = {VERSION_WIN10_V4_1}
    world.boot_bus()
    before = world.clock.time_ns

    assert world.call(vmbus_connect) == 0

    assert contacts(world) == [(VERSION_WIN10_V4_1, 1)]
    assert world.partition.refused["unknown-message-connection"] == 4
    assert world.clock.time_ns - before < SECOND_NS // 100


def test_connect_fails(world: World) -> None:
    """A host that speaks none of our versions: -EDOM, nothing connected, nothing left of it."""
    world.host.versions = set()
    world.boot_bus()

    assert world.call(vmbus_connect) == -errno.EDOM

    assert len(contacts(world)) == len(CURRENT.versions)
    assert world.tables.connection.conn_state.load() == ConnectionState.DISCONNECTED
    assert "Unable to connect to host" in world.log
    assert world.shut_down() == {}
    assert Unload() not in world.host.posted


def test_connect_to_a_silent_host_ends(world: World) -> None:
    """The kernel would wait for ever: behind the deadline it is -ETIMEDOUT, and no other version is tried."""
    world.host.hold(T.INITIATE_CONTACT)
    world.boot_bus()
    task = world.start(vmbus_start)
    world.pass_time(50)

    assert task.result == -errno.ETIMEDOUT
    assert len(contacts(world)) == 1
    # Of no channel and of no pages, so that none is named.
    assert any(line.endswith("INITIATE_CONTACT: no answer within 45 s") for line in world.log)


def test_connect_to_a_host_out_of_this_world(world: World) -> None:
    """A VERSION_RESPONSE that promises more than it holds is read as far as this kernel knows it."""

    def promise(message: Message) -> list[Message]:
        world.host.send(VersionResponse(1, msg_conn_id=4, supported_features=0x40).pack()[:20])
        return []

    world.host.answer[T.INITIATE_CONTACT] = promise
    world.boot_bus()

    assert world.call(vmbus_connect) == 0


def test_connect_without_memory_gives_back_what_it_had(world: World) -> None:
    """-ENOMEM, and not a page is missing."""
    world.boot_bus()
    tables = world.tables

    def hoard(current: object) -> int:
        actor = world.currents[0].actor
        taken = []
        while tables.pages.free_pages > 2:
            taken.append(tables.pages.alloc_pages(actor, 0, 8))
        result = vmbus_connect(world.currents[0])
        for run in taken:
            tables.pages.free(actor, run)
        return result

    assert world.call(hoard) == -errno.ENOMEM
    assert world.shut_down() == {}


def test_connect_without_a_record_for_its_request_fails(world: World) -> None:
    """-ENOMEM, and no older version is asked for: the host would take it, and nobody would know why."""
    faults.plan(FaultPlan(world.machine.control), "request", 1)
    world.boot_bus()

    assert world.call(vmbus_connect) == -errno.ENOMEM
    assert world.host.posted == []
    assert world.tables.connection.conn_state.load() == ConnectionState.DISCONNECTED
    assert world.log == ["Unable to connect to host"]


# -- posting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status", [HvStatus.INSUFFICIENT_BUFFERS, HvStatus.INSUFFICIENT_MEMORY, HvStatus.INVALID_CONNECTION_ID]
)
def test_post_is_tried_again(booted: World, status: HvStatus) -> None:
    """What may pass is tried until it has passed; the message arrives once."""
    booted.host.statuses.extend([status] * 5)

    task = booted.start(lambda current: vmbus_post_msg(current, RelidReleased(9)))
    booted.pass_time(1)

    assert task.result == 0
    assert booted.host.released == [9]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (HvStatus.INSUFFICIENT_BUFFERS, errno.ENOBUFS),
        (HvStatus.INSUFFICIENT_MEMORY, errno.ENOBUFS),
        (HvStatus.INVALID_CONNECTION_ID, errno.EAGAIN),
    ],
)
def test_post_gives_up_after_a_hundred_tries(booted: World, status: HvStatus, error: int) -> None:
    """168 s of machine time, a hundred posts, then the errno that says why."""
    booted.host.always = status
    posts = booted.currents[0].counters.messages_posted
    started = booted.clock.time_ns
    task = booted.start(lambda current: vmbus_post_msg(current, RelidReleased(9)))
    booted.pass_time(160)
    assert not task.ended()
    booted.pass_time(10)

    assert task.result == -error
    assert booted.currents[0].counters.messages_posted - posts == 100
    assert booted.clock.time_ns - started < 171 * SECOND_NS


@pytest.mark.parametrize("status", [HvStatus.INVALID_PARAMETER, HvStatus.ACCESS_DENIED, HvStatus.INVALID_PORT_ID])
def test_post_that_will_not_pass_is_not_tried_again(booted: World, status: HvStatus) -> None:
    """-EINVAL at once, and the kernel's line in the log."""
    booted.host.statuses.append(status)

    assert booted.call(lambda current: vmbus_post_msg(current, RelidReleased(9))) == -errno.EINVAL
    assert f"hv_post_msg() failed; error code:{int(status)}" in booted.log
    assert booted.host.released == []


def test_post_to_a_hypervisor_that_does_not_answer_is_an_error(booted: World) -> None:
    """The exit's deadline is an error of the operation, not the end of the processor."""
    booted.exit_errors.append(DeadlinePassed("exit slot 0", 5 * SECOND_NS))

    assert booted.call(lambda current: vmbus_post_msg(current, RelidReleased(9))) == -errno.ETIMEDOUT
    assert booted.call(lambda current: vmbus_post_msg(current, RelidReleased(9))) == 0


def test_machine_that_stops_ends_the_tries(booted: World) -> None:
    """Whoever waits to post again leaves with the machine."""
    booted.host.always = HvStatus.INSUFFICIENT_BUFFERS
    task = booted.start(lambda current: vmbus_post_msg(current, RelidReleased(9)))
    booted.pass_time(10)

    booted.close()

    assert not task.ended()


# -- unload ---------------------------------------------------------------------------------------------


def test_unload_waits_for_its_answer(booted: World) -> None:
    """UNLOAD once; the pages are given back behind the answer, not before."""
    booted.host.hold(T.UNLOAD)
    task = booted.start(vmbus_disconnect)
    booted.settle()
    assert not task.ended()
    assert booted.tables.connection.int_page_gpa

    booted.host.release(T.UNLOAD)
    booted.settle()

    assert task.ended()
    assert not booted.tables.connection.int_page_gpa
    assert booted.host.types().count(T.UNLOAD) == 1


def test_second_unload_is_not_sent(booted: World) -> None:
    """Only who finds the connection up sends it (races.md G1)."""
    assert booted.call(vmbus_initiate_unload) == 0
    assert booted.call(vmbus_initiate_unload) == 0

    assert booted.host.types().count(T.UNLOAD) == 1


def test_unload_answer_that_came_unasked_does_not_count(booted: World) -> None:
    """A host may send UNLOAD_RESPONSE at any time; the wait is for the answer to this UNLOAD."""
    booted.host.send(UnloadResponse())
    booted.settle()
    booted.host.hold(T.UNLOAD)

    task = booted.start(vmbus_initiate_unload)
    booted.settle()

    assert not task.ended()


def test_unload_of_a_silent_host_ends(booted: World) -> None:
    """Behind the deadline we go on without; the pages that the host may still write to stay its."""
    booted.host.hold(T.UNLOAD)
    task = booted.start(vmbus_disconnect)
    booted.pass_time(50)

    assert task.ended()
    assert booted.tables.connection.int_page_gpa
    assert "VMBus UNLOAD did not complete (-110)" in booted.log


def test_hosts_below_3_0_are_left_without_unload(world: World) -> None:
    """They know no way back from it."""
    world.host.versions = {VERSION_WIN8}
    world.boot()

    assert world.shut_down() == {}
    assert Unload() not in world.host.posted
