"""Opening and closing a channel, its GPADL, its packets (reference 3.12; drivers/hv/channel.c).

The ring GPADL is established before the rings are initialised, and both before OPENCHANNEL. Closing has no
reply: only GPADL_TORNDOWN says that the host has let go of the pages, so they are not freed before it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from emu.errors import OutOfMemory, RingFull
from emu.tracing import E_CLOSE, E_GPADL_ADD, E_GPADL_DROP, E_OPEN, E_REQ_ALLOC, E_STATE
from emu.wire.messages import (
    MAX_USER_DEFINED_BYTES,
    CloseChannel,
    GpadlCreated,
    GpadlTeardown,
    MessageType,
    OpenChannel,
    OpenChannelResult,
    gpadl_messages,
    parse,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND
from guestproc.kernel.layout import Channel, ChannelState, Request
from guestproc.kernel.pages import PageOwner, PageRun, owned_by
from guestproc.kernel.tasklet import tasklet_disable, tasklet_enable
from guestproc.protocol import pending
from guestproc.vmbus.connection import REPLY_TIMEOUT_NS, vmbus_post_msg, vmbus_setevent

if TYPE_CHECKING:
    from guestproc.current import Current

PAGE_SIZE: Final = 4096

__all__ = ["COMPLETION_REQUESTED", "VM_PKT_COMP", "VM_PKT_DATA_INBAND"]


def _set_state(current: Current, channel: Channel, state: ChannelState) -> None:
    old = channel.state.exchange(state)
    current.record(E_STATE, channel.relid, old, state)


# -- rings ----------------------------------------------------------------------------------------------


def vmbus_alloc_ring(current: Current, channel: Channel, send_size: int, recv_size: int) -> int:
    """Zeroed pages for both rings, send ring first; 0, -EINVAL for sizes that are no pages, -ENOMEM."""
    if send_size <= 0 or recv_size <= 0 or send_size % PAGE_SIZE or recv_size % PAGE_SIZE:
        return -errno.EINVAL
    send_pages, recv_pages = send_size // PAGE_SIZE, recv_size // PAGE_SIZE
    owner = owned_by(PageOwner.RING, channel.index)
    try:
        if current.machine.config["machine"].get("ring_memory") == "scattered":
            _alloc_scattered(current, channel, send_pages + recv_pages, owner)
        else:
            run = current.tables.pages.alloc_pages_exact(current.actor, send_pages + recv_pages, owner)
            channel.ring_gpa = run.gpa
            channel.ring_generation = run.generation
    except OutOfMemory as error:
        current.log(f"relid {channel.relid}: {error}")
        return -errno.ENOMEM
    channel.ring_send_pages = send_pages
    channel.ring_recv_pages = recv_pages
    channel.ringbuffer_send_offset = send_pages
    return 0


def _alloc_scattered(current: Current, channel: Channel, count: int, owner: int) -> None:
    """Single pages that are no neighbours, and a page list beside them; for what must not need contiguity."""
    allocator = current.tables.pages
    listing = allocator.alloc_pages_exact(current.actor, -(-8 * count // PAGE_SIZE), owner)
    try:
        runs = allocator.alloc_scattered(current.actor, count, owner, seed=channel.relid)
    except OutOfMemory:
        allocator.free(current.actor, listing)
        raise
    current.memory.write(listing.gpa, b"".join(run.pfn.to_bytes(8, "little") for run in runs))
    channel.ring_pfns_gpa = listing.gpa
    channel.ring_gpa = runs[0].gpa
    channel.ring_generation = listing.generation


def vmbus_free_ring(current: Current, channel: Channel) -> None:
    """Give the rings' pages back; the host has let go of them, or the channel was rescinded."""
    if not channel.ring_gpa:
        return
    allocator = current.tables.pages
    current.rings.drop(channel)
    if channel.ring_pfns_gpa:
        for pfn in current.rings.pfns(channel):
            allocator.free(current.actor, allocator.run_at(pfn))
        allocator.free(current.actor, allocator.run_at(channel.ring_pfns_gpa >> 12))
    else:
        count = channel.ring_send_pages + channel.ring_recv_pages
        allocator.free(current.actor, PageRun(channel.ring_gpa >> 12, count, channel.ring_generation))
    channel.ring_gpa = channel.ring_pfns_gpa = 0
    channel.ring_send_pages = channel.ring_recv_pages = 0


# -- requests -------------------------------------------------------------------------------------------


def _enter(current: Current, request: Request) -> None:
    with current.connection.channelmsg_lock.hold(current.actor):
        pending.enter(current.tables, request)
    current.record(E_REQ_ALLOC, request.msgtype, request.openid or request.gpadl, request.index)


def _leave(current: Current, request: Request) -> None:
    with current.connection.channelmsg_lock.hold(current.actor):
        pending.leave(current.tables, request)
    current.tables.requests.free(request)


# -- GPADLs ---------------------------------------------------------------------------------------------


def vmbus_establish_gpadl(current: Current, channel: Channel, pfns: Sequence[int]) -> tuple[int, int]:
    """Describe pages to the host; (0, handle), or (-EDQUOT refused, -ENODEV rescinded, …; 0)."""
    gpadl = current.connection.next_gpadl_handle.fetch_add(1)
    request = pending.new_request(
        current.tables, MessageType.GPADL_HEADER, child_relid=channel.relid, gpadl=gpadl, channel=channel.handle
    )
    if request is None:
        return -errno.ENOMEM, 0
    _enter(current, request)
    try:
        if channel.rescind.load():
            return -errno.ENODEV, 0
        for message in gpadl_messages(channel.relid, gpadl, pfns):
            result = vmbus_post_msg(current, message)
            if result:
                return result, 0
        request.waitevent.wait(current.actor, REPLY_TIMEOUT_NS)
        if channel.rescind.load():
            return -errno.ENODEV, 0
        created = parse(request.response[: request.response_size])
        assert isinstance(created, GpadlCreated)
        if created.creation_status:
            current.log(f"Failed to establish GPADL: err = {created.creation_status:#x}")
            return -errno.EDQUOT, 0
    finally:
        _leave(current, request)
    current.record(E_GPADL_ADD, channel.relid, gpadl, len(pfns))
    return 0, gpadl


def vmbus_teardown_gpadl(current: Current, channel: Channel, gpadl: int) -> int:
    """Take pages away from the host; returns when it said so, or the channel was rescinded."""
    request = pending.new_request(
        current.tables, MessageType.GPADL_TEARDOWN, child_relid=channel.relid, gpadl=gpadl, channel=channel.handle
    )
    if request is None:
        return -errno.ENOMEM
    _enter(current, request)
    try:
        if channel.rescind.load():
            return 0
        result = vmbus_post_msg(current, GpadlTeardown(channel.relid, gpadl))
        if result == 0:
            request.waitevent.wait(current.actor, REPLY_TIMEOUT_NS)
    finally:
        _leave(current, request)
    current.record(E_GPADL_DROP, channel.relid, gpadl)
    # A channel that was rescinded meanwhile is torn down by the host, and that is as good.
    return 0 if channel.rescind.load() else result


# -- open -----------------------------------------------------------------------------------------------


def vmbus_open(
    current: Current,
    channel: Channel,
    send_ringbuffer_size: int,
    recv_ringbuffer_size: int,
    userdata: bytes,
    onchannel_callback: int,
    context: int = 0,
) -> int:
    """Allocate rings of these sizes (bytes, whole pages) and open the channel; 0 or a negative errno."""
    result = vmbus_alloc_ring(current, channel, send_ringbuffer_size, recv_ringbuffer_size)
    if result:
        return result
    result = _vmbus_open(current, channel, userdata, onchannel_callback, context)
    if result:
        vmbus_free_ring(current, channel)
    return result


def _vmbus_open(current: Current, channel: Channel, userdata: bytes, callback: int, context: int) -> int:
    """`__vmbus_open`: GPADL, rings, OPENCHANNEL, its result; undone in reverse when one of them fails."""
    if len(userdata) > MAX_USER_DEFINED_BYTES or channel.state.load() != ChannelState.OPEN_STATE:
        return -errno.EINVAL
    _set_state(current, channel, ChannelState.OPENING_STATE)
    with channel.sched_lock.hold(current.actor):
        channel.onchannel_callback = callback
        channel.channel_callback_context = context
    result, gpadl = vmbus_establish_gpadl(current, channel, current.rings.pfns(channel))
    if result == 0:
        channel.ringbuffer_gpadlhandle = gpadl
        current.rings.init(channel)
        result = _open_on_host(current, channel, userdata)
        if result:
            vmbus_teardown_gpadl(current, channel, gpadl)
            channel.ringbuffer_gpadlhandle = 0
    if result:
        with channel.sched_lock.hold(current.actor):
            channel.onchannel_callback = 0
        _set_state(current, channel, ChannelState.OPEN_STATE)
    else:
        _set_state(current, channel, ChannelState.OPENED_STATE)
    current.record(E_OPEN, channel.relid, channel.openid, gpadl, -result)
    return result


def _open_on_host(current: Current, channel: Channel, userdata: bytes) -> int:
    """OPENCHANNEL and the wait for its result: 0, -ENODEV when rescinded, -EAGAIN when refused."""
    channel.openid = channel.relid
    request = pending.new_request(
        current.tables,
        MessageType.OPENCHANNEL,
        child_relid=channel.relid,
        openid=channel.openid,
        channel=channel.handle,
    )
    if request is None:
        return -errno.ENOMEM
    _enter(current, request)
    try:
        if channel.rescind.load():
            return -errno.ENODEV
        result = vmbus_post_msg(
            current,
            OpenChannel(
                child_relid=channel.relid,
                openid=channel.openid,
                ringbuffer_gpadlhandle=channel.ringbuffer_gpadlhandle,
                target_vp=channel.target_vp,
                downstream_ringbuffer_pageoffset=channel.ringbuffer_send_offset,
                userdata=userdata.ljust(MAX_USER_DEFINED_BYTES, b"\0"),
            ),
        )
        if result:
            return result
        request.waitevent.wait(current.actor, REPLY_TIMEOUT_NS)
        if channel.rescind.load():
            return -errno.ENODEV
        answer = parse(request.response[: request.response_size])
        assert isinstance(answer, OpenChannelResult)
        return -errno.EAGAIN if answer.status else 0
    finally:
        _leave(current, request)


# -- close ----------------------------------------------------------------------------------------------


def vmbus_reset_channel_cb(current: Current, channel: Channel) -> None:
    """Take the callback away; when this returns it does not run and will not (`vmbus_reset_channel_cb`)."""
    idle = current.connection.tasklet_idle
    # Waits for a running callback; one that is scheduled stays so, and finds no callback.
    tasklet_disable(current.actor, channel.callback_event, idle)
    with channel.sched_lock.hold(current.actor):
        channel.onchannel_callback = 0
    channel.sc_creation_callback = 0
    tasklet_enable(current.actor, channel.callback_event)


def vmbus_close_internal(current: Current, channel: Channel) -> int:
    """CLOSECHANNEL and the teardown of the ring's GPADL; -EINVAL when the channel is not open."""
    vmbus_reset_channel_cb(current, channel)
    if channel.state.load() != ChannelState.OPENED_STATE:
        return -errno.EINVAL
    _set_state(current, channel, ChannelState.OPEN_STATE)
    result = vmbus_post_msg(current, CloseChannel(channel.relid))
    current.record(E_CLOSE, channel.relid, -result)
    if result:
        # The host may use the pages for ever: they are not given back.
        current.log(f"Close failed: close post msg return is {result}")
        return result
    if channel.ringbuffer_gpadlhandle:
        result = vmbus_teardown_gpadl(current, channel, channel.ringbuffer_gpadlhandle)
        if result:
            current.log(f"Close failed: teardown gpadl return {result}")
            return result
        channel.ringbuffer_gpadlhandle = 0
    return 0


def vmbus_disconnect_ring(current: Current, channel: Channel) -> int:
    """Close a primary and its sub-channels, which stay known until they are rescinded; -EINVAL for a sub."""
    from guestproc.vmbus.channel_mgmt import hv_process_channel_removal

    if channel.primary_channel:
        return -errno.EINVAL
    mutex = current.connection.channel_mutex
    for sub in list(current.tables.sc_list(channel)):
        if sub.rescind.load():
            sub.rescind_event.wait(current.actor, REPLY_TIMEOUT_NS)
        with mutex.hold(current.actor):
            if vmbus_close_internal(current, sub) == 0:
                vmbus_free_ring(current, sub)
            if sub.rescind.load():
                hv_process_channel_removal(current, sub)
    with mutex.hold(current.actor):
        return vmbus_close_internal(current, channel)


def vmbus_close(current: Current, channel: Channel) -> None:
    """Close a device's channels and free their rings (the driver's remove)."""
    if vmbus_disconnect_ring(current, channel) == 0:
        vmbus_free_ring(current, channel)


# -- packets --------------------------------------------------------------------------------------------


def vmbus_sendpacket(
    current: Current,
    channel: Channel,
    payload: bytes,
    trans_id: int = 0,
    packet_type: int = VM_PKT_DATA_INBAND,
    flags: int = 0,
) -> int:
    """Write one packet and signal the host if the rules say so; 0, -EAGAIN for a full ring, -ENODEV."""
    if channel.rescind.load():
        return -errno.ENODEV
    outbound = current.rings.of(channel).outbound
    try:
        with channel.outbound_ring_lock.hold(current.actor):
            signal = outbound.write(payload, trans_id, flags, packet_type)
    except RingFull:
        return -errno.EAGAIN
    if signal:
        vmbus_setevent(current, channel)
    current.counters.packets += 1
    current.counters.bytes += len(payload)
    return 0


def vmbus_sendpackets(
    current: Current, channel: Channel, payloads: Sequence[bytes], first_trans_id: int = 0, flags: int = 0
) -> int:
    """Write as many in-band packets as fit, as one batch with one signal at most; how many, or -ENODEV."""
    if channel.rescind.load():
        return -errno.ENODEV
    outbound = current.rings.of(channel).outbound
    with channel.outbound_ring_lock.hold(current.actor):
        count, signal = outbound.write_many(payloads, first_trans_id, flags)
    if signal:
        vmbus_setevent(current, channel)
    current.counters.packets += count
    current.counters.bytes += sum(map(len, payloads[:count]))
    return count


def vmbus_wait_for_room(current: Current, channel: Channel, size: int) -> bool:
    """Publish that `size` bytes are waited for; True when they are there already (reference 4.7)."""
    outbound = current.rings.of(channel).outbound
    with channel.outbound_ring_lock.hold(current.actor):
        return outbound.want_room(size)


def vmbus_drain(current: Current, channel: Channel, limit: int | None = None) -> list[tuple[int, int, int, bytes]]:
    """Take packets (type, flags, trans_id, payload with padding); signal the host if it waited for the room."""
    inbound = current.rings.of(channel).inbound
    packets = list(inbound.drain(limit))
    if inbound.take_signal():
        vmbus_setevent(current, channel)
    return packets
