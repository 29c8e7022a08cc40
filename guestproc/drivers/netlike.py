"""The netlike driver: a NIC's way with a channel, which is HV_CALL_ISR and NAPI.

    interrupt    netvsc_channel_cb, in the ISR: own the poll, mask the ring, schedule
    softirq      netvsc_poll: at most a budget of packets; a full budget comes again, masked
                 less: complete, unmask, look again; bytes that came in between → own it, mask, poll on

Packets that arrive behind the last look and before the unmask bring no interrupt, so without the second look they would
lie there until the next ones come. Functions have netvsc's names; the bytes are those of `emu.wire.netlike_protocol`.

Each open channel has a NetChannel record, which is the callback's context. It goes with its channel: the driver first
owns the poll for good (`napi_disable`), then closes, then frees.

Driver state words in guest RAM: 3 the claims; 4 to 7 the sub-channels.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.syncpoint import Point
from emu.tracing import E_MASK, E_TASKLET_RUN, E_TASKLET_SCHED, E_UNMASK
from emu.wire.device_classes import NETLIKE
from emu.wire.guids import guid_to_wire
from emu.wire.netlike_protocol import FRAME, parse_frame, type_of
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from guestproc.drivers import claims
from guestproc.drivers.netlike_rx import enq_receive_complete, send_recv_completions
from guestproc.drivers.netlike_tx import TX_ID, netvsc_send_tx_complete
from guestproc.drivers.settings import Settings
from guestproc.drivers.subchannels import add_subchannel, ask_for_subchannels, take_answer, wait_for_callbacks
from guestproc.kernel.functions import CHANNEL_CALLBACKS, TASKLET_FUNCTIONS
from guestproc.kernel.layout import CallbackMode, Channel, Device, NetChannel
from guestproc.kernel.napi import (
    WEIGHT,
    __napi_schedule,
    napi_complete_done,
    napi_disable,
    napi_enable,
    napi_poll,
    napi_schedule_prep,
    netif_napi_add,
    netif_napi_del,
)
from guestproc.protocol.numbers import Callbacks, Tasklets
from guestproc.vmbus.chan_sched import INBOUND
from guestproc.vmbus.channel import set_channel_read_mode, vmbus_close, vmbus_open, vmbus_set_sc_create_callback
from guestproc.vmbus.packets import inbound_rings, stop_reading, vmbus_drain

if TYPE_CHECKING:
    from guestproc.current import Current

_POLLER_ENABLE: Final = int(Point.DRV_POLLER_ENABLE)
SETTINGS: Final = Settings()


class NetlikeDriver:
    """`hv_driver` of the netlike device."""

    number: int = 2
    name: str = "hv_netlike"
    id_table: frozenset[bytes] = frozenset((guid_to_wire(NETLIKE.guid),))

    def probe(self, current: Current, device: Device) -> int:
        """Open the primary, then ask for sub-channels; without them the device has one channel."""
        claims.reset_state(device)
        settings = SETTINGS.of(current, device)
        channel = current.channel(device.channel)
        asks = settings.subchannels > 0 and not channel.sub_channel_index
        if asks:
            vmbus_set_sc_create_callback(current, channel, Callbacks.NETVSC_SC_OPEN)
        opening = NetOpening(current, channel)
        result = opening.open(device)
        if result:
            opening.undo()
            return result
        with current.connection.channel_mutex.hold(current.actor):
            opening.keep()
        if asks:
            ask_for_subchannels(current, device, channel, settings.subchannels, self.name)
        return 0

    def remove(self, current: Current, device: Device) -> None:
        """Claimants leave, polls end, channels close, records go."""
        channel = current.channel(device.channel)
        claims.begin_removal(current, device, self.name)
        nvchans = _detach_all(current, device)
        for nvchan in nvchans:
            napi_disable(current.actor, nvchan.napi, current.connection.tasklet_idle)
        vmbus_close(current, channel)
        for nvchan in nvchans:
            _free(current, nvchan)
        wait_for_callbacks(current, device, channel, self.name)
        set_channel_read_mode(current, channel, CallbackMode.BATCHED)


# -- open and close -----------------------------------------------------------------------------------------


class NetOpening:
    """A channel of the device and its NetChannel, which has its poll enabled before anything can interrupt."""

    def __init__(self, current: Current, channel: Channel) -> None:
        self._current = current
        self._channel = channel
        self._nvchan: NetChannel | None = None

    def open(self, device: Device) -> int:
        """The record first: an interrupt of a channel whose poll is disabled would be nobody's."""
        current, channel = self._current, self._channel
        nvchan = self._nvchan = current.tables.net_channels.alloc()
        if nvchan is None:
            return -errno.ENOMEM
        nvchan.channel = channel.handle
        nvchan.device = device.handle
        netif_napi_add(nvchan.napi, Tasklets.NET_RX_ACTION, nvchan.handle)
        size = SETTINGS.of(current, device).ring_bytes
        set_channel_read_mode(current, channel, CallbackMode.ISR)
        if not current.fix.listen_before_open:
            return self._open_then_listen(nvchan, size)
        napi_enable(nvchan.napi)
        return vmbus_open(current, channel, size, size, b"", Callbacks.NETVSC_CHANNEL_CB, nvchan.handle)

    def _open_then_listen(self, nvchan: NetChannel, size: int) -> int:
        """Wrong on purpose (races.md C1): the host may interrupt before the poll may be scheduled."""
        current, channel = self._current, self._channel
        callback = Callbacks.NETVSC_CHANNEL_CB_MASKS_FIRST
        result = vmbus_open(current, channel, size, size, b"", callback, nvchan.handle)
        if current.armed[_POLLER_ENABLE]:
            current.reach(_POLLER_ENABLE, channel.relid)
        napi_enable(nvchan.napi)
        return result

    def keep(self) -> None:
        """Under channel_mutex: `remove` finds it from now on."""
        assert self._nvchan is not None
        self._nvchan.attached = 1

    def undo(self) -> None:
        """The channel is closed: nothing schedules the poll any more."""
        if self._nvchan is not None:
            napi_disable(self._current.actor, self._nvchan.napi, self._current.connection.tasklet_idle)
            _free(self._current, self._nvchan)


@CHANNEL_CALLBACKS.register(Callbacks.NETVSC_SC_OPEN)
def netvsc_sc_open(current: Current, channel: Channel) -> None:
    """A new sub-channel: open it with a poll of its own."""
    add_subchannel(current, channel, NetOpening(current, channel))


def _detach_all(current: Current, device: Device) -> list[NetChannel]:
    """The records of a device's channels, now the remover's."""
    with current.connection.channel_mutex.hold(current.actor):
        found = [one for one in current.tables.net_channels.live() if one.device == device.handle and one.attached]
        for nvchan in found:
            nvchan.attached = 0
    return found


def _free(current: Current, nvchan: NetChannel) -> None:
    netif_napi_del(current.actor, nvchan.napi, current.connection.tasklet_idle)
    current.tables.net_channels.free(nvchan)


def net_channel(current: Current, channel: Channel) -> NetChannel:
    """The record of a claimed channel."""
    nvchan: NetChannel = current.tables.net_channels.from_handle(channel.channel_callback_context)
    return nvchan


# -- in the ISR ---------------------------------------------------------------------------------------------


@CHANNEL_CALLBACKS.register(Callbacks.NETVSC_CHANNEL_CB)
def netvsc_channel_cb(current: Current, channel: Channel) -> None:
    """The callback, under sched_lock: mask and schedule a poll, unless one is under way."""
    nvchan = net_channel(current, channel)
    if not napi_schedule_prep(nvchan.napi):
        return
    rings = inbound_rings(current, channel)
    assert current.tasklets is not None
    if rings is not None:
        rings.inbound.begin_read()
        current.record(E_MASK, channel.relid, INBOUND)
    # Without rings there is nothing to read either: the poll sees that, and completes.
    __napi_schedule(current.tasklets, nvchan.napi)
    current.record(E_TASKLET_SCHED, Tasklets.NET_RX_ACTION, channel.relid)


@CHANNEL_CALLBACKS.register(Callbacks.NETVSC_CHANNEL_CB_MASKS_FIRST)
def netvsc_channel_cb_masks_first(current: Current, channel: Channel) -> None:
    """C1's other half: masks whether or not a poll takes the ring over."""
    rings = inbound_rings(current, channel)
    if rings is not None:
        rings.inbound.begin_read()
        current.record(E_MASK, channel.relid, INBOUND)
    netvsc_channel_cb(current, channel)


# -- in the softirq -----------------------------------------------------------------------------------------


@TASKLET_FUNCTIONS.register(Tasklets.NET_RX_ACTION)
def net_rx_action(current: Current, handle: int) -> None:
    """One poll of one channel; its owner's record is there, as `napi_disable` waits for the owner."""
    nvchan: NetChannel = current.tables.net_channels.from_handle(handle)
    assert current.tasklets is not None
    current.counters.tasklets += 1
    napi_poll(
        current.actor,
        current.tasklets,
        nvchan.napi,
        lambda budget: netvsc_poll(current, nvchan, budget),
        current.connection.tasklet_idle,
        WEIGHT,
    )


def netvsc_poll(current: Current, nvchan: NetChannel, budget: int) -> int:
    """Read at most `budget` packets; less means: completed, and unmasked unless bytes had come or something is owed."""
    queue, actor, idle = current.tasklets, current.actor, current.connection.tasklet_idle
    assert queue is not None
    channel = current.channel(nvchan.channel)
    current.record(E_TASKLET_RUN, Tasklets.NET_RX_ACTION, channel.relid)
    packets = vmbus_drain(current, channel, budget) if channel.onchannel_callback else []
    work = len(packets)
    if work:
        _process(current, channel, nvchan, packets)
    owes = nvchan.rx_owed != 0 and send_recv_completions(current, channel, nvchan)
    nvchan.polls += 1
    if work == budget:
        nvchan.full_polls += 1
        return work
    if (
        napi_complete_done(actor, queue, nvchan.napi, idle)
        and (owes or _unmask(current, channel))
        and napi_schedule_prep(nvchan.napi)
    ):
        nvchan.repolls += 1
        current.rings.of(channel).inbound.begin_read()
        current.record(E_MASK, channel.relid, INBOUND)
        __napi_schedule(queue, nvchan.napi)
    return work


def _unmask(current: Current, channel: Channel) -> bool:
    """`hv_end_read`: interrupts again; whether bytes are there that will bring none."""
    if not channel.onchannel_callback:
        return False  # rescinded, being closed, or its ring broken: nobody reads it any more
    inbound = current.rings.of(channel).inbound
    try:
        left = inbound.end_read()
    except ProtocolViolation as violation:
        inbound.begin_read()
        stop_reading(current, channel, violation)
        return False
    current.record(E_UNMASK, channel.relid, INBOUND, left)
    return bool(left)


def _process(current: Current, channel: Channel, nvchan: NetChannel, packets: list[Packet]) -> None:
    """What came: frames are counted, completions go to who asked."""
    if not channel.primary_channel:
        device: Device = current.tables.devices.from_handle(nvchan.device)
        take_answer(current, device, packets)
    frames = nbytes = gaps = checksum_errors = 0
    expected = nvchan.rx_next
    asked: list[int] = []
    for packet_type, flags, trans_id, payload in packets:
        if packet_type == VM_PKT_COMP:
            if trans_id & TX_ID:
                netvsc_send_tx_complete(current, channel, nvchan)
                continue
            nvchan.reply = payload[:40].ljust(40, b"\0")
            nvchan.replies += 1
            continue
        try:
            if type_of(payload) != FRAME:
                text = f"netlike: a packet of type {type_of(payload)} from the host"
                raise ProtocolViolation(text, rule="netlike-packet", field="type", value=type_of(payload))
            sequence, length, intact = parse_frame(payload)
        except ProtocolViolation as violation:
            current.refuse(violation, f"relid {channel.relid}")
            continue
        if flags & COMPLETION_REQUESTED:
            asked.append(trans_id)
        frames += 1
        nbytes += length
        gaps += sequence != expected
        checksum_errors += not intact
        expected = sequence + 1 & 0xFFFFFFFF
    if asked:
        enq_receive_complete(current, channel, nvchan, asked)
    nvchan.rx_next = expected
    nvchan.rx_packets += frames
    nvchan.rx_bytes += nbytes
    nvchan.rx_gaps += gaps
    nvchan.rx_checksum_errors += checksum_errors
