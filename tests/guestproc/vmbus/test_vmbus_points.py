"""The ISR and the readers of a guest that runs schedules: as the plain ones, with what their switches make wrong."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from emu.ipc.atomics import AtomicView
from emu.wire.versions import VERSION_WIN10, VERSION_WIN10_V5_3
from guestproc.current import Current
from guestproc.protocol.numbers import Tasklets
from guestproc.user import run_call
from guestproc.vmbus.channel import vmbus_close
from guestproc.vmbus.percpu import PointedFlags
from tests.guestproc.world import World, new_world

EVENT_DPC = int(Tasklets.VMBUS_EVENT_DPC)


def written_to(world: World) -> list[str]:
    """What a packet of the host's for an open channel, relid 9, brings about."""
    world.boot()
    world.host.device(9)
    world.settle()
    world.events.clear()
    world.host.write(9, b"x" * 8)
    world.settle()
    names = ("flag_clear", "vmbus_chan_sched", "vmbus_on_event")
    return [f"{event.name} {event.context.name}" for event in world.events if event.name in names]


def test_flags_are_an_interrupts() -> None:
    """Era `seed` walks along its list in the ISR, which no call of another processor interrupts."""
    with new_world(era="seed", versions={VERSION_WIN10}) as world:
        assert written_to(world) == ["flag_clear ISR", "vmbus_chan_sched ISR", "vmbus_on_event TASKLET"]


def test_flags_are_a_tasklets() -> None:
    """Without `fix.list_edit_exclusion` it does so in a tasklet; what comes is read all the same."""
    with new_world(era="seed", versions={VERSION_WIN10}, switches={"list_edit_exclusion": False}) as world:
        assert written_to(world) == ["flag_clear TASKLET", "vmbus_chan_sched TASKLET", "vmbus_on_event TASKLET"]
        assert EVENT_DPC in [event.arguments[0] for event in world.events if event.name == "tasklet_sched"]
        assert world.shut_down() == {}


@pytest.mark.parametrize("variant", ["tasklet", "isr_after_move", "stats_reader"])
def test_ring_that_is_used_when_its_pages_are_gone(variant: str) -> None:
    """Without `fix.close_quiesces` a reader knows its pages by their allocation, and says so before it touches them."""
    switches: dict[str, Any] = {"close_quiesces": False, "variant": variant}
    with new_world(versions={VERSION_WIN10_V5_3}, switches=switches) as world:
        assert "vmbus_on_event TASKLET" in written_to(world)
        channel = world.channel(9)

        def mapped(current: Current) -> Any:
            return current.rings.of(channel).inbound

        inbound = world.call(mapped, cpu=1)
        world.call(lambda current: vmbus_close(current, channel))
        for use in (inbound.begin_read, inbound.read_many, inbound.end_read):
            with pytest.raises(AssertionError, match="INV-13"):
                use()


def test_words_of_a_channels_rings() -> None:
    """Mask and indices of both, of an open channel; -EINVAL of a closed one."""
    with new_world(versions={VERSION_WIN10_V5_3}) as world:
        written_to(world)
        asked = {"device": "9"}
        found = world.call(lambda current: run_call(current, "ring_debuginfo", asked))
        index = found["inbound"]["current_write_index"]
        assert index > 0
        assert found["inbound"] == {
            "current_interrupt_mask": 0,
            "current_read_index": index,
            "current_write_index": index,
        }
        assert set(found["outbound"].values()) == {0}

        channel = world.channel(9)
        world.call(lambda current: vmbus_close(current, channel))
        assert world.call(lambda current: run_call(current, "ring_debuginfo", asked))["errno"] == errno.EINVAL


@pytest.mark.parametrize("atomic", [True, False])
def test_interrupt_without_a_flag_has_no_point_between_load_and_clear(atomic: bool) -> None:
    """The ISR takes its first word whatever is in it; where nothing is, no schedule stops and nothing is stored."""
    view = AtomicView(bytearray(8))
    reached: list[int] = []
    current: Any = SimpleNamespace(
        fix=SimpleNamespace(atomic_flag_clear=atomic),
        armed=bytes([1]) * 256,
        reach=lambda _point, bit: reached.append(bit),
    )
    flags = PointedFlags(current, view.cell_u64(0))

    assert flags.exchange(0) == 0 and reached == []
    view.store_u64(0, 1 << 9)
    assert flags.exchange(0) == 1 << 9 and reached == [9] and view.load_u64(0) == 0
