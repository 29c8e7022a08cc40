"""The netlike driver polls: interrupts mask, polls have a budget, and no order of unmask and arrival loses a packet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from emu.ring import Packet
from emu.task_board import Program, TaskRow, TaskState
from emu.wire.device_classes import BY_NAME, NETLIKE
from emu.wire.messages import MessageType
from emu.wire.netlike_protocol import pack_frame
from guestproc.drivers import netlike
from guestproc.kernel.layout import CallbackMode, Channel, ChannelState, NetChannel
from guestproc.kernel.napi import SCHED, WEIGHT
from guestproc.net_check import net_check
from guestproc.vmbus.device import vmbus_driver_unregister
from guestproc.vmbus.packets import vmbus_drain
from hostproc.devices.netlike import Netlike
from tests.guestproc.world import World
from tests.hostproc.devices.ring_bench import OpenChannel

T = MessageType
RELID = 9
DRIVER = netlike.NetlikeDriver()


@pytest.fixture(params=["current", "seed"])
def era(request: pytest.FixtureRequest) -> str:
    """What is claimed here holds in both kernels."""
    name: str = request.param
    return name


@pytest.fixture
def channel(booted: World) -> Channel:
    """The open primary of a netlike device that has no sub-channels, relid 9."""
    booted.machine.config["device"] = [
        {"class": "netlike", "instance": "00000000-0000-0000-0000-000000000009", "subchannels": 0, "ring_pages": 40}
    ]
    booted.host.device(RELID, class_id=NETLIKE.guid)
    booted.settle()
    channel = booted.channel(RELID)
    assert channel.state.load() == ChannelState.OPENED_STATE
    return channel


def record(world: World) -> NetChannel:
    """The one NetChannel."""
    (nvchan,) = world.tables.net_channels.live()
    return nvchan


def frames(first: int, count: int) -> list[bytes]:
    """Frames of consecutive sequences."""
    return [pack_frame(first + n, bytes(60)) for n in range(count)]


def masked(world: World) -> int:
    """The interrupt mask of the ring to the guest, as the host sees it."""
    producer = world.host.channels[RELID].producer
    assert producer is not None
    return producer.words.load_mask()


def events(world: World) -> list[str]:
    """What happened to the ring and to the poll, in order."""
    return [name for name in world.event_names() if name in ("mask", "unmask", "tasklet_run", "tasklet_sched")]


def test_the_callback_runs_in_the_isr(booted: World, channel: Channel) -> None:
    """It masks and schedules; the poll reads in the softirq, and unmasks: HV_CALL_ISR, then NAPI."""
    booted.events.clear()
    booted.host.write(RELID, *frames(0, 3))
    booted.settle()

    assert channel.callback_mode == CallbackMode.ISR
    assert events(booted) == ["mask", "tasklet_sched", "tasklet_run", "unmask"]
    contexts = {event.name: event.context.name for event in booted.events if event.name in ("mask", "tasklet_run")}
    assert contexts == {"mask": "ISR", "tasklet_run": "TASKLET"}
    nvchan = record(booted)
    assert (nvchan.rx_packets, nvchan.rx_bytes, nvchan.rx_gaps, nvchan.rx_checksum_errors) == (3, 180, 0, 0)
    assert (nvchan.polls, nvchan.full_polls, nvchan.repolls, masked(booted)) == (1, 0, 0, 0)
    assert channel.interrupts == 1


def test_a_used_up_budget_polls_on_without_unmasking(booted: World, channel: Channel) -> None:
    """150 packets and a budget of 64: two full polls and the rest; one interrupt, one unmask."""
    booted.events.clear()
    booted.host.write(RELID, *frames(0, 150))
    booted.settle()

    nvchan = record(booted)
    assert (nvchan.rx_packets, nvchan.polls, nvchan.full_polls) == (150, 3, 2)
    assert events(booted).count("unmask") == events(booted).count("mask") == channel.interrupts == 1


def test_exactly_a_budget_is_a_full_poll(booted: World, channel: Channel) -> None:
    """Whether there is more, only the next poll can tell."""
    booted.host.write(RELID, *frames(0, WEIGHT))
    booted.settle()

    assert (record(booted).polls, record(booted).full_polls, masked(booted)) == (2, 1, 0)


@pytest.mark.parametrize("times", [1, 3])
def test_bytes_between_the_last_look_and_the_unmask(
    booted: World, channel: Channel, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """They come to a masked ring, so without an interrupt; the look behind the unmask finds them, and it polls on."""
    left = times
    written = 1

    def drain_then_arrive(*arguments: Any) -> list[Packet]:
        nonlocal left, written
        packets = vmbus_drain(*arguments)
        if left:
            left -= 1
            booted.host.write(RELID, *frames(written, 2))
            written += 2
        return packets

    monkeypatch.setattr(netlike, "vmbus_drain", drain_then_arrive)
    booted.events.clear()
    booted.host.write(RELID, *frames(0, 1))
    booted.settle()

    nvchan = record(booted)
    assert (nvchan.rx_packets, nvchan.rx_gaps, nvchan.repolls) == (1 + 2 * times, 0, times)
    assert channel.interrupts == 1
    assert events(booted) == [
        *["mask", "tasklet_sched", "tasklet_run"],
        *["unmask", "mask", "tasklet_run"] * times,
        "unmask",
    ]


def test_an_interrupt_amid_the_poll_is_remembered(
    booted: World, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that signals a masked ring: the callback finds the poll owned, and it polls once more by that mark."""
    rude = True

    def drain_then_signal(*arguments: Any) -> list[Packet]:
        nonlocal rude
        packets = vmbus_drain(*arguments)
        if rude:
            rude = False
            booted.host.write(RELID, *frames(1, 1))
            booted.host.signal(RELID)
            booted.cpus[channel.target_cpu.load()].take_interrupts()
        return packets

    monkeypatch.setattr(netlike, "vmbus_drain", drain_then_signal)
    booted.host.write(RELID, *frames(0, 1))
    booted.settle()

    nvchan = record(booted)
    assert (nvchan.rx_packets, nvchan.polls, nvchan.repolls, masked(booted)) == (2, 2, 0, 0)
    assert channel.interrupts == 2


def test_what_is_wrong_with_frames_is_counted(booted: World, channel: Channel) -> None:
    """A gap, a wrong checksum; and what is no frame is refused."""
    broken = bytearray(pack_frame(5, bytes(60)))
    broken[-1] ^= 1
    booted.host.write(RELID, *frames(0, 1), *frames(4, 1), bytes(broken), b"nonsense", b"\x6b\0\0\0\0\0\0\0")
    booted.settle()

    nvchan = record(booted)
    assert (nvchan.rx_packets, nvchan.rx_gaps, nvchan.rx_checksum_errors) == (3, 1, 1)
    assert booted.refused() == {"netlike-packet": 2}


def test_a_ring_that_makes_no_sense_is_read_no_more(booted: World, channel: Channel) -> None:
    """The callback goes, the poll completes, the ring stays masked, and the device can still be removed."""
    producer = booted.host.channels[RELID].producer
    assert producer is not None
    producer.words.store_write(12)
    booted.host.signal(RELID)
    booted.settle()

    assert booted.refused() == {"ring-index": 1}
    assert (channel.onchannel_callback, record(booted).napi.scheduled) == (0, False)
    booted.host.rescind(RELID)
    booted.settle()
    assert booted.host.released == [RELID]
    assert booted.shut_down() == {}


def test_remove_owns_the_poll_before_it_closes(booted: World, channel: Channel) -> None:
    """No CLOSECHANNEL goes out while a poll is under way: here one that another processor's remove waits for."""
    nvchan = record(booted)
    target = channel.target_cpu.load()
    assert nvchan.napi.word.cas(0, SCHED) == 0  # a poll is due, whose processor is busy
    removed = booted.start(lambda current: vmbus_driver_unregister(current, DRIVER), cpu=1 - target)
    booted.settle()
    assert not removed.ended() and T.CLOSECHANNEL not in booted.host.types()

    queue = booted.currents[target].tasklets
    assert queue is not None
    booted.start(lambda current: queue.schedule(nvchan.napi.tasklet), cpu=target)
    booted.settle()

    assert removed.ended()
    assert T.CLOSECHANNEL in booted.host.types()
    assert booted.tables.net_channels.in_use == 0
    assert channel.callback_mode == CallbackMode.BATCHED
    assert booted.shut_down() == {}


def test_a_nic_with_an_echo_back_end_is_not_its_device(booted: World) -> None:
    """The match goes by the class that the offer says: class `nic` stays with hv_echo."""
    booted.host.device(RELID, class_id=BY_NAME["nic"].guid)
    booted.settle()

    (device,) = booted.tables.devices.live()
    assert device.driver == 1
    assert booted.tables.net_channels.in_use == 0


# -- NET_CHECK --------------------------------------------------------------------------------------------


def real_device(world: World) -> Callable[[Packet], list[Packet]]:
    """The host's own back end, served packet by packet behind the scripted host."""
    bench = OpenChannel(Netlike(), to_host_pages=64, to_guest_pages=64)

    def answer(packet: Packet) -> list[Packet]:
        kind, flags, trans_id, payload = packet
        bench.send(payload, trans_id=trans_id, flags=flags, packet_type=kind)
        bench.run()
        return [(kind, flags, trans_id, payload) for kind, flags, trans_id, payload in bench.received()]

    return answer


def check(world: World, channel: Channel, count: int = 40) -> tuple[int, int]:
    """Run the program on the channel's CPU; packets and errors."""
    cpu = channel.target_cpu.load()
    row = TaskRow(0, TaskState.RUNNING, Program.NET_CHECK, cpu, 0, count, 0, 0, 0, b"", "")
    tally = world.start(lambda current: net_check(current, world.cpus[cpu], row), cpu=cpu)
    world.settle()
    world.pass_time(0 if tally.ended() else 11)
    return tally.result.packets, tally.result.errors


def test_net_check_finds_nothing_wrong(booted: World, channel: Channel) -> None:
    """Twice in a row: frames both ways, and the counts of both ends agree."""
    booted.host.on_packet[RELID] = real_device(booted)

    assert check(booted, channel) == (80, 0)
    assert check(booted, channel) == (80, 0)
    nvchan = record(booted)
    assert (nvchan.rx_packets, nvchan.tx_next, nvchan.rx_gaps) == (80, 80, 0)


def test_net_check_sees_a_frame_that_is_lost(booted: World, channel: Channel) -> None:
    """On its way to the guest: a gap, and a wait that ends."""
    answer, dropped = real_device(booted), []

    def lossy(packet: Packet) -> list[Packet]:
        back = answer(packet)
        if len(back) > 10:
            dropped.append(back.pop(5))
        return back

    booted.host.on_packet[RELID] = lossy

    assert check(booted, channel) == (0, 1)
    assert len(dropped) == 1 and record(booted).rx_gaps == 1


def test_net_check_ends_when_its_channel_is_taken_away(booted: World, channel: Channel) -> None:
    """That is nothing wrong; and the remover does not wait for long."""
    booted.host.on_packet[RELID] = lambda packet: []
    cpu = channel.target_cpu.load()
    row = TaskRow(0, TaskState.RUNNING, Program.NET_CHECK, cpu, 0, 5, 0, 0, 0, b"", "")
    tally = booted.start(lambda current: net_check(current, booted.cpus[cpu], row), cpu=cpu)
    booted.settle()
    booted.host.rescind(RELID)
    booted.pass_time(0.1)

    assert (tally.result.packets, tally.result.errors) == (0, 0)
    assert booted.host.released == [RELID]
