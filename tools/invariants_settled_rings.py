"""Rules over rings, their pages, and what is taken from pools, in a settled machine."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from emu.host_tables import HostGpadl
from emu.wire.ring_layout import CONTROL_PAGE_SIZE, FEAT_PENDING_SEND_SZ, FEATURE_BITS, PENDING_SEND_SZ
from emu.wire.synic import VMBUS_MESSAGE_SINT, page_register_enabled, page_register_gpa
from guestproc.drivers.stream import SLEEPERS, STREAM
from guestproc.kernel.layout import CallbackMode, Channel, ConnectionState
from guestproc.kernel.pages import PageOwner, owned_by, owner_text
from guestproc.kernel.rqstor import Requestor
from guestproc.view import INBOUND, OUTBOUND, GuestView, RingFigures
from hostproc.protocol.states import REVOKED_STATES, ChannelState
from tools.invariants import Finding
from tools.invariants_settled import Scene
from tools.invariants_settled_interrupts import consumer, interrupt_pending, open_channels
from tools.live_view import LiveView
from tools.nouns import counted, noun

ALIGNMENT: Final = 8
"""Of what is in a ring; this much of it always stays free."""
READS_AS_IT_LIKES: Final = "uio_hv_generic"
"""The driver whose program reads the ring when it wants to."""
_U32: Final = Struct("<I")


# -- who waits for the other end of a ring --------------------------------------------------------------


def readers_look(scene: Scene) -> Iterator[Finding]:
    """INV-19: no ring has bytes, a reader that asked for interrupts and is idle, and no signal under way."""
    view = scene.view
    guest = view.guest
    if guest is None:
        return
    rung = set(view.rung())
    for channel in open_channels(scene):
        relid = channel.relid
        inbound, outbound = guest.ring(channel, INBOUND), guest.ring(channel, OUTBOUND)
        if inbound is None or outbound is None:
            continue
        if left_lying(inbound) and guest_reads(view, channel) and not _signalled(view, channel):
            text = f"{inbound.bytes_to_read} bytes lie in the inbound ring of relid {relid}, unmasked and unread"
            yield Finding(19, text, relid=relid, actors=(f"vcpu{channel.target_cpu.load()}",))
        if left_lying(outbound) and host_reads(view, channel) and channel.sig_event not in rung:
            text = f"{outbound.bytes_to_read} bytes lie in the outbound ring of relid {relid}, and the host is idle"
            yield Finding(19, text, relid=relid, actors=("hypervisor",))


def writers_are_woken(scene: Scene) -> Iterator[Finding]:
    """INV-20: no writer waits for room that is there, with no signal under way."""
    view = scene.view
    guest = view.guest
    if guest is None:
        return
    rung = set(view.rung())
    for channel in open_channels(scene):
        relid = channel.relid
        if not host_reads(view, channel):
            continue
        wish = _granted(guest, channel, OUTBOUND)
        # A stream's wish stands whether or not anybody waits.
        if wish and _stream_sleepers(guest, channel) != 0 and not _signalled(view, channel):
            text = f"relid {relid}: the guest waits for {wish} bytes of its ring, which are free"
            yield Finding(20, text, relid=relid, actors=(f"vcpu{channel.target_cpu.load()}",))
        wish = _granted(guest, channel, INBOUND)
        if wish and channel.sig_event not in rung:
            text = f"relid {relid}: the host waits for {wish} bytes of its ring, which are free"
            yield Finding(20, text, relid=relid, actors=("hypervisor",))


def left_lying(ring: RingFigures) -> bool:
    """Bytes that a reader which asks for interrupts has not read; indices that cannot be are somebody else's rule."""
    sane = ring.read_index < ring.data_size and ring.write_index < ring.data_size
    return sane and ring.bytes_to_read > 0 and not ring.interrupt_mask


def guest_reads(view: LiveView, channel: Channel) -> bool:
    """Whether the guest's kernel is to read this ring, and nothing of it is due: a program reads as it likes."""
    assert view.guest is not None
    if channel.callback_mode == CallbackMode.DIRECT:
        primary = channel if not channel.primary_channel else view.guest.tables.channels.find(channel.primary_channel)
        device = None if primary is None else view.guest.tables.devices.find(primary.device_obj)
        if device is not None and view.guest.driver_of(device) == READS_AS_IT_LIKES:
            return False
    return consumer(view, channel) == "idle"


def host_reads(view: LiveView, channel: Channel) -> bool:
    """Whether the host has this channel open."""
    host = view.mirror.channel(channel.relid)
    return host is not None and host.state == ChannelState.OPEN


def _signalled(view: LiveView, channel: Channel) -> bool:
    """Whether the channel's flag is set on any processor, or an interrupt is on its way where it would be."""
    for position in range(view.machine.vp_count):
        if channel.relid in view.flags(position, VMBUS_MESSAGE_SINT):
            return True
        if interrupt_pending(view, position, VMBUS_MESSAGE_SINT):
            return True
    return False


def _stream_sleepers(guest: GuestView, channel: Channel) -> int | None:
    """How many sleep until a stream's channel has room; None: it is no stream's."""
    device = guest.tables.devices.find(channel.device_obj) if channel.device_obj else None
    if device is None or guest.driver_of(device) != STREAM:
        return None
    return int(device.driver_state[SLEEPERS])


def _wish(guest: GuestView, channel: Channel, side: int) -> int:
    """How much room the writer of a ring says that it waits for."""
    gpa = guest.ring_gpa(channel, side)
    return 0 if gpa is None else _U32.unpack_from(guest.tables.ram.octets, gpa + PENDING_SEND_SZ)[0] & -ALIGNMENT


def _granted(guest: GuestView, channel: Channel, side: int) -> int:
    """What the writer of a ring waits for, if there is as much room; 0 if it waits for nothing, or rightly."""
    ring, gpa = guest.ring(channel, side), guest.ring_gpa(channel, side)
    if ring is None or gpa is None:
        return 0
    wish = _wish(guest, channel, side)
    honoured = _U32.unpack_from(guest.tables.ram.octets, gpa + FEATURE_BITS)[0] & FEAT_PENDING_SEND_SZ
    return wish if honoured and wish <= ring.bytes_to_write - ALIGNMENT else 0


# -- pages ----------------------------------------------------------------------------------------------


def lent_pages_are_taken(scene: Scene) -> Iterator[Finding]:
    """INV-12: a page in a live GPADL, an open ring, an overlay or the connection is in no free list."""
    view = scene.view
    if view.tables is None:
        return
    channels = {channel.relid: channel for channel in view.channels()}
    given_away: set[int] = set()
    for one in view.host.gpadls():
        host = view.mirror.channel(one.relid)
        if host is None or host.state in REVOKED_STATES:
            # The device's mapping is gone; only the handle is still taken.
            continue
        for finding in _lent(view, one, channels.get(one.relid)):
            given_away.add(one.relid)
            yield finding
    # The guest's own list: an open ring is the channel's whatever the host says.
    for channel in open_channels(scene):
        if channel.ring_gpa and channel.relid not in given_away:
            yield from _rings(view, channel)
    yield from _registered_pages(view)


def _lent(view: LiveView, one: HostGpadl, channel: Channel | None) -> Iterator[Finding]:
    """What is wrong with the pages of a GPADL that the host's device has; the first page tells."""
    assert view.tables is not None
    if channel is None or (one.ring and not channel.ring_gpa):
        text = f"the host holds GPADL {one.gpadl:#x} of relid {one.relid}, whose pages the guest has taken back"
        yield Finding(12, text, relid=one.relid)
        return
    is_ring = one.ring or one.gpadl == channel.ringbuffer_gpadlhandle
    what = "its ring" if is_ring else "lent by its driver"
    lenders = _lenders(view, channel)
    for pfn in (pfn for first, count in one.runs for pfn in range(first, first + count)):
        # Memory that the allocator never had is nobody's to free.
        if not view.tables.layout.first_free_page <= pfn < view.tables.layout.end_page:
            continue
        owner = view.tables.pages.owner_of(pfn)
        if owner not in lenders:
            text = f"page {pfn:#x} of GPADL {one.gpadl:#x} of relid {one.relid} ({what}), which the host has, is "
            yield Finding(12, text + owner_text(owner), relid=one.relid)
            return


def _lenders(view: LiveView, channel: Channel) -> set[int]:
    """To whom pages that a channel's GPADLs name may belong: its rings, or the driver of its device."""
    assert view.tables is not None
    primary = channel if not channel.primary_channel else view.tables.channels.find(channel.primary_channel)
    owners = {owned_by(PageOwner.RING, channel.index)}
    device = view.tables.devices.find(primary.device_obj) if primary is not None and primary.device_obj else None
    if device is not None:
        owners.add(owned_by(PageOwner.DRIVER, device.index))
    return owners


def _rings(view: LiveView, channel: Channel) -> Iterator[Finding]:
    """Pages of an open channel's rings that are not the channel's; the first tells."""
    assert view.tables is not None
    expected = owned_by(PageOwner.RING, channel.index)
    for pfn in _ring_pfns(view, channel):
        owner = view.tables.pages.owner_of(pfn)
        if owner != expected:
            text = f"page {pfn:#x} of relid {channel.relid}'s rings, which the host has, is {owner_text(owner)}"
            yield Finding(12, text, relid=channel.relid)
            return


def _ring_pfns(view: LiveView, channel: Channel) -> list[int]:
    count = channel.ring_send_pages + channel.ring_recv_pages
    if not channel.ring_pfns_gpa:
        first = channel.ring_gpa // CONTROL_PAGE_SIZE
        return list(range(first, first + count))
    assert view.tables is not None
    at = channel.ring_pfns_gpa
    return view.tables.ram.octets[at : at + 8 * count].cast("Q").tolist()


def _registered_pages(view: LiveView) -> Iterator[Finding]:
    """Overlays of the processors and pages of the connection: the host reaches them as long as they are registered."""
    tables = view.tables
    assert tables is not None
    pages: list[tuple[str, int, PageOwner]] = []
    for position in range(view.machine.vp_count):
        synic, vp = view.synic(position), view.machine.vp_index(position)
        for name, register in (("SIMP", synic.simp), ("SIEFP", synic.siefp)):
            if page_register_enabled(register):
                pages.append((f"{name} of VP {vp}", page_register_gpa(register), PageOwner.SYNIC))
    connection = tables.connection
    if connection.conn_state.load() == ConnectionState.CONNECTED:
        monitors = [("a monitor page", gpa, PageOwner.CONNECTION) for gpa in connection.monitor_page_gpas]
        pages += [*monitors, ("the interrupt page", connection.int_page_gpa, PageOwner.CONNECTION)]
    for name, gpa, wanted in pages:
        pfn = gpa // CONTROL_PAGE_SIZE
        if not gpa or not tables.layout.first_free_page <= pfn < tables.layout.end_page:
            continue
        owner = tables.pages.owner_of(pfn)
        if owner & 0xFF != wanted:
            yield Finding(12, f"page {pfn:#x}, which the host has as {name}, is {owner_text(owner)}")


# -- what came --------------------------------------------------------------------------------------------


def frames_came_whole(scene: Scene) -> Iterator[Finding]:
    """INV-23: the frames that came to a NIC's channel had consecutive sequences, and their data were what was sent."""
    tables = scene.view.tables
    if tables is None:
        return
    for one in tables.net_channels.live():
        channel = tables.channels.find(one.channel)
        wrong = [(one.rx_gaps, "out of sequence"), (one.rx_checksum_errors, "damaged")]
        said = " and ".join(f"{count} {what}" for count, what in wrong if count)
        if channel is not None and said:
            text = f"of {counted(one.rx_packets, 'frame')} that came on relid {channel.relid} {said}"
            yield Finding(23, text, relid=channel.relid)


# -- pools ----------------------------------------------------------------------------------------------


def pools_and_queues(scene: Scene) -> Iterator[Finding]:
    """INV-22, all of it."""
    yield from pools_add_up(scene)
    yield from stopped_queues_are_woken(scene)
    yield from sleepers_have_a_threshold(scene)


def stopped_queues_are_woken(scene: Scene) -> Iterator[Finding]:
    """INV-22: a completion will come that wakes a stopped queue, and a poll that owes some comes again."""
    tables = scene.view.tables
    if tables is None or scene.parked:
        return
    for one in tables.net_channels.live():
        channel = tables.channels.find(one.channel)
        if channel is None or not one.attached or channel.rescind.load():
            continue
        if one.tx_stopped.load() and not one.queue_sends.load():
            text = f"the transmit queue of relid {channel.relid} is stopped, and no completion will come that wakes it"
            yield Finding(22, text, relid=channel.relid)
        if one.rx_owed and not one.napi.scheduled:
            owed = counted(one.rx_owed, "completion is", "completions are")
            text = f"{owed} owed on relid {channel.relid}, and no poll is due that sends them"
            yield Finding(22, text, relid=channel.relid)


def sleepers_have_a_threshold(scene: Scene) -> Iterator[Finding]:
    """INV-22: while somebody sleeps until a stream has room, the wish that wakes him stands in the ring."""
    view = scene.view
    guest = view.guest
    if guest is None or scene.parked:
        return
    for channel in open_channels(scene):
        if _stream_sleepers(guest, channel) and not _wish(guest, channel, OUTBOUND) and not _signalled(view, channel):
            text = f"relid {channel.relid}: a writer sleeps until there is room, and no wish tells the host to say so"
            yield Finding(22, text, relid=channel.relid)


def pools_add_up(scene: Scene) -> Iterator[Finding]:
    """INV-22: of each pool, what is free and what is taken is all of it."""
    tables = scene.view.tables
    if tables is None or scene.parked:
        return
    for channel in scene.view.channels():
        gpa, size = channel.rqstor_gpa, channel.rqstor_size
        if not gpa or not size or gpa + Requestor.footprint(size) > tables.ram.size:
            continue
        requestor = Requestor(tables.ram, gpa, size)
        free, out = requestor.free_ids(), requestor.outstanding()
        if free + out != size:
            text = f"relid {channel.relid}: of {size} request ids {out} are out and {max(free, 0)} are free"
            yield Finding(22, text, relid=channel.relid)
    owned = sum(tables.pages.in_use_by_owner().values())
    if owned != tables.pages.pages_in_use:
        taken = counted(tables.pages.pages_in_use, "page is", "pages are")
        yield Finding(22, f"{taken} counted as taken, {counted(owned, 'has', 'have')} an owner")
    pools = (tables.channels, tables.requests, tables.waiters, tables.work, tables.devices, tables.net_channels)
    for table in (*pools, tables.frames):
        live = sum(1 for _ in table.live())
        if live != table.in_use:
            taken = f"{counted(table.in_use, 'record')} of {table.name} {noun(table.in_use, 'is', 'are')}"
            yield Finding(22, f"{taken} counted as taken, {counted(live, 'is', 'are')}")
