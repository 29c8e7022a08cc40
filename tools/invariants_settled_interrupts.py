"""Rules over slots, event flags, tasklets and the processors that should take them, in a settled machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emu.wire.synic import HV_SYNIC_SINT_MASKED, VMBUS_MESSAGE_SINT, sint_vector
from guestproc.kernel.layout import CallbackMode, Channel, ChannelState
from guestproc.kernel.napi import Napi
from guestproc.kernel.records import INDEX_MASK
from guestproc.kernel.tasklet import CPU_MASK, CPU_SHIFT, Tasklet
from guestproc.view import INBOUND
from tools.invariants import Finding
from tools.invariants_settled import Scene
from tools.live_view import LiveView, SlotMessage
from tools.nouns import counted

NO_INTERRUPTS: Final = 0xFFFFFFFF
"""`target_vp` of a channel that wants none."""
OPENED: Final = int(ChannelState.OPENED_STATE)


# -- slots ----------------------------------------------------------------------------------------------


def pending_is_served(scene: Scene) -> Iterator[Finding]:
    """INV-09: an empty slot with its pending bit set lasts only until the guest's EOM."""
    for vp, position, slot in _slots(scene):
        if slot.pending and not slot.message_type:
            waiting = scene.view.synic(position).waiting[slot.sint]
            told = counted(waiting, "message waits", "messages wait")
            text = f"slot {slot.sint} of VP {vp} is empty with its pending bit set, and {told} for it"
            yield Finding(9, text, actors=_taker(scene.view, position))


def full_slot_is_read(scene: Scene) -> Iterator[Finding]:
    """INV-10: a message in a slot has its tasklet scheduled or running, or an interrupt on its way."""
    for vp, position, slot in _slots(scene):
        if slot.message_type and not _message_is_seen(scene, position, slot):
            text = f"{slot.text} lies in slot {slot.sint} of VP {vp}, its tasklet is idle, and no interrupt is pending"
            yield Finding(10, text, actors=_taker(scene.view, position))


def _slots(scene: Scene) -> Iterator[tuple[int, int, SlotMessage]]:
    """Slots with something in them, but for processors that somebody holds: VP index, position, slot."""
    view = scene.view
    for position in range(view.machine.vp_count):
        if view.actor_of_cpu(view.cpu_of(position)) not in scene.parked:
            for slot in view.slots(position):
                yield view.machine.vp_index(position), position, slot


def _message_is_seen(scene: Scene, position: int, slot: SlotMessage) -> bool:
    tables = scene.view.tables
    if tables is None or interrupt_pending(scene.view, position, slot.sint):
        return True
    msg_dpc: Tasklet = tables.cpus.at(scene.view.cpu_of(position)).msg_dpc
    return slot.sint == VMBUS_MESSAGE_SINT and (msg_dpc.scheduled or msg_dpc.running)


def interrupt_pending(view: LiveView, position: int, sint: int) -> bool:
    """Whether the vector of a SINT is requested or in service."""
    vector = sint_vector(view.synic(position).sint[sint])
    return bool((view.requested(position) | view.in_service(position)) >> vector & 1)


def _taker(view: LiveView, position: int) -> tuple[str, ...]:
    return (f"vcpu{view.cpu_of(position)}",)


# -- event flags ----------------------------------------------------------------------------------------


def flags_are_taken(scene: Scene) -> Iterator[Finding]:
    """INV-16: a flag that is set has an interrupt that will clear it."""
    for position, relid in set_flags(scene):
        vp = scene.view.machine.vp_index(position)
        text = f"event flag {relid} of VP {vp} is set, and no interrupt is on its way that would take it"
        yield Finding(16, text, relid=relid, actors=_taker(scene.view, position))


def set_flags(scene: Scene) -> Iterator[tuple[int, int]]:
    """Position and number of each flag that is set with no interrupt pending for it."""
    view = scene.view
    for position in range(view.machine.vp_count):
        if view.actor_of_cpu(view.cpu_of(position)) in scene.parked:
            continue
        flags = view.flags(position, VMBUS_MESSAGE_SINT)
        if flags and not interrupt_pending(view, position, VMBUS_MESSAGE_SINT):
            yield from ((position, flag) for flag in flags)


# -- consumers ------------------------------------------------------------------------------------------


def open_channels(scene: Scene) -> list[Channel]:
    """The guest's channels that are open, not rescinded, and have a callback."""
    return [
        one
        for one in scene.view.channels()
        if one.state.load() == OPENED and not one.rescind.load() and one.onchannel_callback
    ]


def napi_of(view: LiveView, channel: Channel) -> Napi | None:
    """What polls a channel, if it is polled: then that record is its callback's context."""
    assert view.tables is not None
    context = channel.channel_callback_context
    index = (context & INDEX_MASK) - 1
    found = view.tables.net_channels.find(context) if 0 <= index < view.tables.net_channels.capacity else None
    return found.napi if found is not None and found.channel == channel.handle else None


def consumer(view: LiveView, channel: Channel) -> str | None:
    """What a channel's consumer does: "idle" or "due"; None where that is a driver's own affair."""
    mode = channel.callback_mode
    if mode == CallbackMode.ISR:
        napi = napi_of(view, channel)
        return None if napi is None else _due(napi.scheduled or napi.tasklet.scheduled or napi.tasklet.running)
    tasklet = channel.callback_event
    return _due(tasklet.scheduled or tasklet.running)


def _due(is_due: bool) -> str:
    return "due" if is_due else "idle"


def masked_is_served(scene: Scene) -> Iterator[Finding]:
    """INV-17: a reader that asked for no interrupts is scheduled or running."""
    view = scene.view
    for channel in open_channels(scene):
        # In DIRECT mode nobody but a program masks, and it may leave it so.
        if channel.callback_mode == CallbackMode.DIRECT or consumer(view, channel) != "idle":
            continue
        assert view.guest is not None
        ring = view.guest.ring(channel, INBOUND)
        if ring is not None and ring.interrupt_mask:
            text = f"the inbound ring of relid {channel.relid} is masked, and its consumer is neither due nor running"
            yield Finding(17, text, relid=channel.relid, actors=_owner(view, channel))


def _owner(view: LiveView, channel: Channel) -> tuple[str, ...]:
    return (f"vcpu{channel.target_cpu.load()}",)


# -- tasklets -------------------------------------------------------------------------------------------


def tasklets_run(scene: Scene) -> Iterator[Finding]:
    """INV-18: no tasklet is left disabled, and one that is scheduled and enabled has run."""
    if scene.parked:
        # Who is held may stand between a disable and its enable.
        return
    for name, relid, tasklet in _tasklets(scene.view):
        word = tasklet.word.load()
        cpu = word >> CPU_SHIFT & CPU_MASK
        if tasklet.disable_count:
            pending = f", pending on CPU {cpu}" if tasklet.scheduled else ""
            text = f"the tasklet of {name} is left disabled {counted(tasklet.disable_count, 'time')}{pending}"
            yield Finding(18, text, relid=relid)
        elif tasklet.scheduled and not tasklet.running:
            text = f"the tasklet of {name} is scheduled on CPU {cpu}, enabled, and does not run"
            yield Finding(18, text, relid=relid, actors=(f"vcpu{cpu}",))


def _tasklets(view: LiveView) -> Iterator[tuple[str, int, Tasklet]]:
    tables = view.tables
    if tables is None:
        return
    for cpu in tables.cpus.live():
        yield f"CPU {cpu.index}'s messages", 0, cpu.msg_dpc
        yield f"CPU {cpu.index}'s events", 0, cpu.event_dpc
    for channel in tables.channels.live():
        yield f"relid {channel.relid}", channel.relid, channel.callback_event
    for one in tables.net_channels.live():
        channel_or_none = tables.channels.find(one.channel)
        relid = 0 if channel_or_none is None else channel_or_none.relid
        yield f"relid {relid}'s poll", relid, one.napi.tasklet


# -- targets --------------------------------------------------------------------------------------------


def targets_are_online(scene: Scene) -> Iterator[Finding]:
    """INV-26: an open channel interrupts a CPU that is online, with its SynIC and SINT enabled, or none."""
    view = scene.view
    for channel in open_channels(scene):
        host = view.mirror.channel(channel.relid)
        if host is None or host.target_vp == NO_INTERRUPTS:
            continue
        wrong = _target_wrong(view, channel, host.target_vp)
        if wrong:
            yield Finding(26, f"relid {channel.relid}: {wrong}", relid=channel.relid, actors=_owner(view, channel))


def _target_wrong(view: LiveView, channel: Channel, host_vp: int) -> str:
    """What is wrong with the target of a channel, "" if nothing is."""
    assert view.tables is not None
    cpu = channel.target_cpu.load()
    position = view.machine.position_of_vp(host_vp)
    if cpu >= view.tables.layout.ncpus or not view.tables.cpus.at(cpu).online.load():
        return f"its target CPU {cpu} is not online"
    if position < 0:
        return f"the host interrupts VP {host_vp}, which there is not"
    if not view.synic_on(position) or view.synic(position).sint[VMBUS_MESSAGE_SINT] & HV_SYNIC_SINT_MASKED:
        return f"the host interrupts VP {host_vp}, whose SynIC or SINT{VMBUS_MESSAGE_SINT} is off"
    if view.cpu_of(position) != cpu:
        return f"the guest has it on CPU {cpu}, the host interrupts VP {host_vp}, which is CPU {view.cpu_of(position)}"
    return ""
