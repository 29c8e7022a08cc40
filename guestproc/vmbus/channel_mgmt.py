"""Offers, rescinds and the host's replies: the message handlers (reference 3.6 to 3.11; channel_mgmt.c).

Handlers that only complete a waiter run in the tasklet; offers and rescinds run on their queues, where they
may sleep. An offer is counted in offer_in_progress from the slot to the relid table, which is what a rescind
that runs beside it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from emu.control import Ready
from emu.errors import ProtocolViolation
from emu.tracing import E_OFFER, E_REQ_COMPLETE, E_RESCIND, E_WORK_QUEUE
from emu.wire.messages import (
    GpadlCreated,
    GpadlTorndown,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannelResult,
    RescindChannelOffer,
    parse,
)
from guestproc.kernel.functions import CHANNEL_CALLBACKS, WORK_FUNCTIONS
from guestproc.kernel.layout import Channel, ChannelState, Request
from guestproc.kernel.rcu import synchronize
from guestproc.kernel.tasklet import tasklet_kill
from guestproc.kernel.wait import SECOND_NS
from guestproc.kernel.workqueue import QueueNumber, WorkItem
from guestproc.protocol import offers, pending
from guestproc.protocol.placement import hv_clear_allocated_cpu, hv_get_dev_type
from guestproc.vmbus.channel import vmbus_reset_channel_cb
from guestproc.vmbus.connection import vmbus_release_relid
from guestproc.vmbus.device import (
    vmbus_add_channel_kobj,
    vmbus_device_create,
    vmbus_device_register,
    vmbus_device_unregister,
)
from guestproc.vmbus.numbers import Works

if TYPE_CHECKING:
    from guestproc.current import Current

MessageHandler = Callable[["Current", bytes], None]
MESSAGE_HANDLERS: Final[dict[str, MessageHandler]] = {}
"""The handlers that `channel_message_table` names."""

WAIT_NS: Final = 60 * SECOND_NS


def message_handler(function: MessageHandler) -> MessageHandler:
    """Make a handler findable under its kernel name."""
    MESSAGE_HANDLERS[function.__name__] = function
    return function


def vmbus_onmessage(current: Current, payload: bytes) -> None:
    """Run the handler of a queued message; what has none is logged."""
    msgtype = int.from_bytes(payload[:4], "little")
    if msgtype >= current.era.channelmsg_count:
        current.log(f"Received invalid channel message type {msgtype} size {len(payload)}\n{payload.hex(' ', 4)}")
        return
    name = current.era.channel_message_table[msgtype].message_handler
    if not name:
        current.log(f"Unhandled channel message type {msgtype}")
        return
    MESSAGE_HANDLERS[name](current, payload)


# -- replies, in the tasklet ----------------------------------------------------------------------------


def _complete(current: Current, find: Callable[[], Iterable[Request]], payload: bytes) -> None:
    """Hand a reply to the requests that it answers; one that answers nothing is ignored."""
    with current.connection.channelmsg_lock.hold(current.actor):
        for request in list(find()):
            pending.answer(request, payload)
            current.record(E_REQ_COMPLETE, request.msgtype, request.openid or request.gpadl, request.index)
            request.waitevent.complete(current.actor)


@message_handler
def vmbus_onoffers_delivered(current: Current, _payload: bytes) -> None:
    """The kernel does nothing here; the harness notes how far the boot has come."""
    current.machine.control.reach(Ready.OFFERS_DELIVERED)
    current.connection.state_wait.wake_all(current.actor)


@message_handler
def vmbus_onopen_result(current: Current, payload: bytes) -> None:
    """Complete the opener that waits for this child_relid and openid."""
    result = parse(payload)
    assert isinstance(result, OpenChannelResult)
    _complete(current, lambda: pending.open_requests(current.tables, result.child_relid, result.openid), payload)


@message_handler
def vmbus_ongpadl_created(current: Current, payload: bytes) -> None:
    """Complete whoever established this GPADL."""
    created = parse(payload)
    assert isinstance(created, GpadlCreated)
    _complete(current, lambda: pending.gpadl_requests(current.tables, created.child_relid, created.gpadl), payload)


@message_handler
def vmbus_ongpadl_torndown(current: Current, payload: bytes) -> None:
    """Complete whoever tears this GPADL down; the message names no channel."""
    torndown = parse(payload)
    assert isinstance(torndown, GpadlTorndown)
    _complete(current, lambda: pending.teardown_requests(current.tables, torndown.gpadl), payload)


@message_handler
def vmbus_onversion_response(current: Current, payload: bytes) -> None:
    """Complete every INITIATE_CONTACT that waits."""
    _complete(current, lambda: pending.version_requests(current.tables), payload)


@message_handler
def vmbus_onmodifychannel_response(current: Current, payload: bytes) -> None:
    """Complete whoever moves this channel."""
    response = parse(payload)
    assert isinstance(response, ModifyChannelResponse)
    _complete(current, lambda: pending.modify_requests(current.tables, response.child_relid), payload)


@message_handler
def vmbus_unload_response(current: Current, _payload: bytes) -> None:
    """The host has closed everything."""
    current.connection.unload_event.complete(current.actor)


# -- offers, on hv_vmbus_con ----------------------------------------------------------------------------


def _offer_done(current: Current) -> None:
    """One offer less between the slot and the relid table; rescinds wait for none."""
    connection = current.connection
    if connection.offer_in_progress.fetch_sub(1) == 1:
        connection.offer_wait.wake_all(current.actor)


@message_handler
def vmbus_onoffer(current: Current, payload: bytes) -> None:
    """An offer: make the channel object, or give the relid back at once."""
    try:
        offer = parse(payload)
        assert isinstance(offer, OfferChannel)
        if not 0 < offer.child_relid < 2048:
            raise ProtocolViolation(f"offer of relid {offer.child_relid}", rule="offer-relid", value=offer.child_relid)
    except ProtocolViolation as refusal:
        current.log(f"offer ignored: {refusal}")
        _offer_done(current)
        return
    current.record(E_OFFER, offer.child_relid, 0, offer.connection_id, offer.sub_channel_index)
    channel = offers.new_channel(current.tables, offer, payload, current.serial)
    if channel is None:
        vmbus_release_relid(current, offer.child_relid)
        _offer_done(current)
        current.log("Unable to allocate channel object")
        return
    vmbus_process_offer(current, channel)


def vmbus_process_offer(current: Current, newchannel: Channel) -> None:
    """Primary or sub-channel? Link it, publish its relid, and queue the half that may wait for the host."""
    connection, actor = current.connection, current.actor
    with connection.cpus_mutex.hold(actor), connection.channel_mutex.hold(actor):
        taken = current.tables.relids.load(newchannel.relid) != 0
        entered = None if taken else offers.enter_channel(current.tables, newchannel)
        if entered is not None and not entered.duplicate and entered.primary is not None:
            connection.nr_chan_close_on_suspend.fetch_add(1)
        # Under the mutex and behind the publication: a rescind that saw the count fall finds the channel.
        _offer_done(current)
    if entered is None or entered.duplicate:
        # As in the kernel, no RELID_RELEASED: the host offered what it had offered before.
        current.log(f"duplicate offer: relid {newchannel.relid}")
        current.tables.channels.free(newchannel)
        return
    queue = QueueNumber.PRI_CHAN if entered.primary is None else QueueNumber.SUB_CHAN
    item = current.tables.work_queues.allocate(
        Works.VMBUS_ADD_CHANNEL_WORK, (newchannel.handle,), serial=newchannel.offer_serial
    )
    assert item is not None, "no work record for an offer that had one"
    current.record(E_WORK_QUEUE, queue, Works.VMBUS_ADD_CHANNEL_WORK, newchannel.offer_serial)
    current.tables.work_queues.queue_work(actor, queue, item)


@WORK_FUNCTIONS.register(Works.VMBUS_ADD_CHANNEL_WORK)
def vmbus_add_channel_work(current: Current, item: WorkItem) -> None:
    """The second half of an offer: device and driver for a primary, the driver's callback for a sub-channel."""
    newchannel = current.channel(item.arguments[0])
    newchannel.state.store(ChannelState.OPEN_STATE)
    if newchannel.primary_channel:
        primary = current.tables.channels.find(newchannel.primary_channel)
        if primary is None or vmbus_add_channel_kobj(current, newchannel) != 0:
            _err_deq_chan(current, newchannel)
            return
        callback = primary.sc_creation_callback
        if callback:
            CHANNEL_CALLBACKS.lookup(callback)(current, newchannel)
        _probe_done(current, newchannel)
        return
    device = vmbus_device_create(current, newchannel)
    if device is None:
        _err_deq_chan(current, newchannel)
        return
    if vmbus_device_register(current, device) != 0:
        current.log(f"unable to add child device object (relid {newchannel.relid})")
        with current.connection.channel_mutex.hold(current.actor):
            newchannel.device_obj = 0
        current.tables.devices.free(device)
        _err_deq_chan(current, newchannel)
        return
    _probe_done(current, newchannel)


def _probe_done(current: Current, channel: Channel) -> None:
    """The offer's handling is over: a rescind of it may go on."""
    channel.probe_done.store(1)
    current.connection.state_wait.wake_all(current.actor)


def _err_deq_chan(current: Current, channel: Channel) -> None:
    """Undo an offer that could not be finished: exactly one RELID_RELEASED for its id."""
    with current.connection.channel_mutex.hold(current.actor):
        # Set, or a rescind of this channel would wait for ever.
        _probe_done(current, channel)
        offers.leave_lists(current.tables, channel)
    vmbus_release_relid(current, channel.relid)
    free_channel(current, channel)


# -- rescinds, on hv_vmbus_rescind ----------------------------------------------------------------------


@message_handler
def vmbus_onoffer_rescind(current: Current, payload: bytes) -> None:
    """The host takes a channel back: quiesce it, wake who waits on it, remove its device or itself."""
    rescind = parse(payload)
    assert isinstance(rescind, RescindChannelOffer)
    connection, actor = current.connection, current.actor
    current.record(E_RESCIND, rescind.child_relid, 0)
    # Every earlier offer must be findable before "not found" means anything (races.md A1).
    connection.offer_wait.wait_until(
        actor, lambda: connection.offer_in_progress.load() == 0, WAIT_NS, "offers in progress"
    )
    with connection.channel_mutex.hold(actor):
        channel = current.tables.relids.lookup(rescind.child_relid)
        if channel is None or channel.rescind_ref.exchange(1):
            return
    vmbus_reset_channel_cb(current, channel)
    vmbus_rescind_cleanup(current, channel)
    handle = channel.handle
    connection.state_wait.wait_until(actor, lambda: channel.probe_done.load() != 0, WAIT_NS, f"probe of {channel}")
    if channel.device_obj:
        vmbus_device_unregister(current, current.tables.devices.from_handle(channel.device_obj))
    elif channel.primary_channel:
        with connection.channel_mutex.hold(actor):
            if channel.state.load() == ChannelState.OPEN_STATE:
                hv_process_channel_removal(current, current.channel(handle))
            else:
                channel.rescind_event.complete(actor)


def vmbus_rescind_cleanup(current: Current, channel: Channel) -> None:
    """Set the rescind flag and complete the first request that waits on this channel, in one critical section.

    A requester enters its request under the same lock and looks at the flag afterwards, so one of the two
    sees the other (races.md A4).
    """
    with current.connection.channelmsg_lock.hold(current.actor):
        channel.rescind.store(1)
        request = pending.first_waiting_on(current.tables, channel)
        if request is not None:
            request.waitevent.complete(current.actor)


def hv_process_channel_removal(current: Current, channel: Channel) -> None:
    """Unmap, unlink, give the relid back, free; under channel_mutex, for a channel that is rescinded."""
    assert channel.rescind.load(), f"{channel} removed without a rescind"
    _remove(current, channel)


def _remove(current: Current, channel: Channel) -> None:
    """What removal does, also at module unload, when no host rescinds any more."""
    target_cpu = channel.target_cpu.load()
    perf = hv_get_dev_type(channel.if_type)[1]
    offers.leave_lists(current.tables, channel)
    if perf and not any(
        other.target_cpu.load() == target_cpu and hv_get_dev_type(other.if_type)[1]
        for other in current.tables.channels.live()
        if other is not channel
    ):
        hv_clear_allocated_cpu(current.tables, target_cpu)
    vmbus_release_relid(current, channel.relid)
    free_channel(current, channel)


def free_channel(current: Current, channel: Channel) -> None:
    """Kill the tasklet, wait until no CPU is in an ISR that may have found the channel, free its record."""
    tasklet_kill(current.actor, channel.callback_event, current.connection.tasklet_idle)
    sequences = [cpu.isr_sequence for cpu in current.tables.cpus.live()]
    synchronize(current.actor, sequences, current.connection.grace_wait)
    current.tables.channels.free(channel)


def vmbus_free_channels(current: Current) -> None:
    """Module unload: every channel that is left goes, as if the host had rescinded it."""
    actor, connection = current.actor, current.connection
    for channel in list(current.tables.chn_list):
        channel.rescind.store(1)
        if channel.device_obj:
            vmbus_device_unregister(current, current.tables.devices.from_handle(channel.device_obj))
        else:
            with connection.channel_mutex.hold(actor):
                _remove(current, channel)
