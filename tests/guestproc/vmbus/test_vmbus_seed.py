"""What the article's kernel does otherwise: old versions, channel lists by IPI, the shared interrupt, its queues."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator

import pytest

from emu.wire.messages import InitiateContact, MessageType
from emu.wire.synic import HV_SYNIC_SINT_AUTO_EOI, HV_X64_MSR_SINT0, VMBUS_MESSAGE_SINT
from emu.wire.versions import (
    VERSION_WIN7,
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10,
    VERSION_WS2008,
    version_text,
)
from guestproc.drivers.echo_inbox import INBOXES
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol.numbers import Ipis, Works
from guestproc.vcpu import CALL_FUNCTION_VECTOR
from guestproc.vmbus.chan_list import run_on_target_cpu
from guestproc.vmbus.chan_sched import sync_test_and_clear_bit
from guestproc.vmbus.channel_mgmt import vmbus_onmessage
from guestproc.vmbus.connection import vmbus_connect
from guestproc.vmbus.packets import vmbus_sendpacket
from guestproc.vmbus.vector import Gate
from tests.guestproc.world import World, new_world

OPENED = ChannelState.OPENED_STATE
SHARED = [VERSION_WS2008, VERSION_WIN7]


@pytest.fixture
def era() -> str:
    """The article's."""
    return "seed"


def booted_on(version: int, *, first_vp: int = 0) -> Iterator[World]:
    """A guest on a host of one version; VP 0 is CPU 1 of 2."""
    with new_world(era="seed", versions={version}, first_vp=first_vp) as world:
        world.boot()
        yield world


@pytest.fixture(params=SHARED, ids=version_text)
def shared(request: pytest.FixtureRequest) -> Iterator[World]:
    """On a host that has one interrupt for all channels, with an open echo channel, relid 9."""
    for world in booted_on(request.param):
        world.host.device(9)
        world.settle()
        INBOXES[world.channel(9).handle] = deque()
        yield world


def on_list(world: World, cpu: int) -> list[int]:
    """Relids on a CPU's chan_list."""
    return [channel.relid for channel in world.tables.chan_list(world.tables.cpus.at(cpu))]


def calls(world: World, cpu: int) -> int:
    """How many call-function interrupts a CPU took."""
    return sum(
        event.name == "isr_enter" and event.actor == f"vcpu{cpu}" and event.arguments == (CALL_FUNCTION_VECTOR,)
        for event in world.events
    )


def cleared(world: World) -> list[int]:
    """Flags (or bits of the interrupt page) that were taken."""
    return [event.arguments[1] for event in world.events if event.name == "flag_clear"]


def interrupt(world: World, cpu: int) -> None:
    """An interrupt for no reason of its own."""
    world.partition.request_interrupt(world.cpus[cpu].position, 0xF3)
    world.settle()


def packets(world: World, relid: int = 9) -> list[bytes]:
    """What the driver was given."""
    return [packet[3] for packet in INBOXES[world.channel(relid).handle]]


# -- versions -------------------------------------------------------------------------------------------


def test_versions_are_asked_for_as_that_kernel_did(world: World) -> None:
    """4.0, 3.0, 2.4, 1.1, 0.13, all on connection 1; the VP of the connect CPU from 3.0 on, 0 before; -EDOM."""
    world.host.versions = set()
    world.boot_bus()

    assert world.call(vmbus_connect) == -errno.EDOM

    asked = [message for message in world.host.posted if isinstance(message, InitiateContact)]
    vp = world.tables.cpus.at(0).vp_index
    assert [(one.vmbus_version_requested, one.target_vcpu) for one in asked] == [
        (VERSION_WIN10, vp),
        (VERSION_WIN8_1, vp),
        (VERSION_WIN8, 0),
        (VERSION_WIN7, 0),
        (VERSION_WS2008, 0),
    ]
    assert set(world.host.connections) == {1}
    assert all(one.interrupt_page for one in asked)


@pytest.mark.parametrize("version", [VERSION_WIN10, VERSION_WIN8_1, VERSION_WIN8, VERSION_WIN7, VERSION_WS2008])
def test_whole_life_on_a_host_of_each_version(version: int) -> None:
    """Messages go to VP 0 before 3.0, which here is CPU 1; UNLOAD is sent from 3.0 on; nothing is left."""
    for world in booted_on(version):
        world.events.clear()
        world.host.device(9)
        world.host.device(10)
        world.settle()
        assert [world.channel(relid).state.load() for relid in (9, 10)] == [OPENED, OPENED]
        taken = [event.actor for event in world.events if event.name == "slot_read"]
        assert set(taken) == {"vcpu0" if version >= VERSION_WIN8_1 else "vcpu1"}

        assert world.shut_down() == {}

        assert (MessageType.UNLOAD in world.host.types()) == (version >= VERSION_WIN8_1)
        assert sorted(world.host.released) == [9, 10]


# -- one interrupt, one doorbell ------------------------------------------------------------------------


def test_channels_of_an_old_host_go_to_vp_0(shared: World) -> None:
    """Whatever the device: before 2.4 only VP 0 is interrupted, so the channels are on its processor's list."""
    shared.host.device(10)
    shared.settle()

    assert (on_list(shared, 0), on_list(shared, 1)) == ([], [9, 10])


def test_packets_over_the_interrupt_page(shared: World) -> None:
    """There over the doorbell (shared in 0.13, with a bit that says whose), back by a bit and flag 0."""
    channel = shared.channel(9)
    old = shared.tables.connection.vmbus_proto_version == VERSION_WS2008
    assert (channel.sig_event, channel.is_dedicated_interrupt) == ((2, 0) if old else (0x2009, 1))
    shared.events.clear()

    shared.call(lambda current: vmbus_sendpacket(current, channel, b"there and back"))

    assert packets(shared) == [b"there and back" + bytes(2)]
    assert cleared(shared) == [9]
    assert shared.host.memory.read(shared.tables.connection.int_page_gpa, 4096) == bytes(4096)


def test_bits_are_looked_at_only_when_flag_0_was_set(shared: World) -> None:
    """A message's interrupt leaves the page alone; with flag 0 set the bit is taken; an empty page is harmless."""
    shared.host.write(9, b"12345678", signal=False)
    shared.host.set_page_bit(9)
    shared.events.clear()
    interrupt(shared, 1)
    assert (cleared(shared), packets(shared)) == ([], [])

    event = shared.host.channels[9].event
    assert event is not None
    event.signal()
    shared.settle()
    assert (cleared(shared), packets(shared)) == ([9], [b"12345678"])
    event.signal()
    shared.settle()

    assert cleared(shared) == [9]
    hv_cpu = shared.currents[1].percpu
    assert hv_cpu is not None
    assert not sync_test_and_clear_bit(0, hv_cpu.event_words)


def test_256_bits_of_the_page_are_looked_at(shared: World) -> None:
    """As many as that kernel has channels; bit 0 is nobody's, others of nobody are cleared."""
    for bit in (0, 8, 255, 256, 2047):
        shared.host.set_page_bit(bit)
    shared.events.clear()
    event = shared.host.channels[9].event
    assert event is not None
    event.signal()
    shared.settle()

    assert cleared(shared) == [0, 8, 255]
    assert shared.shut_down() == {}


def test_a_late_interrupt_finds_no_page(shared: World) -> None:
    """Flag 0 is set when the connection and its pages are gone already: nothing to look at."""
    hv_cpu = shared.currents[1].percpu
    assert hv_cpu is not None
    shared.tables.connection.int_page_gpa = 0

    assert hv_cpu.channel_flags() is None
    hv_cpu.event_words[0].fetch_or(1)
    interrupt(shared, 1)


def test_newer_hosts_have_a_flag_for_each_channel() -> None:
    """From 2.4 on flag 0 means nothing and is only cleared, and a channel's own flag needs no other."""
    for world in booted_on(VERSION_WIN8):
        world.host.device(9)
        world.settle()
        INBOXES[world.channel(9).handle] = deque()
        cpu = world.channel(9).target_cpu.load()
        hv_cpu = world.currents[cpu].percpu
        assert hv_cpu is not None
        world.events.clear()
        hv_cpu.event_words[0].fetch_or(1)
        world.host.write(9, b"12345678")
        world.settle()

        assert (cleared(world), packets(world)) == ([0, 9], [b"12345678"])


@pytest.mark.parametrize("era", ["current", "seed"])
def test_no_event_page_no_look(booted: World) -> None:
    """A processor whose SynIC is down counts the interrupt, ends it, and looks at nothing."""
    booted.currents[1].percpu = None
    before = booted.tables.cpus.at(1).irq_hv_callback_count
    booted.events.clear()

    interrupt(booted, 1)

    assert booted.tables.cpus.at(1).irq_hv_callback_count == before + 1
    assert [name for name in booted.event_names() if not name.startswith("isr")] == []
    assert booted.cpus[1].lapic.in_service == ()


# -- lists of channels ----------------------------------------------------------------------------------


def test_worker_has_the_target_cpu_put_a_channel_on_its_list(booted: World) -> None:
    """Always by a call, also for the CPU whose number the worker carries; each CPU's list holds its own."""
    for relid in (9, 10, 11):
        booted.host.device(relid)
    booted.settle()

    assert (on_list(booted, 0), on_list(booted, 1)) == ([9, 11], [10])
    assert (calls(booted, 0), calls(booted, 1)) == (2, 1)


def test_rescind_takes_it_off_by_a_call(booted: World) -> None:
    """`hv_process_channel_removal` on a worker."""
    for relid in (9, 10):
        booted.host.device(relid)
    booted.settle()
    booted.events.clear()
    for relid in (9, 10):
        booted.host.rescind(relid)
    booted.settle()

    assert (on_list(booted, 0), on_list(booted, 1)) == ([], [])
    assert (calls(booted, 0), calls(booted, 1)) == (1, 1)
    assert booted.host.released == [9, 10]


def test_processor_changes_its_own_list_itself(booted: World) -> None:
    """At the end, on CPU 0: its channels directly with interrupts off, those of CPU 1 by a call each."""
    for relid in (9, 10, 11):
        booted.host.device(relid)
    booted.settle()
    booted.events.clear()

    assert booted.shut_down() == {}

    cleanup = 1  # hv_synic_cleanup runs on CPU 1 as well
    assert (calls(booted, 0), calls(booted, 1)) == (0, 1 + cleanup)


def test_own_list_is_changed_with_interrupts_off(booted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that came in the middle would find half a list."""
    booted.host.device(9)
    booted.settle()
    channel = booted.channel(9)
    seen = []
    contains = type(booted.tables.chn_list).contains

    def look(self: object, record: Channel) -> bool:
        seen.append(booted.cpus[0].irqs_disabled())
        return contains(self, record)  # type: ignore[arg-type]

    monkeypatch.setattr(type(booted.tables.chn_list), "contains", look)
    booted.call(lambda current: run_on_target_cpu(current, channel, Ipis.PERCPU_CHANNEL_DEQ))

    assert seen == [True]
    assert (on_list(booted, 0), booted.cpus[0].irqs_disabled()) == ([], False)


def test_offer_that_fails_leaves_the_list(booted: World) -> None:
    """`err_deq_chan`: off the processor's list by a call, released once."""
    taken = []
    while (record := booted.tables.devices.alloc()) is not None:
        taken.append(record)
    booted.host.device(9)
    booted.settle()
    for record in taken:
        booted.tables.devices.free(record)

    assert (on_list(booted, 0), on_list(booted, 1)) == ([], [])
    assert calls(booted, 0) == 2
    assert booted.host.released == [9]
    assert booted.shut_down() == {}


def test_offline_target_is_logged_and_passed_over(booted: World) -> None:
    """No list, so no interrupts; the device is there all the same, and can go."""
    booted.host.device(9)
    booted.settle()
    cpu1 = booted.tables.cpus.at(1)
    booted.host.device(10)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn("WORK")
    booted.turn("PRI_CHAN")  # it has chosen CPU 1 and called it
    cpu1.online.store(0)
    cpu1.call.offline(booted.currents[0].actor)
    booted.cpus[1].lapic.take()
    booted.settle()

    assert "relid 10: cpus[1].call: CPU 1 is offline or dead" in booted.log
    assert booted.channel(10).state.load() == OPENED
    booted.host.rescind(10)
    booted.settle()
    assert booted.host.released == [10]
    cpu1.online.store(1)


@pytest.mark.parametrize(("era", "found"), [("current", True), ("seed", False)])
def test_flag_on_another_cpu(booted: World, found: bool) -> None:
    """The relid table serves every CPU; a list only its own, so there the flag is taken and lost."""
    booted.host.device(9)
    booted.settle()
    INBOXES[booted.channel(9).handle] = deque()
    assert booted.channel(9).target_cpu.load() == 0
    event = booted.host.channels[9].event
    assert event is not None
    event.position = booted.cpus[1].position
    booted.events.clear()

    booted.host.write(9, b"12345678")
    booted.settle()

    assert cleared(booted) == [9]
    assert packets(booted) == ([b"12345678"] if found else [])


# -- messages -------------------------------------------------------------------------------------------


def test_rescind_is_work_for_the_system_queue(booted: World) -> None:
    """`schedule_work_on(connect_cpu)`; offers go to work_queue."""
    booted.host.device(9)
    booted.settle()
    booted.host.rescind(9)
    booted.settle()

    queued = [event.arguments[:2] for event in booted.events if event.name == "work_queue"]
    assert queued == [
        (QueueNumber.WORK, Works.VMBUS_ONMESSAGE_WORK),
        (QueueNumber.PRI_CHAN, Works.VMBUS_ADD_CHANNEL_WORK),
        (QueueNumber.SYSTEM, Works.VMBUS_ONMESSAGE_WORK),
    ]


def rescinds_behind_a_probe(world: World) -> None:
    """One probe waits for the host, three stand behind it; all four are taken back, the waiting one last."""
    world.host.hold(MessageType.OPENCHANNEL)
    for relid in (9, 10, 11, 12):
        world.host.device(relid)
    world.settle()
    assert [world.channel(relid).probe_done.load() for relid in (9, 10, 11, 12)] == [0, 0, 0, 0]
    for relid in (10, 11, 12, 9):
        world.host.rescind(relid)
    world.settle()


def test_rescinds_do_not_hold_each_other_up(booted: World) -> None:
    """More of them wait for probes than there are workers, and the one that ends the waiting comes last."""
    before = booted.clock.time_ns

    rescinds_behind_a_probe(booted)

    assert sorted(booted.host.released) == [9, 10, 11, 12]
    assert booted.clock.time_ns - before < 1_000_000_000
    assert booted.tables.channels.in_use == 0
    assert booted.shut_down() == {}


def test_message_without_a_handler_is_the_workers_to_complain_of(booted: World) -> None:
    """Queued, for its flag says that it may block; the worker finds that there is nothing to run."""
    booted.host.send(int(MessageType.REQUESTOFFERS).to_bytes(4, "little").ljust(8, b"\0"))
    booted.settle()

    assert booted.log[-1] == "Unhandled channel message type 3 [unhandled-msgtype]"
    assert [event.actor for event in booted.events if event.name == "work_run"] == ["WORK"]


@pytest.mark.parametrize(("era", "count"), [("current", 25), ("seed", 22)])
def test_worker_dumps_a_type_beyond_its_table(booted: World, count: int) -> None:
    """The tasklet drops such a message; one that came to the worker all the same is logged with its bytes."""
    booted.call(lambda current: vmbus_onmessage(current, count.to_bytes(4, "little") + b"\xab" * 8))

    assert booted.log[-1] == (
        f"Received invalid channel message type {count} size 12\n{count:02x}000000 abababab abababab [unknown-msgtype]"
    )


def test_message_may_say_any_length(booted: World) -> None:
    """No least lengths: the handler reads the slot as far as its structure goes, whatever the size says."""
    booted.host.device(9)
    booted.settle()
    cpu0 = booted.tables.cpus.at(0)
    slot = cpu0.synic_message_page_gpa + VMBUS_MESSAGE_SINT * 256
    words = (4, 0, 0, int(MessageType.RESCIND_CHANNELOFFER), 0, 9)
    booted.tables.ram.octets[slot + 4 : slot + 28] = b"".join(word.to_bytes(4, "little") for word in words)
    booted.tables.ram.atomics.store_u32(slot, 1)
    interrupt(booted, 0)

    assert booted.host.released == [9]
    assert booted.refused() == {}


# -- the channel's tasklet ------------------------------------------------------------------------------


def runs(world: World) -> int:
    """How often channel 9's tasklet ran."""
    return sum(event.name == "tasklet_run" and event.arguments[1:] == (9,) for event in world.events)


@pytest.mark.parametrize(("slow_ns", "wanted"), [(0, 1), (5_000_000, 2), (9_000_000, 3)])
def test_event_tasklet_goes_on_for_two_jiffies(booted: World, slow_ns: int, wanted: int) -> None:
    """A ring that does not run empty is drained on and on, until 8 ms are over; then it is scheduled again."""
    booted.host.device(9)
    booted.settle()
    clock = booted.clock

    class Slow(deque[object]):
        """The driver needs its time for each bite."""

        def extend(self, some: object) -> None:
            clock.time_ns += slow_ns
            super().extend(some)  # type: ignore[arg-type]

    INBOXES[booted.channel(9).handle] = Slow()  # type: ignore[assignment]
    booted.host.write(9, *[b""] * 1_300)
    booted.settle()

    assert len(packets(booted)) == 1_300
    assert runs(booted) == wanted


# -- the end of an interrupt ----------------------------------------------------------------------------


@pytest.mark.parametrize("era", ["current", "seed"])
@pytest.mark.parametrize("deprecated", [True, False])
def test_hint_decides_who_ends_the_interrupt(era: str, deprecated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hint the guest does, with its SINT set up for that; without it the hypervisor does by itself."""
    acknowledged = []
    end = Gate.ack_APIC_irq

    def note(gate: Gate) -> None:
        acknowledged.append(gate.vcpu.lapic.in_service)
        end(gate)

    monkeypatch.setattr(Gate, "ack_APIC_irq", note)
    with new_world(era=era, deprecate_auto_eoi=deprecated, versions={VERSION_WIN10}) as world:
        world.boot()
        world.host.device(9)
        world.settle()

        register = world.partition.synics[world.cpus[0].position].read_msr(HV_X64_MSR_SINT0 + VMBUS_MESSAGE_SINT)
        assert bool(register & HV_SYNIC_SINT_AUTO_EOI) is not deprecated
        interrupts = sum(cpu.irq_hv_callback_count for cpu in world.tables.cpus.live())
        assert acknowledged == ([(0xF3,)] * interrupts if deprecated else [])
        assert [cpu.lapic.in_service for cpu in world.cpus] == [(), ()]
        assert world.channel(9).state.load() == OPENED
        assert world.shut_down() == {}
