"""The connection to the host: posting with retries, version negotiation, offers, unload (reference 2.3, 3.13).

Stands for drivers/hv/connection.c. Functions return 0 or a negative errno, as the kernel's do.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING, Final

from emu.doorbells import make_bell
from emu.layout import CONNECTIONS
from emu.tracing import E_POST, E_REQ_ALLOC, E_SIGNAL
from emu.wire.hypercalls import (
    VMBUS_MESSAGE_CONNECTION_ID,
    VMBUS_MESSAGE_CONNECTION_ID_4,
    HvStatus,
)
from emu.wire.messages import (
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    RelidReleased,
    RequestOffers,
    Unload,
    VersionResponse,
    parse,
)
from emu.wire.synic import VMBUS_MESSAGE_SINT
from emu.wire.versions import VERSION_WIN8_1, VERSION_WIN10_V5, version_text
from guestproc.kernel.layout import Channel, ConnectionState
from guestproc.kernel.pages import PageOwner
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import pending
from guestproc.vmbus.hv import hv_post_message, hv_signal_event

if TYPE_CHECKING:
    from guestproc.current import Current

RETRIES: Final = 100
DOUBLING_STOPS: Final = 22
REPLY_TIMEOUT_NS: Final = 60 * SECOND_NS
"""The kernel waits without limit for a reply; every wait of ours has a deadline, and this one is a bug's."""
_MSGTYPE: Final = Struct("<I")


def vmbus_post_msg(current: Current, message: Message, *, can_sleep: bool = True) -> int:
    """Post a channel message; retries what may pass (no buffers, no connection yet), up to 100 times.

    0, -EAGAIN or -ENOBUFS after the last try, -ENXIO at once for an INITIATE_CONTACT on a connection that
    does not exist, -EINVAL for any other status.
    """
    payload = message.pack()
    connection_id: int = current.connection.msg_conn_id
    msgtype = _MSGTYPE.unpack_from(payload)[0]
    usec = 1
    result = 0
    for attempt in range(RETRIES):
        status = hv_post_message(current, connection_id, payload)
        current.record(E_POST, connection_id, msgtype, len(payload), status & 0xFFFF)
        if status == HvStatus.SUCCESS:
            return 0
        if status == HvStatus.INVALID_CONNECTION_ID:
            if msgtype == MessageType.INITIATE_CONTACT:
                return -errno.ENXIO
            result = -errno.EAGAIN
        elif status in (HvStatus.INSUFFICIENT_MEMORY, HvStatus.INSUFFICIENT_BUFFERS):
            result = -errno.ENOBUFS
        else:
            current.log(f"hv_post_msg() failed; error code:{status}")
            return -errno.EINVAL
        delay(current, usec * 1_000, can_sleep=can_sleep)
        if attempt < DOUBLING_STOPS:
            usec *= 2
    return result


def delay(current: Current, nanoseconds: int, *, can_sleep: bool = True) -> None:
    """udelay, mdelay or msleep: let machine time pass; with interrupts taken meanwhile where that is allowed."""
    actor = current.actor
    end = actor.now() + nanoseconds
    while (left := end - actor.now()) > 0 and not actor.stopping():
        if can_sleep and left > 50_000:
            actor.block(end)
        else:
            actor.yield_processor()


def vmbus_connect(current: Current) -> int:
    """Negotiate from the highest version down until the host takes one (`vmbus_connect`)."""
    connection = current.connection
    connection.conn_state.store(ConnectionState.CONNECTING)
    connection.connect_cpu = current.cpu
    pages = current.tables.pages
    if not connection.int_page_gpa:
        connection.int_page_gpa = pages.alloc_pages(current.actor, 0, PageOwner.CONNECTION).gpa
        for index in range(2):
            connection.monitor_page_gpas[index] = pages.alloc_pages(current.actor, 0, PageOwner.CONNECTION).gpa
    result = -errno.EDOM
    for version in current.era.versions:
        result = vmbus_negotiate_version(current, version)
        if result == 0:
            connection.vmbus_proto_version = version
            current.log(f"Vmbus version:{version_text(version)}")
            return 0
        if result == -errno.ETIMEDOUT:
            break
    else:
        result = -errno.EDOM
    connection.conn_state.store(ConnectionState.DISCONNECTED)
    free_connection_pages(current)
    return result


def free_connection_pages(current: Current) -> None:
    """Give the interrupt page and the monitor pages back."""
    connection, pages = current.connection, current.tables.pages
    for gpa in (connection.int_page_gpa, *connection.monitor_page_gpas.tolist()):
        if gpa:
            pages.free(current.actor, pages.run_at(gpa >> 12))
    connection.int_page_gpa = 0
    connection.monitor_page_gpas[0] = connection.monitor_page_gpas[1] = 0


def vmbus_negotiate_version(current: Current, version: int) -> int:
    """Ask for one version and wait: 0, -ECONNREFUSED when it is not spoken, or why it could not be asked."""
    connection = current.connection
    multiclient = version >= VERSION_WIN10_V5
    connection.msg_conn_id = VMBUS_MESSAGE_CONNECTION_ID_4 if multiclient else VMBUS_MESSAGE_CONNECTION_ID
    message = InitiateContact(
        vmbus_version_requested=version,
        target_vcpu=current.cpu_record(0).vp_index,
        interrupt_page=0 if multiclient else connection.int_page_gpa,
        monitor_page1=connection.monitor_page_gpas[0],
        monitor_page2=connection.monitor_page_gpas[1],
        msg_sint=VMBUS_MESSAGE_SINT if multiclient else 0,
    )
    request = pending.new_request(current.tables, MessageType.INITIATE_CONTACT)
    if request is None:
        return -errno.ENOMEM
    with connection.channelmsg_lock.hold(current.actor):
        pending.enter(current.tables, request)
    current.record(E_REQ_ALLOC, MessageType.INITIATE_CONTACT, version, request.index)
    try:
        result = vmbus_post_msg(current, message)
        if result:
            return result
        request.waitevent.wait(current.actor, REPLY_TIMEOUT_NS)
        response = parse(request.response[: request.response_size])
    finally:
        with connection.channelmsg_lock.hold(current.actor):
            pending.leave(current.tables, request)
        current.tables.requests.free(request)
    assert isinstance(response, VersionResponse)
    if not response.version_supported:
        return -errno.ECONNREFUSED
    connection.conn_state.store(ConnectionState.CONNECTED)
    if multiclient:
        connection.msg_conn_id = response.msg_conn_id
    return 0


def vmbus_request_offers(current: Current) -> int:
    """Ask for all offers; they come as messages, each on its own."""
    return vmbus_post_msg(current, RequestOffers())


def vmbus_release_relid(current: Current, relid: int) -> int:
    """Tell the host that its id is free again."""
    from emu.tracing import E_RELEASE

    result = vmbus_post_msg(current, RelidReleased(relid))
    current.record(E_RELEASE, relid, 0, -result)
    return result


def vmbus_send_modifychannel(current: Current, channel: Channel, target_vp: int) -> int:
    """Ask the host to interrupt another VP for this channel (4.1 and later)."""
    return vmbus_post_msg(current, ModifyChannel(channel.relid, target_vp))


def vmbus_set_event(current: Current, channel: Channel) -> None:
    """Signal the host: the doorbell where the connection id has one, HvCallSignalEvent elsewhere."""
    channel.sig_events.fetch_add(1)
    connection_id = channel.sig_event
    current.counters.doorbells += 1
    current.record(E_SIGNAL, channel.relid, 0, connection_id)
    if connection_id >= CONNECTIONS:
        hv_signal_event(current, connection_id)
        return
    ring = current.bells.get(connection_id)
    if ring is None:
        machine = current.machine
        ring = make_bell(machine.doorbells.view, connection_id, machine.wakeup("host").post)
        current.bells[connection_id] = ring
    ring()


def vmbus_setevent(current: Current, channel: Channel) -> None:
    """Signal the host the way the channel wants it: no offer of ours is monitored, so always directly."""
    vmbus_set_event(current, channel)


def vmbus_initiate_unload(current: Current) -> int:
    """Leave the host: it closes everything and answers; 0, or why the message could not be posted."""
    connection = current.connection
    if connection.conn_state.exchange(ConnectionState.DISCONNECTED) == ConnectionState.DISCONNECTED:
        return 0
    if connection.vmbus_proto_version < VERSION_WIN8_1:
        return 0
    connection.unload_event.reinit()
    result = vmbus_post_msg(current, Unload())
    if result == 0:
        connection.unload_event.wait(current.actor, REPLY_TIMEOUT_NS)
    return result


def vmbus_disconnect(current: Current) -> None:
    """Unload, then give the connection's pages back."""
    vmbus_initiate_unload(current)
    free_connection_pages(current)
