"""The seed article's path, one step after the other: from an interrupt to an open channel.

host posts → slot of SINT 2 → vector 0xF3 → `hyperv_vector_handler` → `vmbus_isr` (events, then the slot) →
tasklet `vmbus_on_msg_dpc` → work record → `vmbus_signal_eom` → `vmbus_onmessage_work` → `vmbus_onmessage` →
`vmbus_onoffer` → `vmbus_process_offer` → `vmbus_add_channel_work` → match → probe → open.
"""

from __future__ import annotations

import pytest

from emu.tracing import Context as TraceContext
from emu.wire.device_classes import ECHO
from emu.wire.messages import GpadlHeader, MessageType, OpenChannel
from emu.wire.synic import (
    HVMSG_CHANNEL_MESSAGE,
    HVMSG_NONE,
    HYPERVISOR_CALLBACK_VECTOR,
    VMBUS_MESSAGE_SINT,
)
from guestproc.drivers.echo import EchoDriver
from guestproc.kernel.layout import ChannelState
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.devices import DeviceState
from guestproc.protocol.numbers import Handlers, Tasklets, Works
from tests.guestproc.world import Event, World

pytestmark = pytest.mark.parametrize("era", ["current", "seed"])
ISR, TASKLET, QUEUE = TraceContext.ISR, TraceContext.TASKLET, TraceContext.QUEUE


def only(world: World, name: str) -> Event:
    """The one event of that name."""
    (event,) = (event for event in world.events if event.name == name)
    return event


def test_device_is_discovered_the_way_the_article_tells_it(booted: World) -> None:
    """One offer, followed from the host's post to the open channel, an actor's turn at a time."""
    world, host = booted, booted.host
    tables, connection = world.tables, world.tables.connection
    cpu0 = tables.cpus.at(0)
    slot = cpu0.synic_message_page_gpa + VMBUS_MESSAGE_SINT * 256
    queues = tables.work_queues
    world.settle()
    interrupts = cpu0.irq_hv_callback_count

    # The hypervisor puts the message into the empty slot, body first, and requests vector 0xF3 ...
    assert connection.vmbus_handler.load() == Handlers.VMBUS_ISR  # hv_setup_vmbus_irq
    host.device(9)
    host.step()
    assert tables.ram.atomics.load_u32(slot) == HVMSG_CHANNEL_MESSAGE
    assert world.cpus[0].lapic.highest_request() == HYPERVISOR_CALLBACK_VECTOR

    # ... hyperv_vector_handler counts it and calls vmbus_isr, which schedules msg_dpc; on the way out of the
    # interrupt vmbus_on_msg_dpc makes a work record of the message, counts the offer, and empties the slot.
    world.turn("vcpu0")
    assert cpu0.irq_hv_callback_count == interrupts + 1
    assert connection.offer_in_progress.load() == 1
    assert queues.length(QueueNumber.WORK) == 1
    assert tables.ram.atomics.load_u32(slot) == HVMSG_NONE
    assert world.cpus[0].lapic.in_service == ()  # ended, as the hint asks for

    # The worker: vmbus_onmessage_work, vmbus_onmessage, vmbus_onoffer, vmbus_process_offer. Now it is findable,
    # and no offer is in progress: what may wait for the host is on a queue of its own.
    world.turn("WORK")
    channel = world.channel(9)
    assert channel.state.load() == ChannelState.OFFER_STATE
    assert list(tables.chn_list) == [channel]
    assert connection.offer_in_progress.load() == 0
    assert queues.length(QueueNumber.PRI_CHAN) == 1

    # vmbus_add_channel_work: ready to be opened, device created and registered, matched by class, and the
    # driver's probe is in vmbus_open, where it waits for the pages of its rings to be mapped.
    world.turn("PRI_CHAN")
    if world.era.percpu_lists:
        # The article's kernel: init_vp_index, then smp_call_function_single to the channel's processor, which puts
        # the channel on its own list; the worker waits.
        assert (channel.state.load(), list(tables.chan_list(cpu0))) == (ChannelState.OFFER_STATE, [])
        world.turn("vcpu0")
        assert list(tables.chan_list(cpu0)) == [channel]
        world.turn("PRI_CHAN")
    device = tables.devices.from_handle(channel.device_obj)
    assert device.dev_type == ECHO.guid.bytes_le
    assert device.state.load() & DeviceState.REGISTERED
    assert (channel.state.load(), channel.probe_done.load()) == (ChannelState.OPENING_STATE, 0)
    host.step()
    host.step()
    assert host.types()[-2:] == [MessageType.GPADL_HEADER, MessageType.GPADL_BODY]

    # GPADL_CREATED is handled in the tasklet, past all queues; then OPENCHANNEL, and its result the same way.
    world.turn("vcpu0")
    world.turn("PRI_CHAN")
    host.step()
    assert host.types()[-1] == MessageType.OPENCHANNEL
    assert channel.state.load() == ChannelState.OPENING_STATE
    world.turn("vcpu0")
    world.turn("PRI_CHAN")
    assert (channel.state.load(), channel.probe_done.load()) == (ChannelState.OPENED_STATE, 1)
    assert device.driver == EchoDriver.number


def test_each_step_of_an_offer(booted: World) -> None:
    """The same path, step by step in one list: who did what, in which context and in which order."""
    world = booted
    world.settle()
    world.events.clear()

    world.host.device(9)
    world.settle()

    told = [
        (event.name, event.actor, event.context)
        for event in world.events
        if event.name
        in ("tasklet_sched", "slot_read", "work_queue", "slot_free", "work_run", "offer", "gpadl_add", "open", "probe")
    ]
    offer_part = told[: told.index(("slot_free", "vcpu0", TASKLET)) + 1]
    assert offer_part == [
        ("tasklet_sched", "vcpu0", ISR),  # vmbus_isr saw the slot
        ("slot_read", "vcpu0", TASKLET),  # vmbus_on_msg_dpc: private copy
        ("work_queue", "vcpu0", TASKLET),  # blocking: a work record, offer_in_progress + 1
        ("slot_free", "vcpu0", TASKLET),  # vmbus_signal_eom
    ]
    worker_part = [step for step in told if step[2] is QUEUE]
    assert worker_part == [
        ("work_run", "WORK", QUEUE),  # vmbus_onmessage_work, vmbus_onmessage
        ("offer", "WORK", QUEUE),  # vmbus_onoffer
        ("work_queue", "WORK", QUEUE),  # vmbus_process_offer: a primary, so hv_pri_chan
        ("work_run", "PRI_CHAN", QUEUE),  # vmbus_add_channel_work
        ("gpadl_add", "PRI_CHAN", QUEUE),  # device created, registered, matched, probed: vmbus_open
        ("open", "PRI_CHAN", QUEUE),
        ("probe", "PRI_CHAN", QUEUE),
    ]
    queued = [event.arguments for event in world.events if event.name == "work_queue"]
    serial = next(event.arguments[3] for event in world.events if event.name == "slot_read")
    assert queued == [
        (QueueNumber.WORK, Works.VMBUS_ONMESSAGE_WORK, serial),
        (QueueNumber.PRI_CHAN, Works.VMBUS_ADD_CHANNEL_WORK, serial),
    ]
    assert only(world, "probe").arguments[:3] == (9, EchoDriver.number, 0)


def test_what_is_there_afterwards(booted: World) -> None:
    """The channel, its device, the driver's ring and the host's end of it; the offer is not in progress."""
    world = booted
    world.host.device(9, instance=77)
    world.settle()

    channel = world.channel(9)
    device = world.tables.devices.from_handle(channel.device_obj)
    assert channel.state.load() == ChannelState.OPENED_STATE
    assert (channel.probe_done.load(), channel.offer_serial > 0) == (1, True)
    assert world.tables.connection.offer_in_progress.load() == 0
    assert (device.driver, device.channel) == (EchoDriver.number, channel.handle)
    assert device.state.load() & (DeviceState.REGISTERED | DeviceState.BOUND) == 3
    assert device.dev_type == ECHO.guid.bytes_le
    header, *_, opened = world.host.posted[2:]
    assert isinstance(header, GpadlHeader)
    assert isinstance(opened, OpenChannel)
    assert (opened.child_relid, opened.openid, opened.ringbuffer_gpadlhandle) == (9, 9, header.gpadl)
    assert opened.target_vp == world.tables.cpus.at(channel.target_cpu.load()).vp_index
    assert opened.downstream_ringbuffer_pageoffset == 16


def test_slot_is_given_back_by_the_end_of_message(booted: World) -> None:
    """With more waiting for the slot, EOM is written behind the clear, and the next message comes at once."""
    world = booted
    world.events.clear()
    for relid in range(1, 6):
        world.host.device(relid)
    world.settle()

    cpu0 = world.tables.cpus.at(0)
    slot = cpu0.synic_message_page_gpa + VMBUS_MESSAGE_SINT * 256
    assert world.tables.ram.atomics.load_u32(slot) == HVMSG_NONE
    names = [event.name for event in world.events if event.name in ("slot_free", "eom")]
    pending = [event.arguments[3] for event in world.events if event.name == "slot_free"]
    assert pending[:4] == [1, 1, 1, 1]
    assert names[:4] == ["slot_free", "eom", "slot_free", "eom"]
    assert names.count("eom") == sum(pending)
    assert [world.channel(relid).state.load() for relid in range(1, 6)] == [ChannelState.OPENED_STATE] * 5


def test_events_are_looked_at_before_the_message(booted: World) -> None:
    """One interrupt, both a flag and a message: the flag is cleared first, as Windows does it."""
    world = booted
    world.host.device(9)
    world.settle()
    channel = world.channel(9)
    assert channel.target_cpu.load() == 0
    world.events.clear()

    world.host.write(9, b"event")
    world.host.device(10)
    world.settle()

    names = [event.name for event in world.events if event.name in ("isr_enter", "flag_clear", "tasklet_sched")]
    tasklets = [event.arguments[0] for event in world.events if event.name == "tasklet_sched"]
    assert names[:4] == ["isr_enter", "flag_clear", "tasklet_sched", "tasklet_sched"]
    assert tasklets[:2] == [Tasklets.VMBUS_ON_EVENT, Tasklets.VMBUS_ON_MSG_DPC]
