"""The `vcd` format: what the words of the protocol are, record by record."""

from __future__ import annotations

from pathlib import Path

from emu.control import ActorKind
from emu.layout import ExitOperation
from emu.recording import RecordedActor, TraceRecord
from emu.tracing import (
    E_FLAG_CLEAR,
    E_FLAG_SET,
    E_ISR_ENTER,
    E_ISR_EXIT,
    E_MAP,
    E_MASK,
    E_PENDING_SET,
    E_PENDING_SIZE,
    E_RING_PUBLISH,
    E_RING_RELEASE,
    E_SLOT_FREE,
    E_SLOT_WRITE,
    E_UNMASK,
    E_VMEXIT,
    EVENTS,
    Context,
)
from tests.tools.export.readers import waves, written
from tests.tools.recordings import recorders
from tools.export.rings import Rings
from tools.export.vcd import Changes, Signal


def values(changes: list[tuple[int, int | None]]) -> list[int | None]:
    """Just the values, one after the other."""
    return [value for _t, value in changes]


def test_slot_interrupt_and_flag(vcd_reader: None, tmp_path: Path) -> None:
    """A slot holds its message until the guest frees it; pending goes with the next message; an ISR ends."""
    actors = [(ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST), (ActorKind.VCPU, "vcpu1", 1, Context.ISR)]
    with recorders(tmp_path / "rec", *actors) as (host, vcpu):
        host.record(E_SLOT_WRITE, 1, 2, 1, 6, 40, 3)
        host.record(E_PENDING_SET, 1, 2, 1)
        host.record(E_FLAG_SET, 1, 2, 7, 0)
        vcpu.record(E_ISR_ENTER, 0xF3)
        vcpu.record(E_FLAG_CLEAR, 2, 7)
        vcpu.record(E_ISR_EXIT, 0xF3)
        vcpu.record(E_SLOT_FREE, 2, 1, 40, 1)
        host.record(E_SLOT_WRITE, 1, 2, 1, 10, 41, 2)
    signals = waves(written("vcd", tmp_path / "rec", tmp_path / "out"))

    assert values(signals["vp1.sint2.message"].changes) == [None, 6, 0, 10]
    assert values(signals["vp1.sint2.pending"].changes) == [None, 0, 1, 0]
    assert values(signals["vp1.sint2.queued"].changes) == [None, 3, 2]
    assert values(signals["vp1.isr"].changes) == [None, 0xF3, 0]
    assert values(signals["channel7.flag"].changes) == [None, 1, 0]


def test_what_a_guest_that_died_left_is_nobodys(vcd_reader: None, tmp_path: Path) -> None:
    """A message, a flag, an interrupt in service: x when its processor starts anew, and not until the next message."""
    actors = [(ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST), *((ActorKind.VCPU, "vcpu0", 0, Context.ISR),) * 2]
    with recorders(tmp_path / "rec", *actors) as (host, first, second):
        first.start(70, ActorKind.VCPU, 0, "vcpu0")
        host.record(E_SLOT_WRITE, 0, 2, 1, 6, 40, 3)
        host.record(E_PENDING_SET, 0, 2, 1)
        host.record(E_FLAG_SET, 0, 2, 7, 0)
        first.record(E_ISR_ENTER, 0xF3)
        second.start(70, ActorKind.VCPU, 0, "vcpu0")
        host.record(E_SLOT_WRITE, 0, 2, 1, 10, 41, 2)
        second.record(E_VMEXIT, *EVENTS["vmexit"].pack(ExitOperation.ATTACH, 71, 0, 1, 0, 0))
        second.record(E_ISR_ENTER, 0xF3)
        second.stop(70, "vcpu0")
    signals = waves(written("vcd", tmp_path / "rec", tmp_path / "out"))

    assert values(signals["vp0.sint2.message"].changes) == [None, 6, None, 10, None]
    assert values(signals["vp0.sint2.pending"].changes) == [None, 0, 1, None, 0, None]
    assert values(signals["channel7.flag"].changes) == [None, 1, None]
    assert values(signals["vp0.isr"].changes) == [None, 0xF3, None, 0xF3]


def test_processor_that_stopped_and_starts_again_is_no_death(vcd_reader: None, tmp_path: Path) -> None:
    """What it left is there still."""
    with recorders(tmp_path / "rec", (ActorKind.VCPU, "vcpu0", 0, Context.ISR)) as (vcpu,):
        for _ in range(2):
            vcpu.start(70, ActorKind.VCPU, 0, "vcpu0")
            vcpu.record(E_FLAG_CLEAR, 2, 7)
            vcpu.stop(70, "vcpu0")
    signals = waves(written("vcd", tmp_path / "rec", tmp_path / "out"))

    assert values(signals["channel7.flag"].changes) == [None, 0]


def test_rings(vcd_reader: None, tmp_path: Path) -> None:
    """Indices, fill over the ring's end, the mask, and what a writer waits for."""
    data = 3 * 4096
    with recorders(tmp_path / "rec", (ActorKind.HYPERVISOR, "hypervisor", 0, Context.HOST)) as (host,):
        host.record(E_MAP, 7, 0xE1E10, 8)
        host.record(E_RING_PUBLISH, 7, 0, data - 8)
        host.record(E_RING_RELEASE, 7, 0, data - 8)
        host.record(E_RING_PUBLISH, 7, 0, 40)
        host.record(E_PENDING_SIZE, 7, 0, 4096)
        host.record(E_MASK, 7, 1)
        host.record(E_UNMASK, 7, 1, 0)
    signals = waves(written("vcd", tmp_path / "rec", tmp_path / "out"))

    assert values(signals["channel7.to_host.write_index"].changes) == [None, 0, data - 8, 40]
    assert values(signals["channel7.to_host.read_index"].changes) == [None, 0, data - 8]
    assert values(signals["channel7.to_host.fill"].changes) == [None, 0, data - 8, 0, 48]
    assert values(signals["channel7.to_host.pending_send_sz"].changes) == [None, 4096]
    assert values(signals["channel7.to_guest.mask"].changes) == [None, 1, 0]


def test_channels_are_in_the_order_of_their_numbers() -> None:
    """Channel 10 is behind channel 2."""
    signals = [Signal((f"channel{relid}", "to_host"), "fill", 32) for relid in (10, 2, 1)]

    assert [one.scope[0] for one in sorted(signals, key=lambda signal: signal.place)] == [
        "channel1",
        "channel2",
        "channel10",
    ]


def test_processor_is_the_one_at_the_position() -> None:
    """The host names positions; signals are named by VP index."""
    host = RecordedActor(2, "hypervisor", "HYPERVISOR", 70, 0)
    write = TraceRecord(1, 0, host, None, "HOST", EVENTS["slot_write"], (0, 2, 1, 6, 40, 0))

    assert {signal.scope for signal, _value in Changes([1, 0]).feed(write)} == {("events",), ("vp1", "sint2")}


def test_release_that_is_recorded_first_is_no_full_ring() -> None:
    """A reader may record before the writer that it read from: the ring is empty then, and after."""
    host = RecordedActor(2, "hypervisor", "HYPERVISOR", 70, 0)
    rings = Rings()
    fills = []
    for event, values in (("map", (7, 1, 8)), ("ring_release", (7, 0, 64)), ("ring_publish", (7, 0, 64))):
        rings.feed(TraceRecord(1, 0, host, None, "HOST", EVENTS[event], values))
        fills.append(rings.rings[7, 0].fill)

    assert fills == [0, 0, 0]
