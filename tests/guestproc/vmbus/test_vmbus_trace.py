"""The kernel's tracepoints, in the functions that they are named after."""

from __future__ import annotations

from emu.tracing import EVENTS, HYPERV_EVENTS
from emu.wire.messages import RescindChannelOffer
from tests.guestproc.world import Event, World

NAMES = {spec.name for spec in HYPERV_EVENTS}


def printed(event: Event) -> str:
    """The line of a record in the kernel's words, without its numbers' noise."""
    spec = EVENTS[event.name]
    words = [argument & (1 << 64) - 1 for argument in event.arguments]
    return f"{event.name}: {spec.text(spec.unpack(words + [0] * (6 - len(words))))}"


def test_life_of_a_channel_leaves_the_kernels_tracepoints(booted: World) -> None:
    """An offer that is opened, and then taken back: each function says so, in the order of the kernel."""
    world = booted
    world.settle()
    world.events.clear()

    world.host.device(9)
    world.settle()
    gpadl = world.channel(9).ringbuffer_gpadlhandle
    offer, *lines = [printed(event) for event in world.events if event.name in NAMES][2:]

    assert offer.startswith("vmbus_onoffer: child_relid 0x9, monitorid 0xff, is_dedicated 1, connection_id 0x2009, ")
    assert lines == [
        f"vmbus_establish_gpadl_header: sending child_relid 0x9, gpadl {gpadl:#x}, "
        "range_buflen 264 rangecount 1, ret 0",
        f"vmbus_establish_gpadl_body: sending msgnumber 0, gpadl {gpadl:#x}, ret 0",
        "vmbus_on_msg_dpc: msgtype=10",
        f"vmbus_ongpadl_created: child_relid 0x9, gpadl {gpadl:#x}, creation_status 0",
        f"vmbus_open: sending child_relid 0x9, openid 9, gpadlhandle {gpadl:#x}, target_vp 0xb, offset 0x10, ret 0",
        "vmbus_on_msg_dpc: msgtype=6",
        "vmbus_onopen_result: child_relid 0x9, openid 9, status 0",
    ]

    world.events.clear()
    world.host.send(RescindChannelOffer(9))
    world.settle()

    assert [printed(event) for event in world.events if event.name in NAMES] == [
        "vmbus_on_msg_dpc: msgtype=2",
        "vmbus_on_message: msgtype=2",
        "vmbus_onoffer_rescind: child_relid 0x9",
        "vmbus_close_internal: sending child_relid 0x9, ret 0",
        "vmbus_release_relid: sending child_relid 0x9, ret 0",
    ]
