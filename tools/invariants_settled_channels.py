"""Rules over the life of channels and of what the guest keeps of them, in a settled machine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from emu.switches import Fix
from emu.wire.messages import MessageType
from guestproc.kernel.layout import Channel, ChannelState, Request
from guestproc.protocol.numbers import Works
from guestproc.protocol.offers import closes_before_suspend
from hostproc.protocol.states import CLIENT_RELEASE_STATES, REVOKED_STATES
from hostproc.protocol.states import ChannelState as HostState
from tools.invariants import Finding
from tools.invariants_settled import Scene
from tools.live_view import LiveView
from tools.nouns import counted

NOT_THE_GUESTS = CLIENT_RELEASE_STATES | {HostState.CLIENT_RELEASED}
"""States of a channel of which the guest has no relid."""


# -- both ends' channels --------------------------------------------------------------------------------


def relids_agree(scene: Scene) -> Iterator[Finding]:
    """INV-01: both ends know the same relids, and what the host took back is released."""
    yield from relids_left(scene, 1)


def relids_left(scene: Scene, number: int) -> Iterator[Finding]:
    """Relids that only one end has, or that were rescinded and are held still, as findings of invariant `number`."""
    view = scene.view
    tables = view.tables
    if tables is None or scene.parked or not view.mirror.head().version or view.under_way():
        return
    ours = {channel.relid: channel for channel in view.channels()}
    theirs = {one.relid: one for one in view.mirror.channels() if one.state not in NOT_THE_GUESTS}
    named = {work.relid for work in view.work() if work.relid}
    for relid in sorted((ours.keys() | theirs.keys()) - named):
        host = theirs.get(relid)
        if host is None:
            yield Finding(number, f"the guest has relid {relid}, which the host has not", relid=relid)
        elif relid not in ours:
            state = HostState(host.state).name
            yield Finding(number, f"the host has relid {relid} ({state}), which the guest has not", relid=relid)
        elif host.state in REVOKED_STATES:
            yield Finding(number, f"relid {relid} was rescinded and is never released", relid=relid)


# -- offers and suspends that are counted ---------------------------------------------------------------


def counts_are_right(scene: Scene) -> Iterator[Finding]:
    """INV-04: offer_in_progress counts offers between slot and publish, the suspend counter its channels."""
    tables = scene.view.tables
    if tables is None:
        return
    in_progress = tables.connection.offer_in_progress.load()
    offers = [work for work in scene.view.work() if work.msgtype == MessageType.OFFERCHANNEL]
    least = sum(not work.worker for work in offers)
    # One that runs may be behind its publish; who is held may have counted one that is not queued yet.
    most = len(offers) + len(scene.parked)
    if not least <= in_progress <= most:
        signed = in_progress - (1 << 32) if in_progress >> 31 else in_progress
        between = counted(len(offers), "offer is between its", "offers are between their")
        yield Finding(4, f"offer_in_progress is {signed}, and {between} slot and the relid table")
    closes = tables.connection.nr_chan_close_on_suspend.load()
    published = tables.relids.published()
    really = sum(closes_before_suspend(one) for one in scene.view.channels() if one.relid in published)
    if not scene.parked and not offers and not _rescinds(scene.view) and closes != really:
        told = f"nr_chan_close_on_suspend is {closes}"
        yield Finding(4, f"{told}, and {counted(really, 'channel is', 'channels are')} to be closed then")


def _rescinds(view: LiveView) -> bool:
    return any(work.msgtype == MessageType.RESCIND_CHANNELOFFER for work in view.work())


# -- requests -------------------------------------------------------------------------------------------


def nobody_waits_for_the_rescinded(scene: Scene) -> Iterator[Finding]:
    """INV-06: who waits on a rescinded channel has a reply under way."""
    view = scene.view
    tables = view.tables
    if tables is None or view.under_way():
        return
    for request in tables.requests.live():
        if not request.waiting_channel or request.waitevent.done:
            continue
        channel = tables.channels.find(request.waiting_channel)
        if channel is not None and not channel.rescind.load():
            continue
        waiters = [number for number in request.waitevent.waiters(tables.waiters) if number not in scene.parked]
        if waiters:
            names = tuple(view.name_of(number) for number in waiters)
            text = f"{names[0]} waits for the answer to {request_text(request)}, which was rescinded"
            yield Finding(6, text, relid=request.child_relid, actors=names)


def request_text(request: Request) -> str:
    """A request for people."""
    known = request.msgtype in set(MessageType)
    name = MessageType(request.msgtype).name if known else f"message {request.msgtype}"
    return f"{name} of relid {request.child_relid}" if request.child_relid else name


# -- names of records -----------------------------------------------------------------------------------


def names_are_live(scene: Scene) -> Iterator[Finding]:
    """INV-13: a record that is named exists in the generation that it is named by; nobody wrote into a free one."""
    tables = scene.view.tables
    if tables is None or scene.parked:
        return
    for relid, handle in tables.relids.published().items():
        found = tables.channels.find(handle)
        if found is None or found.relid != relid:
            yield Finding(13, f"the relid table has a channel for {relid} that is gone", relid=relid)
    for what, relid, handle in _named_channels(scene.view):
        if tables.channels.find(handle) is None:
            yield Finding(13, f"{what} names the channel {handle:#x}, which is gone", relid=relid)
    for channel in tables.channels.live():
        if channel.device_obj and tables.devices.find(channel.device_obj) is None:
            yield Finding(13, f"relid {channel.relid} names a device that is gone", relid=channel.relid)
    for line in tables.damage():
        yield Finding(13, line)


def _named_channels(view: LiveView) -> Iterator[tuple[str, int, int]]:
    """Who names a channel, of which relid, by which handle."""
    tables = view.tables
    assert tables is not None
    for channel in tables.channels.live():
        # The list of a primary that the host took back first is gone, and with it whoever would walk it.
        if channel.primary_channel and not channel.rescind.load():
            yield f"sub-channel {channel.relid}", channel.relid, channel.primary_channel
    for device in tables.devices.live():
        yield f"device {device.index}", 0, device.channel
    for one in tables.net_channels.live():
        yield f"the poll record {one.index}", 0, one.channel
    for work in view.work():
        if work.item.function == Works.VMBUS_ADD_CHANNEL_WORK and not work.worker:
            yield "add_channel_work", 0, work.item.arguments[0]


# -- era seed -------------------------------------------------------------------------------------------


def lists_are_whole(scene: Scene) -> Iterator[Finding]:
    """INV-25: era `seed` has each channel on one CPU's list, that of its target, and walks along it end."""
    view = scene.view
    tables = view.tables
    if tables is None or not _has_lists(view) or scene.parked:
        return
    lists: dict[int, list[int]] = {}
    for cpu in tables.cpus.live():
        walked = list(islice(tables.chan_list(cpu), tables.channels.capacity + 1))
        if len(walked) > tables.channels.capacity:
            yield Finding(25, f"a walk along the chan_list of CPU {cpu.index} does not end")
            walked = walked[: tables.channels.in_use]
        for handle in dict.fromkeys(channel.handle for channel in walked):
            lists.setdefault(handle, []).append(cpu.index)
    for channel in _enlisted(view):
        cpus, target = lists.get(channel.handle, []), channel.target_cpu.load()
        if cpus != [target]:
            where = ", ".join(map(str, cpus)) or "none"
            text = f"relid {channel.relid} has CPU {target} as its target, and is on the chan_list of CPU {where}"
            yield Finding(25, text, relid=channel.relid)


def _has_lists(view: LiveView) -> bool:
    """Whether this guest has a list for each CPU: of its era, or because it is wrong on purpose."""
    return view.era.percpu_lists or not Fix.of(view.machine.config).global_relid_map


def _enlisted(view: LiveView) -> Iterator[Channel]:
    """Channels that are to be on a list: offered and handled, and not rescinded."""
    assert view.tables is not None
    published = view.tables.relids.published()
    for channel in view.tables.channels.live():
        handled = channel.state.load() != ChannelState.OFFER_STATE
        if handled and channel.relid in published and not channel.rescind_ref.load():
            yield channel
