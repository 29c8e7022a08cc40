"""Offers, rescinds and the host's replies: the message handlers (reference 3.6 to 3.11; channel_mgmt.c).

Handlers that only complete a waiter run in the tasklet; offers and rescinds run on their queues, where they
may sleep. An offer is counted in offer_in_progress from the slot to the relid table, which is what a rescind
that runs beside it waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from struct import unpack_from
from typing import TYPE_CHECKING, Final

from emu.control import Ready
from emu.errors import ProtocolViolation
from emu.switches import Fix
from emu.syncpoint import Point
from emu.tracing import (
    E_OFFER,
    E_REQ_COMPLETE,
    E_RESCIND,
    E_VMBUS_ON_MESSAGE,
    E_VMBUS_ONGPADL_CREATED,
    E_VMBUS_ONGPADL_TORNDOWN,
    E_VMBUS_ONMODIFYCHANNEL_RESPONSE,
    E_VMBUS_ONOFFER,
    E_VMBUS_ONOFFER_RESCIND,
    E_VMBUS_ONOPEN_RESULT,
    E_VMBUS_ONVERSION_RESPONSE,
    E_WORK_QUEUE,
)
from emu.wire.guids import guid_from_wire
from emu.wire.messages import HEADER, OfferChannel, RescindChannelOffer, parse
from guestproc.kernel.cpus import cpus_read_lock
from guestproc.kernel.functions import CHANNEL_CALLBACKS, WORK_FUNCTIONS
from guestproc.kernel.layout import Channel, ChannelState, Request
from guestproc.kernel.wait import SECOND_NS
from guestproc.kernel.work_records import WorkItem
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol import faults, offers, opening, pending, rescinds
from guestproc.protocol.numbers import Ipis, Works
from guestproc.protocol.offers import Place
from guestproc.protocol.placement import hv_get_dev_type, init_vp_index_seed
from guestproc.protocol.rescinds import Removal
from guestproc.vmbus.chan_list import run_on_target_cpu
from guestproc.vmbus.channel import vmbus_free_ring, vmbus_reset_channel_cb
from guestproc.vmbus.connection import vmbus_release_relid
from guestproc.vmbus.device import (
    vmbus_add_channel_kobj,
    vmbus_device_create,
    vmbus_device_discard,
    vmbus_device_register,
    vmbus_device_unregister,
)
from guestproc.vmbus.offer_trace import OFFER_BYTES, offer_words
from guestproc.vmbus.removal import free_channel, hv_process_channel_removal

if TYPE_CHECKING:
    from guestproc.current import Current

MessageHandler = Callable[["Current", bytes], None]
MESSAGE_HANDLERS: Final[dict[str, MessageHandler]] = {}
"""The handlers that `channel_message_table` names."""

VERSION_RESPONSE_BYTES: Final = 16
"""What this guest understands of a VERSION_RESPONSE: the forms of 6.0 are longer."""
_ADD_FAILED: Final = int(Point.ADD_FAILED)
_OFFER_BEFORE_MAP: Final = int(Point.OFFER_BEFORE_MAP)
_CPU_PICKED: Final = int(Point.CPU_PICKED)
_RESCIND_WAIT_GATE: Final = int(Point.RESCIND_WAIT_GATE)
_RESCIND_AFTER_LOOKUP: Final = int(Point.RESCIND_AFTER_LOOKUP)
_RESCIND_BEFORE_PROBE_WAIT: Final = int(Point.RESCIND_BEFORE_PROBE_WAIT)
HANDLED_TIMEOUT_NS: Final = 180 * SECOND_NS
"""For what waits in turn for a probe that waits for the host, more than once."""


def message_handler(function: MessageHandler) -> MessageHandler:
    """Make a handler findable under its kernel name."""
    MESSAGE_HANDLERS[function.__name__] = function
    return function


def vmbus_onmessage(current: Current, payload: bytes) -> None:
    """Run the handler of a queued message; what has none is logged."""
    msgtype = int.from_bytes(payload[:4], "little")
    current.record(E_VMBUS_ON_MESSAGE, msgtype)
    if msgtype >= current.era.channelmsg_count:
        text = f"Received invalid channel message type {msgtype} size {len(payload)}\n{payload.hex(' ', 4)}"
        current.refuse(ProtocolViolation(text, rule="unknown-msgtype", field="msgtype", value=msgtype))
        return
    name = current.era.channel_message_table[msgtype].message_handler
    if not name:
        text = f"Unhandled channel message type {msgtype}"
        current.refuse(ProtocolViolation(text, rule="unhandled-msgtype", field="msgtype", value=msgtype))
        return
    MESSAGE_HANDLERS[name](current, payload)


# -- replies, in the tasklet ----------------------------------------------------------------------------


def _words(payload: bytes, count: int) -> tuple[int, ...]:
    """The first u32 fields behind the header, as the tracepoints have them; the length was checked."""
    return unpack_from(f"<{count}I", payload, HEADER.size)


def _complete(current: Current, payload: bytes) -> None:
    """Hand a reply to the requests that it answers; one that answers nothing is ignored."""
    reply, asleep = parse(payload), []
    with current.connection.channelmsg_lock.hold(current.actor):
        for request in pending.answered_by(current.tables, reply):
            pending.answer(request, payload)
            if current.trace:
                key = request.openid or request.gpadl
                current.record(E_REQ_COMPLETE, request.msgtype, key, request.index, request.child_relid)
            asleep.append((request.waitevent, request.waitevent.let_through()))
    for waitevent, chain in asleep:
        waitevent.wake(current.actor, chain)


@message_handler
def vmbus_onoffers_delivered(current: Current, _payload: bytes) -> None:
    """The kernel does nothing here; the harness notes how far the boot has come."""
    current.machine.control.reach(Ready.OFFERS_DELIVERED)
    current.connection.state_wait.wake_all(current.actor)


@message_handler
def vmbus_onopen_result(current: Current, payload: bytes) -> None:
    """Complete the opener that waits for this child_relid and openid."""
    current.record(E_VMBUS_ONOPEN_RESULT, *_words(payload, 3))
    _complete(current, payload)


@message_handler
def vmbus_ongpadl_created(current: Current, payload: bytes) -> None:
    """Complete whoever established this GPADL."""
    current.record(E_VMBUS_ONGPADL_CREATED, *_words(payload, 3))
    _complete(current, payload)


@message_handler
def vmbus_ongpadl_torndown(current: Current, payload: bytes) -> None:
    """Complete whoever tears this GPADL down; the message names no channel."""
    current.record(E_VMBUS_ONGPADL_TORNDOWN, *_words(payload, 1))
    _complete(current, payload)


@message_handler
def vmbus_onversion_response(current: Current, payload: bytes) -> None:
    """Complete every INITIATE_CONTACT that waits."""
    current.record(E_VMBUS_ONVERSION_RESPONSE, payload[HEADER.size])
    _complete(current, payload[:VERSION_RESPONSE_BYTES])


@message_handler
def vmbus_onmodifychannel_response(current: Current, payload: bytes) -> None:
    """Complete whoever moves this channel."""
    current.record(E_VMBUS_ONMODIFYCHANNEL_RESPONSE, *_words(payload, 2))
    _complete(current, payload)


@message_handler
def vmbus_unload_response(current: Current, _payload: bytes) -> None:
    """The host has closed everything."""
    current.connection.unload_event.complete(current.actor)


# -- offers, on hv_vmbus_con ----------------------------------------------------------------------------


def offer_done(current: Current) -> None:
    """One offer less between the slot and the relid table; rescinds wait for none."""
    connection = current.connection
    if connection.offer_in_progress.fetch_sub(1) == 1:
        connection.offer_wait.wake_all(current.actor)


@message_handler
def vmbus_onoffer(current: Current, payload: bytes) -> None:
    """An offer: make the channel object, or give the relid back at once."""
    if current.trace and len(payload) >= OFFER_BYTES:
        current.record(E_VMBUS_ONOFFER, *offer_words(payload))
    try:
        offer = offers.checked_offer(payload)
    except ProtocolViolation as refusal:
        current.refuse(refusal, "vmbus_onoffer")
        offer_done(current)
        return
    # The kernel's channel object has its add_channel_work inside; here both are records, had together or not.
    queues = current.tables.work_queues
    item, channel = _allocate_channel(current, offer, payload)
    current.record(
        E_OFFER,
        offer.child_relid,
        0 if channel is None else channel.generation,
        offer.connection_id,
        offer.sub_channel_index,
    )
    if channel is None or item is None:
        if item is not None:
            queues.discard(item)
        vmbus_release_relid(current, offer.child_relid)
        offer_done(current)
        current.log("Unable to allocate channel object")
        return
    if hv_get_dev_type(channel.if_type) is None:
        current.log(f"Unknown GUID: {guid_from_wire(channel.if_type)}")
    item.arguments[0] = channel.handle
    if current.armed[_OFFER_BEFORE_MAP]:
        current.reach(_OFFER_BEFORE_MAP, channel.relid)
    vmbus_process_offer(current, channel, item)


def _allocate_channel(current: Current, offer: OfferChannel, payload: bytes) -> tuple[WorkItem | None, Channel | None]:
    """The two records of an offer, as far as there are any."""
    tables, relid = current.tables, offer.child_relid
    if faults.strikes(current.faults, "work_alloc", relid):
        return None, None
    item = tables.work_queues.allocate(Works.VMBUS_ADD_CHANNEL_WORK, serial=current.serial)
    if item is None or faults.strikes(current.faults, "alloc_channel", relid):
        return item, None
    return item, offers.new_channel(tables, offer, payload, current.serial)


def vmbus_process_offer(current: Current, newchannel: Channel, add_channel_work: WorkItem) -> None:
    """Primary or sub-channel? Link it, publish its relid, and queue the half that may wait for the host."""
    connection, actor, queues = current.connection, current.actor, current.tables.work_queues
    # No processor goes between its choice and the moment when who takes one down finds the channel (races.md F3).
    stays = cpus_read_lock(connection, actor) if current.fix.hotplug_lock_on_offer else nullcontext()
    with stays, connection.channel_mutex.hold(actor):
        # Under the mutex, which a rescind takes when it saw the count fall: it finds the channel.
        if current.era.early_offer_done:
            offer_done(current)
        entered = offers.choose_place(current.tables, newchannel)
        if entered.refusal is None:
            _cpu_picked(current, newchannel)
            offers.publish(current.tables, newchannel, entered)
        if not current.era.early_offer_done:
            offer_done(current)
    if entered.refusal is not None:
        # As in the kernel, no RELID_RELEASED: that id, or that device, is in use.
        current.refuse(entered.refusal, "vmbus_process_offer")
        current.tables.channels.free(newchannel)
        queues.discard(add_channel_work)
        return
    if offers.handled_inline(current.fix):
        vmbus_add_channel_work(current, add_channel_work)
        queues.discard(add_channel_work)
        return
    # A probe may wait for another device's sub-channels. On one queue (races.md A3) they would wait behind it.
    primary = entered.place is Place.PRIMARY or not current.fix.split_pri_sub
    queue = QueueNumber.PRI_CHAN if primary else QueueNumber.SUB_CHAN
    current.record(E_WORK_QUEUE, queue, Works.VMBUS_ADD_CHANNEL_WORK, add_channel_work.serial)
    queues.queue_work(actor, queue, add_channel_work)


def _cpu_picked(current: Current, channel: Channel) -> None:
    """Its processor is chosen, and nobody can see that yet."""
    mutex, actor = current.connection.channel_mutex, current.actor
    # Wrong on purpose (races.md F3): nothing is held here, and who takes that processor down finds no reason not to.
    alone = not current.fix.hotplug_lock_on_offer
    if alone:
        mutex.release(actor)
    if current.armed[_CPU_PICKED]:
        current.reach(_CPU_PICKED, channel.relid)
    if alone:
        mutex.acquire(actor)


@WORK_FUNCTIONS.register(Works.VMBUS_ADD_CHANNEL_WORK)
def vmbus_add_channel_work(current: Current, item: WorkItem) -> None:
    """The second half of an offer: device and driver for a primary, the driver's callback for a sub-channel."""
    newchannel = current.channel(item.arguments[0])
    if current.percpu_lists:
        # As in `vmbus_process_offer`; the article's kernel chooses without the lock.
        with cpus_read_lock(current.connection, current.actor):
            if current.era.percpu_lists:
                with current.connection.bind_channel_to_cpu_lock.hold(current.actor):
                    init_vp_index_seed(current.tables, newchannel)
            run_on_target_cpu(current, newchannel, Ipis.PERCPU_CHANNEL_ENQ)
    newchannel.state.store(ChannelState.OPEN_STATE)
    done = _add_sub_channel if newchannel.primary_channel else _add_primary
    if done(current, newchannel):
        probe_done(current, newchannel)
    else:
        err_deq_chan(current, newchannel)


def _add_sub_channel(current: Current, newchannel: Channel) -> bool:
    """Its directory below the primary's device, then the driver's callback, which typically opens it."""
    with current.connection.channel_mutex.hold(current.actor):
        if vmbus_add_channel_kobj(current, newchannel) != 0:
            return False
        primary = current.channel(newchannel.primary_channel)
        callback = primary.sc_creation_callback
    if callback:
        CHANNEL_CALLBACKS.lookup(callback)(current, newchannel)
    return True


def _add_primary(current: Current, newchannel: Channel) -> bool:
    """The device, registered and so bound; a driver's probe that fails is no failure here."""
    device = vmbus_device_create(current, newchannel)
    if device is None:
        return False
    if vmbus_device_register(current, device) != 0:
        current.log(f"unable to add child device object (relid {newchannel.relid})")
        vmbus_device_discard(current, device)
        return False
    return True


def probe_done(current: Current, channel: Channel) -> None:
    """The offer's handling is over: a rescind that came meanwhile goes on here."""
    channel.probe_done.store(1)
    current.connection.state_wait.wake_all(current.actor)
    if rescinds.meets(channel):
        _finish_rescind(current, channel)


def err_deq_chan(current: Current, channel: Channel) -> None:
    """Undo an offer that could not be finished: exactly one RELID_RELEASED for its id.

    A channel that a rescind has claimed meanwhile is removed as that rescind goes on. (The kernel frees it here all
    the same, and the handler uses it afterwards.)
    """
    if current.armed[_ADD_FAILED]:
        current.reach(_ADD_FAILED, channel.relid)
    with current.connection.channel_mutex.hold(current.actor):
        claimed = channel.rescind_ref.load()
        if not claimed:
            offers.leave_lists(current.tables, channel)
    if claimed:
        probe_done(current, channel)
        return
    if current.percpu_lists:
        run_on_target_cpu(current, channel, Ipis.PERCPU_CHANNEL_DEQ)
    closed_before_suspend(current, offers.closes_before_suspend(channel))
    vmbus_release_relid(current, channel.relid, channel.generation)
    free_channel(current, channel)


# -- rescinds, on hv_vmbus_rescind ----------------------------------------------------------------------


@message_handler
def vmbus_onoffer_rescind(current: Current, payload: bytes) -> None:
    """The host takes a channel back: quiesce it, wake who waits on it, remove its device or itself."""
    rescind = parse(payload)
    assert isinstance(rescind, RescindChannelOffer)
    current.record(E_VMBUS_ONOFFER_RESCIND, rescind.child_relid)
    # Every earlier offer must be findable before "not found" means anything. Without that (races.md A1) it is wrong.
    if current.fix.offer_gate and not _offers_are_known(current, rescind.child_relid):
        current.log(f"rescind of relid {rescind.child_relid}: offers before it do not end; it is not handled")
        return
    channel = _claim(current, rescind.child_relid)
    current.record(E_RESCIND, rescind.child_relid, 0 if channel is None else channel.generation)
    if channel is None:
        return  # its offer failed, and its id was released there; or this is the second rescind of it
    if _say_it(current, channel) and rescinds.meets(channel):
        _finish_rescind(current, channel)


def _say_it(current: Current, channel: Channel) -> bool:
    """Stop the callback, raise the flag, wake who waits. False: a handler that waits for the probe waited in vain."""
    # Quiet before the flag is up: who polls for the flag takes its memory away (races.md A7).
    if current.fix.quiesce_before_flag:
        vmbus_reset_channel_cb(current, channel)
    if current.fix.wake_before_probe_wait:
        vmbus_rescind_cleanup(current, channel)
    if not current.fix.quiesce_before_flag:
        # Wrong on purpose: the callback may be storing into that memory.
        vmbus_reset_channel_cb(current, channel)
    if current.armed[_RESCIND_BEFORE_PROBE_WAIT]:
        current.reach(_RESCIND_BEFORE_PROBE_WAIT, channel.relid)
    if rescinds.waits_for_probe(current.fix) and not _probe_is_done(current, channel):
        current.log(f"rescind of relid {channel.relid}: its probe does not end; it is not handled")
        return False
    if not current.fix.wake_before_probe_wait:
        # Wrong on purpose (races.md A5): the probe may be who is to be woken.
        vmbus_rescind_cleanup(current, channel)
    return True


def _claim(current: Current, relid: int) -> Channel | None:
    """The channel that a rescind means, for this handler alone; found and claimed in one, under the mutex."""
    with current.connection.channel_mutex.hold(current.actor):
        channel = rescinds.find(current.tables, relid)
        if channel is not None and current.fix.rescind_once:
            if current.armed[_RESCIND_AFTER_LOOKUP]:
                current.reach(_RESCIND_AFTER_LOOKUP, relid)
            return channel if rescinds.claim(channel) else None
    # Wrong on purpose (races.md A6): a second rescind may find the same channel before this one frees it.
    if channel is not None and current.armed[_RESCIND_AFTER_LOOKUP]:
        current.reach(_RESCIND_AFTER_LOOKUP, relid)
    return channel


def _probe_is_done(current: Current, channel: Channel) -> bool:
    """Sleep until its offer has been handled, as the kernel's handler does; False: that does not end."""
    return current.connection.state_wait.wait_until_timeout(
        current.actor, lambda: channel.probe_done.load() != 0, HANDLED_TIMEOUT_NS, channel.gpa
    )


def _offers_are_known(current: Current, relid: int) -> bool:
    """Wait until every offer between its slot and the relid table is through; False: they do not end."""
    connection = current.connection
    if current.armed[_RESCIND_WAIT_GATE]:
        current.reach(_RESCIND_WAIT_GATE, relid)
    return connection.offer_wait.wait_until_timeout(
        current.actor, lambda: connection.offer_in_progress.load() == 0, HANDLED_TIMEOUT_NS
    )


def vmbus_rescind_cleanup(current: Current, channel: Channel) -> None:
    """Set the rescind flag and complete every request that waits on this channel, in one critical section.

    A requester enters its request under the same lock and looks at the flag afterwards, so one of the two
    sees the other (races.md A4).
    """
    with current.connection.channelmsg_lock.hold(current.actor):
        woken = _to_be_woken(current.fix, rescinds.mark(current.tables, channel))
        asleep = [(request.waitevent, request.waitevent.let_through()) for request in woken]
    for waitevent, chain in asleep:
        waitevent.wake(current.actor, chain)
    # A probe may wait for something of the device's own on this channel.
    current.connection.state_wait.wake_all(current.actor)


def _to_be_woken(fix: Fix, waiting: list[Request]) -> list[Request]:
    """Everybody who waits on the channel: whoever is left asleep here is woken by nobody."""
    if not fix.wake_on_rescind:
        return []  # wrong on purpose (races.md A4, i): nobody, as in kernels before 2017
    # Wrong on purpose (races.md A4, iii): the first, as in Linux 6.12; of two who wait, one is left.
    return waiting if fix.wake_all_waiters else waiting[:1]


def _finish_rescind(current: Current, channel: Channel) -> None:
    """Its offer was handled: remove what the host took back, or see to it that somebody will."""
    connection, actor = current.connection, current.actor
    counts = offers.closes_before_suspend(channel)
    with connection.channel_mutex.hold(actor):
        removal = rescinds.decide(channel)
        device_handle, callback = channel.device_obj, channel.rescind_callback
        if removal is Removal.REMOVE_CHANNEL:
            hv_process_channel_removal(current, channel)
        elif removal is Removal.LEAVE_TO_CLOSER:
            channel.rescind_event.complete(actor)
            connection.state_wait.wake_all(actor)
    if removal is Removal.CALL_DRIVER:
        CHANNEL_CALLBACKS.lookup(callback)(current, channel)
    elif removal is Removal.UNREGISTER_DEVICE:
        vmbus_device_unregister(current, current.tables.devices.from_handle(device_handle))
    closed_before_suspend(current, counts)


def closed_before_suspend(current: Current, counts: bool) -> None:
    """`check_ready_for_suspend_event`: one that a suspend waits for has gone."""
    if counts and offers.close_done_before_suspend(current.tables):
        current.connection.ready_for_suspend_event.complete(current.actor)


# -- module unload --------------------------------------------------------------------------------------


def vmbus_free_channels(current: Current) -> None:
    """Every channel that is left goes, as if the host had rescinded it; after UNLOAD, so it holds nothing more."""
    with current.connection.channel_mutex.hold(current.actor):
        primaries = [channel.handle for channel in current.tables.chn_list]
        # Sub-channels that the host did not rescind, also of primaries that it did.
        others = [channel.handle for channel in current.tables.channels.live() if channel.primary_channel]
    for handle in [*others, *primaries]:
        channel = current.channel(handle)
        channel.rescind.store(1)
        if channel.device_obj:
            vmbus_device_unregister(current, current.tables.devices.from_handle(channel.device_obj))
            continue
        vmbus_reset_channel_cb(current, channel)
        if opening.begin_close(channel):
            vmbus_free_ring(current, channel)
        with current.connection.channel_mutex.hold(current.actor):
            hv_process_channel_removal(current, channel)
