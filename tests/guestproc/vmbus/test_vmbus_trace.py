"""The kernel's tracepoints, in the functions that they are named after."""

from __future__ import annotations

import errno
from uuid import UUID

import pytest

from emu.tracing import EVENTS, HYPERV_EVENTS
from emu.wire.device_classes import hv_sock_guid
from emu.wire.messages import RescindChannelOffer, TlConnectRequest
from emu.wire.versions import VERSION_WIN8_1
from guestproc.user import run_call
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


def test_connect_of_a_socket_is_posted_and_told(booted: World) -> None:
    """Both GUIDs as the host sees them, the endpoint first; nobody waits for an answer."""
    endpoint, service = hv_sock_guid(0xC0000001), hv_sock_guid(5000)
    booted.settle()
    booted.events.clear()

    asked = {"endpoint": str(endpoint), "service": str(service)}
    assert booted.call(lambda current: run_call(current, "connect", asked)) == asked

    assert booted.host.posted[-1] == TlConnectRequest(endpoint, service)
    assert [printed(event) for event in booted.events if event.name in NAMES] == [
        "vmbus_send_tl_connect_request: sending guest_endpoint_id c0000001-facb-11e6-bd58-64006a7986d3, "
        "host_service_id 00001388-facb-11e6-bd58-64006a7986d3, ret 0"
    ]


@pytest.mark.parametrize("service", [str(UUID(int=5000)), "5000"])
def test_connect_to_what_is_no_port_is_refused(booted: World, service: str) -> None:
    """-EINVAL, before anything is posted."""
    said = len(booted.host.posted)
    asked = {"endpoint": str(hv_sock_guid(1)), "service": service}

    answer = booted.call(lambda current: run_call(current, "connect", asked))

    assert answer["errno"] == errno.EINVAL and len(booted.host.posted) == said


def test_connect_needs_a_host_that_knows_sockets(booted: World) -> None:
    """-ENODEV below 4.0, as `hvs_init` says."""
    booted.tables.connection.vmbus_proto_version = VERSION_WIN8_1
    asked = {"endpoint": str(hv_sock_guid(1)), "service": str(hv_sock_guid(2))}

    answer = booted.call(lambda current: run_call(current, "connect", asked))

    assert answer["errno"] == errno.ENODEV and "from VMBus 4.0 on, this is 3.0" in answer["error"]
