"""Opening and closing a channel, and its GPADLs (reference 3.12; drivers/hv/channel.c).

The ring GPADL is established before the rings are initialised, and both before OPENCHANNEL. Closing has no
reply: only GPADL_TORNDOWN says that the host has let go of the pages, so they are not freed before it. Pages
that the host may hold for ever, because it does not answer, are left to it (races.md E2).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Final

from emu.errors import OutOfMemory, ProtocolViolation
from emu.ring_memory import Payload
from emu.syncpoint import Point
from emu.tracing import (
    E_CLOSE,
    E_GPADL_ADD,
    E_GPADL_DROP,
    E_OPEN,
    E_STATE,
    E_VMBUS_CLOSE_INTERNAL,
    E_VMBUS_ESTABLISH_GPADL_BODY,
    E_VMBUS_ESTABLISH_GPADL_HEADER,
    E_VMBUS_OPEN,
    E_VMBUS_TEARDOWN_GPADL,
)
from emu.wire.messages import (
    GPADL_MAX_PFNS,
    MAX_USER_DEFINED_BYTES,
    CloseChannel,
    GpadlBody,
    GpadlHeader,
    GpadlTeardown,
    Message,
    MessageType,
    gpadl_messages,
)
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import CallbackMode, Channel, ChannelState, Request
from guestproc.kernel.pages import PageOwner, owned_by
from guestproc.kernel.records import INDEX_MASK
from guestproc.kernel.tasklet import tasklet_disable, tasklet_disable_nosync, tasklet_enable
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import opening, pending
from guestproc.protocol.opening import RingPages
from guestproc.protocol.rescinds import Closing, closing
from guestproc.vmbus.connection import vmbus_post_msg
from guestproc.vmbus.removal import hv_process_channel_removal
from guestproc.vmbus.requests import REPLY_TIMEOUT_NS, enter_request, leave_request, taken_back, wait_for_reply

if TYPE_CHECKING:
    from guestproc.current import Current

PAGE_SIZE: Final = 4096
OPEN_TIMEOUT_NS: Final = 5 * SECOND_NS
"""How long kernels before 4.11 waited for OPENCHANNEL_RESULT; a switch brings it back."""
_BEFORE_LIST_ADD: Final = int(Point.OPEN_BEFORE_LIST_ADD)
_BEFORE_POST: Final = int(Point.OPEN_BEFORE_POST)
_BEFORE_RING_FREE: Final = int(Point.CLOSE_BEFORE_RING_FREE)
_OPEN_WAITING: Final = int(Point.OPEN_WAITING)
_OPEN_TIMEOUT: Final = int(Point.OPEN_TIMEOUT)
_CLOSE_EARLY_RETURN: Final = int(Point.CLOSE_EARLY_RETURN)


# -- rings ----------------------------------------------------------------------------------------------


def vmbus_alloc_ring(current: Current, channel: Channel, send_size: int, recv_size: int) -> int:
    """Zeroed pages for both rings, send ring first; 0, -EINVAL for sizes that are no pages, -ENOMEM."""
    if send_size <= 0 or recv_size <= 0 or send_size % PAGE_SIZE or recv_size % PAGE_SIZE:
        return -errno.EINVAL
    send_pages, recv_pages = send_size // PAGE_SIZE, recv_size // PAGE_SIZE
    owner = owned_by(PageOwner.RING, channel.index)
    try:
        if current.machine.config["machine"].get("ring_memory") == "scattered":
            first_gpa, pages = _alloc_scattered(current, channel, send_pages + recv_pages, owner)
        else:
            run = current.tables.pages.alloc_pages_exact(current.actor, send_pages + recv_pages, owner)
            first_gpa, pages = run.gpa, RingPages(run)
    except OutOfMemory as error:
        current.log(f"relid {channel.relid}: {error}")
        return -errno.ENOMEM
    opening.note_rings(channel, send_pages, recv_pages, first_gpa, pages)
    return 0


def _alloc_scattered(current: Current, channel: Channel, count: int, owner: int) -> tuple[int, RingPages]:
    """Single pages that are no neighbours, and a page list beside them; for what must not need contiguity."""
    allocator = current.tables.pages
    listing = allocator.alloc_pages_exact(current.actor, -(-8 * count // PAGE_SIZE), owner)
    try:
        current.memory.reserve(listing.gpa, listing.size)
        runs = allocator.alloc_scattered(current.actor, count, owner, seed=channel.relid)
    except OutOfMemory:
        allocator.free(current.actor, listing)
        raise
    current.memory.write(listing.gpa, b"".join(run.pfn.to_bytes(8, "little") for run in runs))
    return runs[0].gpa, RingPages(listing, count)


def vmbus_free_ring(current: Current, channel: Channel) -> None:
    """Give the rings' pages back; the host has let go of them, or the channel was rescinded."""
    # Under the lock that senders hold: who comes later finds the channel closed, who came earlier is done.
    # And under the mutex of who looks at its indices, which may take its time.
    with channel.ring_buffer_mutex.hold(current.actor), channel.outbound_ring_lock.hold(current.actor):
        pages = opening.forget_rings(channel)
    current.rings.drop(channel)
    if pages is None:
        return
    if current.armed[_BEFORE_RING_FREE]:
        current.reach(_BEFORE_RING_FREE, channel.relid)
    allocator = current.tables.pages
    listed = memoryview(current.memory.read(pages.run.gpa, 8 * pages.scattered)).cast("Q")
    for pfn in listed:
        allocator.free(current.actor, allocator.run_at(pfn))
    allocator.free(current.actor, pages.run)


# -- GPADLs ---------------------------------------------------------------------------------------------


def vmbus_establish_gpadl(current: Current, channel: Channel, pfns: Sequence[int]) -> tuple[int, int]:
    """Describe pages to the host: (0, handle), or a negative errno and 0.

    -EDQUOT: refused; -ENODEV: rescinded; -EINVAL: none or more than 8,190 pages; -ENOMEM; what `vmbus_post_msg`
    says. With -ETIMEDOUT the handle is given, too: the host may have taken the pages.
    """
    if not 1 <= len(pfns) <= GPADL_MAX_PFNS:
        return -errno.EINVAL, 0
    gpadl = current.connection.next_gpadl_handle.fetch_add(1)
    request = enter_request(
        current, MessageType.GPADL_HEADER, child_relid=channel.relid, gpadl=gpadl, channel=channel.handle
    )
    if request is None:
        return -errno.ENOMEM, 0
    try:
        if taken_back(current, channel):
            return -errno.ENODEV, 0
        for message in gpadl_messages(channel.relid, gpadl, pfns):
            result = vmbus_post_msg(current, message)
            _trace_gpadl(current, message, result)
            if result:
                return result, gpadl if result == -errno.ETIMEDOUT else 0
        if wait_for_reply(current, request):
            return -errno.ETIMEDOUT, gpadl
        result = pending.gpadl_result(request, rescinded=channel.rescind.load() != 0)
        if result == -errno.EDQUOT and not current.fix.check_gpadl_status:
            result = 0  # wrong on purpose (races.md E3): the channel is opened on a handle that there is not
        if result == -errno.EDQUOT:
            current.log(f"Failed to establish GPADL: err = {pending.creation_status(request):#x}")
        if result:
            return result, 0
    finally:
        leave_request(current, request)
    if current.trace:
        neighbours = list(pfns) == list(range(pfns[0], pfns[0] + len(pfns)))
        current.record(E_GPADL_ADD, channel.relid, gpadl, len(pfns), pfns[0] if neighbours else 0)
    return 0, gpadl


def _trace_gpadl(current: Current, message: Message, result: int) -> None:
    """The tracepoints of the two messages that describe pages."""
    if isinstance(message, GpadlBody):
        current.record(E_VMBUS_ESTABLISH_GPADL_BODY, message.msgnumber, message.gpadl, result)
        return
    assert isinstance(message, GpadlHeader)
    relid, buflen, count = message.child_relid, message.range_buflen, message.rangecount
    current.record(E_VMBUS_ESTABLISH_GPADL_HEADER, relid, message.gpadl, buflen, count, result)


def vmbus_teardown_gpadl(current: Current, channel: Channel, gpadl: int) -> int:
    """Take pages away from the host: 0 when it said so or the channel was rescinded; else they are its still."""
    request = enter_request(
        current, MessageType.GPADL_TEARDOWN, child_relid=channel.relid, gpadl=gpadl, channel=channel.handle
    )
    if request is None:
        return -errno.ENOMEM
    result = 0
    try:
        if not channel.rescind.load():
            result = vmbus_post_msg(current, GpadlTeardown(channel.relid, gpadl))
            current.record(E_VMBUS_TEARDOWN_GPADL, channel.relid, gpadl, result)
            result = result or wait_for_reply(current, request)
    finally:
        leave_request(current, request)
    # A channel that was rescinded meanwhile is torn down by the host, and that is as good.
    if channel.rescind.load():
        result = 0
    if result == 0:
        current.record(E_GPADL_DROP, channel.relid, gpadl)
    return result


# -- before it is opened --------------------------------------------------------------------------------


def set_channel_read_mode(current: Current, channel: Channel, mode: CallbackMode) -> None:
    """Who masks the inbound ring, and where the callback runs (`HV_CALL_BATCHED`, `_DIRECT`, `_ISR`)."""
    with channel.sched_lock.hold(current.actor):
        channel.callback_mode = mode


def vmbus_set_sc_create_callback(current: Current, primary: Channel, callback: int) -> None:
    """What is called for each new sub-channel; to be set before the device is asked for any."""
    with current.connection.channel_mutex.hold(current.actor):
        primary.sc_creation_callback = callback


# -- open -----------------------------------------------------------------------------------------------


def vmbus_open(
    current: Current,
    channel: Channel,
    send_ringbuffer_size: int,
    recv_ringbuffer_size: int,
    userdata: Payload,
    onchannel_callback: int,
    context: int = 0,
) -> int:
    """Allocate rings of these sizes (bytes, whole pages) and open the channel.

    0; -EINVAL: it is not closed, or a size is no size; -ENOMEM; -EDQUOT: the host refused the pages; -EAGAIN:
    it refused the channel; -ENODEV: it took the channel back; -ETIMEDOUT: it did not answer; what a post says.

    What is no argument at all (TypeError, struct.error; a callback that nobody registered: AssertionError) is found
    before anything is begun: a driver's mistake leaves the channel closed.
    """
    user_defined = bytes(userdata)
    opening.check_callback(onchannel_callback, context)
    if onchannel_callback:
        CHANNEL_CALLBACKS.lookup(onchannel_callback)
    for size in (send_ringbuffer_size, recv_ringbuffer_size):
        index(size)
    # The kernel looks at the state after it has noted the new rings, and so forgets those of an open channel.
    if len(user_defined) > MAX_USER_DEFINED_BYTES or not opening.begin(channel):
        return -errno.EINVAL
    current.record(E_STATE, channel.relid, ChannelState.OPEN_STATE, ChannelState.OPENING_STATE)
    result = vmbus_alloc_ring(current, channel, send_ringbuffer_size, recv_ringbuffer_size)
    gpadl = 0
    if result == 0:
        result, gpadl = _vmbus_open(current, channel, user_defined, onchannel_callback, context)
        if result and gpadl:
            current.log(f"relid {channel.relid}: the host may hold its ring pages; they are not given back")
        elif result:
            vmbus_free_ring(current, channel)
    (opening.failed if result else opening.opened)(channel)
    if current.trace:
        current.record(E_STATE, channel.relid, ChannelState.OPENING_STATE, channel.state.load())
        current.record(E_OPEN, channel.relid, channel.openid, channel.ringbuffer_gpadlhandle, result)
    return result


def _vmbus_open(current: Current, channel: Channel, userdata: bytes, callback: int, context: int) -> tuple[int, int]:
    """`__vmbus_open`: GPADL, rings, OPENCHANNEL, its result; undone in reverse when one of them fails.

    The second number is the GPADL handle of pages that the host has, also in failure.
    """
    with channel.sched_lock.hold(current.actor):
        opening.set_callback(channel, callback, context)
    channel.ringbuffer_gpadlhandle = 0
    result, gpadl = vmbus_establish_gpadl(current, channel, current.rings.pfns(channel))
    if result == 0:
        channel.ringbuffer_gpadlhandle = gpadl
        result = _init_rings(current, channel) or _open_on_host(current, channel, userdata)
        if result == 0:
            return 0, gpadl
        if not current.fix.teardown_on_error:
            gpadl = 0  # wrong on purpose (races.md E2): the pages are freed, and the host may hold them
        elif vmbus_teardown_gpadl(current, channel, gpadl) == 0:
            gpadl = channel.ringbuffer_gpadlhandle = 0
    # The kernel leaves the callback behind. A host that signals a channel it refused would find its rings gone.
    _quiesce(current, channel)
    return result, gpadl


def _init_rings(current: Current, channel: Channel) -> int:
    """`hv_ringbuffer_init` for both; -EINVAL for a ring without room for data, -ENOMEM for a full tmpfs."""
    try:
        current.rings.init(channel)
    except ProtocolViolation as error:
        current.log(f"relid {channel.relid}: {error}")
        return -errno.EINVAL
    except OutOfMemory as error:
        current.log(f"relid {channel.relid}: {error}")
        return -errno.ENOMEM
    return 0


def _open_on_host(current: Current, channel: Channel, userdata: bytes) -> int:
    """OPENCHANNEL and the wait for its result."""
    message = opening.open_message(channel, userdata)
    if current.armed[_BEFORE_LIST_ADD]:
        current.reach(_BEFORE_LIST_ADD, channel.relid)
    request = enter_request(
        current,
        MessageType.OPENCHANNEL,
        child_relid=channel.relid,
        openid=channel.openid,
        channel=channel.handle,
    )
    if request is None:
        return -errno.ENOMEM
    unlink = True
    try:
        if taken_back(current, channel):
            # Off, it is wrong on purpose (races.md A4, ii): the first form of this look freed the request and went.
            unlink = current.fix.unlink_before_free
            return -errno.ENODEV
        if current.armed[_BEFORE_POST]:
            current.reach(_BEFORE_POST, channel.relid)
        result = vmbus_post_msg(current, message)
        current.record(
            E_VMBUS_OPEN,
            message.child_relid,
            message.openid,
            message.ringbuffer_gpadlhandle,
            message.target_vp,
            message.downstream_ringbuffer_pageoffset,
            result,
        )
        result = result or _wait_for_open_result(current, channel, request)
        return result or pending.open_result(request, rescinded=channel.rescind.load() != 0)
    finally:
        leave_request(current, request, unlink=unlink)


def _wait_for_open_result(current: Current, channel: Channel, request: Request) -> int:
    """As `wait_for_reply`."""
    if current.armed[_OPEN_WAITING]:
        current.reach(_OPEN_WAITING, channel.relid)
    if current.fix.no_open_timeout:
        return wait_for_reply(current, request)
    # Wrong on purpose (races.md E2): whoever waits for a busy host gives up, and takes its pages along.
    result = wait_for_reply(current, request, OPEN_TIMEOUT_NS)
    if result and current.armed[_OPEN_TIMEOUT]:
        current.reach(_OPEN_TIMEOUT, channel.relid)
    return result


# -- close ----------------------------------------------------------------------------------------------


def _quiesce(current: Current, channel: Channel) -> None:
    """Take the callback away; when this returns it does not run and will not."""
    if not current.fix.close_quiesces and current.fix.variant in ("", "tasklet"):
        # Wrong on purpose (races.md E1): a callback that runs now goes on, on rings that are freed next.
        opening.take_callback(channel)
        return
    # Waits for a running callback; one that is scheduled stays so, and finds no callback.
    tasklet_disable(current.actor, channel.callback_event, current.connection.tasklet_idle)
    with channel.sched_lock.hold(current.actor):
        opening.take_callback(channel)
    tasklet_enable(current.actor, channel.callback_event)


def vmbus_reset_channel_cb(current: Current, channel: Channel) -> None:
    """No callback and no sub-channel callback any more (`vmbus_reset_channel_cb`)."""
    _quiesce(current, channel)
    channel.sc_creation_callback = 0


def _return_disabled(current: Current, channel: Channel) -> None:
    """Wrong on purpose (races.md C3): close once disabled the tasklet, and returned before the line that enables it.

    Variant per_vcpu: in the days of one tasklet for each processor that was the tasklet of all its channels.
    """
    tasklet_disable(current.actor, channel.callback_event, current.connection.tasklet_idle)
    if current.fix.variant == "per_vcpu":
        for other in current.tables.channels.live():
            if other.index != channel.index and other.target_cpu.load() == channel.target_cpu.load():
                tasklet_disable_nosync(other.callback_event)


def vmbus_close_internal(current: Current, channel: Channel) -> int:
    """CLOSECHANNEL and the teardown of the ring's GPADL, under channel_mutex.

    0 when the rings may be freed; -EINVAL when the channel is not open; else the host may use the pages for
    ever, and they are not given back.
    """
    vmbus_reset_channel_cb(current, channel)
    if not opening.begin_close(channel):
        if current.armed[_CLOSE_EARLY_RETURN]:
            current.reach(_CLOSE_EARLY_RETURN, channel.relid)
        if not current.fix.enable_on_all_paths:
            _return_disabled(current, channel)
        return -errno.EINVAL
    current.record(E_STATE, channel.relid, ChannelState.OPENED_STATE, ChannelState.OPEN_STATE)
    result = vmbus_post_msg(current, CloseChannel(channel.relid))
    current.record(E_VMBUS_CLOSE_INTERNAL, channel.relid, result)
    current.record(E_CLOSE, channel.relid, result)
    if result:
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
    if channel.primary_channel:
        return -errno.EINVAL
    mutex = current.connection.channel_mutex
    with mutex.hold(current.actor):
        subs = [sub.handle for sub in current.tables.sc_list(channel)]
        if not current.fix.close_waits_unlocked:
            return _disconnect_locked(current, channel, subs)
    for handle in subs:
        while not _close_sub_channel(current, handle) and _wait_for_rescind(current, handle):
            pass  # the rescind was decided: look again who removes it
    with mutex.hold(current.actor):
        return vmbus_close_internal(current, channel)


def _disconnect_locked(current: Current, channel: Channel, subs: Sequence[int]) -> int:
    """Wrong on purpose (races.md A5, its second half): everything under one holding of the mutex.

    The rescinds that are waited for here need that mutex to end.
    """
    for handle in subs:
        sub = current.tables.channels.find(handle)
        if sub is not None and closing(sub) is Closing.AWAIT_RESCIND:
            sub.rescind_event.wait_timeout(current.actor, REPLY_TIMEOUT_NS)
        _close_sub_locked(current, handle)
    return vmbus_close_internal(current, channel)


def _close_sub_channel(current: Current, handle: int) -> bool:
    """Close one sub-channel, and remove it if its rescind was left to us; False: wait for its rescind first."""
    with current.connection.channel_mutex.hold(current.actor):
        return _close_sub_locked(current, handle)


def _close_sub_locked(current: Current, handle: int) -> bool:
    """As `_close_sub_channel`, under channel_mutex."""
    sub = current.tables.channels.find(handle)
    # Looked up under the mutex, under which it is removed as well: what is found here stays.
    if sub is None:
        return True
    todo = closing(sub)
    if todo in (Closing.CLOSE, Closing.CLOSE_AND_REMOVE) and vmbus_close_internal(current, sub) == 0:
        vmbus_free_ring(current, sub)
    if todo is Closing.CLOSE_AND_REMOVE:
        hv_process_channel_removal(current, sub)
    return todo is not Closing.AWAIT_RESCIND


def _wait_for_rescind(current: Current, handle: int) -> bool:
    """`wait_for_completion(&rescind_event)`, for a sub-channel that its rescind's handler may also remove.

    False: the handler did not come to its end in time, and the sub-channel is left to it.
    """
    connection, actor = current.connection, current.actor

    def decided() -> bool:
        with connection.channel_mutex.hold(actor):
            sub = current.tables.channels.find(handle)
            return sub is None or closing(sub) is not Closing.AWAIT_RESCIND

    subject = current.tables.channels.record_gpa((handle & INDEX_MASK) - 1)
    if connection.state_wait.wait_until_timeout(actor, decided, REPLY_TIMEOUT_NS, subject):
        return True
    current.log(f"the rescind of sub-channel record {handle:#x} does not end")
    return False


def vmbus_close(current: Current, channel: Channel) -> None:
    """Close a device's channels and free their rings (the driver's remove)."""
    if vmbus_disconnect_ring(current, channel) == 0:
        vmbus_free_ring(current, channel)
