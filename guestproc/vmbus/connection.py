"""The connection to the host: posting with retries, version negotiation, offers, unload (reference 2.3, 3.13).

Stands for drivers/hv/connection.c. Functions return 0 or a negative errno, as the kernel's do.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final
from uuid import UUID

from emu.doorbells import make_bell
from emu.errors import DeadlinePassed, MachineStopping, OutOfMemory
from emu.event_fields import guid_value
from emu.layout import CONNECTIONS
from emu.tracing import (
    E_CONN_STATE,
    E_POST,
    E_POST_BEGIN,
    E_RELEASE,
    E_SIGNAL,
    E_VMBUS_NEGOTIATE_VERSION,
    E_VMBUS_RELEASE_RELID,
    E_VMBUS_REQUEST_OFFERS,
    E_VMBUS_SEND_TL_CONNECT_REQUEST,
    E_VMBUS_SETEVENT,
    EVENTS,
    Recorder,
    Side,
)
from emu.wire.guids import guid_to_wire
from emu.wire.hypercalls import VMBUS_MESSAGE_CONNECTION_ID, VMBUS_MESSAGE_CONNECTION_ID_4
from emu.wire.message_relid import relid_of
from emu.wire.messages import (
    InitiateContact,
    Message,
    MessageType,
    RelidReleased,
    RequestOffers,
    TlConnectRequest,
    Unload,
)
from emu.wire.synic import VMBUS_MESSAGE_SINT
from emu.wire.versions import VERSION_WIN8_1, VERSION_WIN10_V5, version_text
from guestproc.kernel.layout import Channel, ConnectionState
from guestproc.kernel.pages import PageOwner
from guestproc.protocol import pending
from guestproc.protocol.posting import RETRIES, Retry, outcome, pause_us
from guestproc.vmbus.event_lane import Bell
from guestproc.vmbus.hv import hv_post_message, hv_signal_event
from guestproc.vmbus.requests import REPLY_TIMEOUT_NS, enter_request, leave_request, wait_for_reply

if TYPE_CHECKING:
    from guestproc.current import Current

LEAST_SLEEP_NS: Final = 50_000
VMBUS_CONNECT_CPU: Final = 0
MOST_BELLS: Final = 4_096
SEND_INT_PAGE: Final = 2048
"""The guest's half of the interrupt page; the host's is the first one."""


# -- posting ------------------------------------------------------------------------------------------


def vmbus_post_msg(current: Current, message: Message, *, can_sleep: bool = True) -> int:
    """Post a channel message; retries what may pass (no buffers, no connection yet), up to 100 times.

    0, -EAGAIN or -ENOBUFS after the last try, -ENXIO at once for an INITIATE_CONTACT on a connection that
    does not exist, -EINVAL for any other status, -ETIMEDOUT when the hypervisor does not answer the exit
    (where a real processor would stand still).
    """
    payload = message.pack()
    connection_id: int = current.connection.msg_conn_id
    msgtype = int(message.TYPE)
    result: int | Retry = 0
    for failures in range(1, RETRIES + 1):
        current.record(E_POST_BEGIN, connection_id, msgtype, len(payload), relid_of(payload) if current.trace else 0)
        try:
            status = hv_post_message(current, connection_id, payload)
        except DeadlinePassed as error:
            current.log(f"hv_post_msg() of {message.TYPE.name}: {error}")
            return -errno.ETIMEDOUT
        current.record(E_POST, connection_id, msgtype, len(payload), status & 0xFFFF)
        result = outcome(status, msgtype)
        if isinstance(result, int):
            if result == -errno.EINVAL:
                current.log(f"hv_post_msg() failed; error code:{status}")
            return result
        delay(current, pause_us(failures) * 1_000, can_sleep=can_sleep)
    assert isinstance(result, Retry)
    return result.error


def delay(current: Current, nanoseconds: int, *, can_sleep: bool = True) -> None:
    """udelay, mdelay or msleep: let machine time pass; with interrupts taken meanwhile where that is allowed."""
    actor = current.actor
    end = actor.now() + nanoseconds
    while (left := end - actor.now()) > 0:
        if actor.stopping():
            raise MachineStopping(f"{actor} waited to post again")
        if can_sleep and left > LEAST_SLEEP_NS:
            actor.block(end)
        else:
            actor.yield_processor()


# -- connecting ---------------------------------------------------------------------------------------


def vmbus_connect(current: Current) -> int:
    """Negotiate from the highest version down until the host takes one (`vmbus_connect`).

    0, -EDOM when it speaks none of ours, -ETIMEDOUT when it does not answer, -ENOMEM.
    """
    connection = current.connection
    _change_state(current, ConnectionState.CONNECTING)
    connection.connect_cpu = VMBUS_CONNECT_CPU
    try:
        _alloc_connection_pages(current)
        result = _negotiate(current)
    except OutOfMemory as error:
        current.log(str(error))
        result = -errno.ENOMEM
    if result:
        current.log("Unable to connect to host")
        _change_state(current, ConnectionState.DISCONNECTED)
        if result != -errno.ETIMEDOUT:  # a host that is only slow may take the pages yet
            vmbus_disconnect(current)
    return result


def _change_state(current: Current, state: ConnectionState) -> int:
    """Go to another state; the one before."""
    before = current.connection.conn_state.exchange(state)
    current.record(E_CONN_STATE, before, state)
    return before


def _negotiate(current: Current) -> int:
    for version in current.era.versions:
        result = vmbus_negotiate_version(current, version)
        if result == 0:
            current.connection.vmbus_proto_version = version
            current.log(f"Vmbus version:{version_text(version)}")
            return 0
        # The kernel has memory for all its requests before the first one: without any it does not try an older version.
        if result in (-errno.ETIMEDOUT, -errno.ENOMEM):
            return result
    return -errno.EDOM


def vmbus_negotiate_version(current: Current, version: int) -> int:
    """Ask for one version and wait: 0, -ECONNREFUSED when it is not spoken, or why it could not be asked."""
    connection = current.connection
    multiclient = version >= VERSION_WIN10_V5
    connection.msg_conn_id = VMBUS_MESSAGE_CONNECTION_ID_4 if multiclient else VMBUS_MESSAGE_CONNECTION_ID
    # Before 3.0 a host sends to VP 0 whatever is asked for; old kernels then say so.
    by_cpu = version >= VERSION_WIN8_1 or not current.era.target_vcpu_from_3_0
    message = InitiateContact(
        vmbus_version_requested=version,
        target_vcpu=current.cpu_record(VMBUS_CONNECT_CPU).vp_index if by_cpu else 0,
        interrupt_page=0 if multiclient else connection.int_page_gpa,
        monitor_page1=connection.monitor_page_gpas[0],
        monitor_page2=connection.monitor_page_gpas[1],
        msg_sint=VMBUS_MESSAGE_SINT if multiclient else 0,
    )
    request = enter_request(current, MessageType.INITIATE_CONTACT, openid=version)
    if request is None:
        return -errno.ENOMEM
    try:
        result = vmbus_post_msg(current, message)
        current.record(
            E_VMBUS_NEGOTIATE_VERSION,
            version,
            message.target_vcpu,
            message.interrupt_page,
            message.monitor_page1,
            message.monitor_page2,
            result,
        )
        result = result or wait_for_reply(current, request)
        response = pending.version_reply(request)
    finally:
        leave_request(current, request)
    if result:
        return result
    if response is None or not response.version_supported:
        return -errno.ECONNREFUSED
    _change_state(current, ConnectionState.CONNECTED)
    if multiclient:
        connection.msg_conn_id = response.msg_conn_id
    return 0


def _alloc_connection_pages(current: Current) -> None:
    """Zeroed pages for interrupts and monitors; OutOfMemory. What was had is given back by `vmbus_disconnect`."""
    connection, pages = current.connection, current.tables.pages
    connection.int_page_gpa = pages.alloc_pages(current.actor, 0, PageOwner.CONNECTION).gpa
    for index in range(2):
        connection.monitor_page_gpas[index] = pages.alloc_pages(current.actor, 0, PageOwner.CONNECTION).gpa


def _free_connection_pages(current: Current) -> None:
    connection, pages = current.connection, current.tables.pages
    for gpa in (connection.int_page_gpa, *connection.monitor_page_gpas.tolist()):
        if gpa:
            pages.free(current.actor, pages.run_at(gpa >> 12))
    connection.int_page_gpa = 0
    connection.monitor_page_gpas[0] = connection.monitor_page_gpas[1] = 0


def vmbus_request_offers(current: Current) -> int:
    """Ask for all offers; they come as messages, each on its own."""
    result = vmbus_post_msg(current, RequestOffers())
    current.record(E_VMBUS_REQUEST_OFFERS, result)
    return result


# -- small messages -----------------------------------------------------------------------------------


def vmbus_release_relid(current: Current, relid: int, generation: int = 0) -> int:
    """Tell the host that its id is free again; `generation` is that of the record it named, for the trace."""
    result = vmbus_post_msg(current, RelidReleased(relid))
    current.record(E_VMBUS_RELEASE_RELID, relid, result)
    current.record(E_RELEASE, relid, generation, result)
    return result


def vmbus_send_tl_connect_request(current: Current, guest_endpoint_id: UUID, host_service_id: UUID) -> int:
    """Ask the host for a channel from a socket of ours to a service of its: 0, or what a post says.

    Nobody waits for an answer here: a host that has the service offers a channel of this class (the service) and
    instance (the endpoint); a refusal is a message that the kernel does not look at.
    """
    result = vmbus_post_msg(current, TlConnectRequest(guest_endpoint_id, host_service_id))
    ids = guid_value(guid_to_wire(guest_endpoint_id)), guid_value(guid_to_wire(host_service_id))
    words = EVENTS["vmbus_send_tl_connect_request"].pack(*ids, result)
    current.record(E_VMBUS_SEND_TL_CONNECT_REQUEST, *words)
    return result


# -- signalling ---------------------------------------------------------------------------------------


def vmbus_set_event(current: Current, channel: Channel) -> None:
    """Signal the host: the doorbell where the connection id has one, HvCallSignalEvent elsewhere.

    Before 1.1 all channels have one doorbell, and a bit in the interrupt page says whose ring it was.
    """
    bell = current.bells.get(channel.handle)
    if bell is None:
        bell = _bell_of(current, channel)
    if bell.record is not None:
        bell.record(Recorder.now_ns())
    if bell.shared:
        _set_send_bit(current, channel.relid)
    bell.count(1)
    current.counters.doorbells += 1
    ring = bell.ring
    if ring is None:
        try:
            hv_signal_event(current, bell.connection_id)
        except DeadlinePassed as error:
            current.log(f"HvCallSignalEvent of {bell.connection_id:#x}: {error}")
        return
    ring()


def _bell_of(current: Current, channel: Channel) -> Bell:
    """What a channel's signals need, worked out once for each life of its record: all of it is written once."""
    connection_id = channel.sig_event
    ring = None
    if connection_id < CONNECTIONS:
        machine = current.machine
        ring = make_bell(machine.doorbells.view, connection_id, machine.wakeup("host").post)
    if len(current.bells) >= MOST_BELLS:
        current.bells.clear()  # handles of lives that are over
    record = None
    if current.trace:
        relid = channel.relid
        record = current.trace.bind_pair((E_VMBUS_SETEVENT, relid), (E_SIGNAL, relid, Side.TO_HOST, connection_id))
    shared = not channel.is_dedicated_interrupt
    bell = current.bells[channel.handle] = Bell(
        connection_id, channel.sig_events.fetch_add, ring, record, shared=shared
    )
    return bell


def _set_send_bit(current: Current, relid: int) -> None:
    """`sync_set_bit` in send_int_page: the host clears it when it looks, so by an atomic operation."""
    page = current.connection.int_page_gpa
    if page:  # a sender may be late: behind a disconnect there is no page, and nobody to signal
        current.tables.ram.atomics.cell_u64(page + SEND_INT_PAGE + 8 * (relid >> 6)).fetch_or(1 << (relid & 63))


def vmbus_setevent(current: Current, channel: Channel) -> None:
    """Signal the host the way the channel wants it: no offer of ours is monitored, so always directly."""
    vmbus_set_event(current, channel)


# -- unload -------------------------------------------------------------------------------------------


def vmbus_initiate_unload(current: Current) -> int:
    """Leave the host: it closes everything and answers; 0, why it could not be posted, or -ETIMEDOUT.

    Only who finds the connection up sends it (races.md G1); below 3.0 there is no coming back from it, so
    it is not sent.
    """
    connection = current.connection
    if _change_state(current, ConnectionState.DISCONNECTED) == ConnectionState.DISCONNECTED:
        return 0
    if connection.vmbus_proto_version < VERSION_WIN8_1:
        return 0
    # An answer that came unasked has completed it.
    connection.unload_event.reinit()
    result = vmbus_post_msg(current, Unload())
    if result == 0 and not connection.unload_event.wait_timeout(current.actor, REPLY_TIMEOUT_NS):
        result = -errno.ETIMEDOUT
    if result:
        current.log(f"VMBus UNLOAD did not complete ({result})")
    return result


def vmbus_disconnect(current: Current) -> None:
    """Unload, then give the connection's pages back, unless the host may still write to them."""
    if vmbus_initiate_unload(current) == 0:
        _free_connection_pages(current)
