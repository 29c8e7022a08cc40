"""Processors go offline and come back, or refuse to go while the host may have something for them."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from emu.interrupts import AWAKE, HALTED, OFFLINE
from emu.layout import VP_RUN_STATE, vp_page_offset
from emu.wire.device_classes import BY_NAME
from emu.wire.synic import HV_X64_MSR_SCONTROL, VMBUS_MESSAGE_SINT
from emu.wire.versions import VERSION_WIN10
from guestproc.current import Current
from guestproc.kernel.cpus import cpus_read_lock, cpus_write_lock
from guestproc.kernel.layout import ChannelState, Hotplug
from guestproc.kernel.smp import ProcessorGone
from guestproc.kernel.tasklet import tasklet_disable_nosync, tasklet_enable
from guestproc.protocol.numbers import Ipis
from guestproc.vmbus.chan_list import smp_call_function_single
from guestproc.vmbus.connection import delay
from guestproc.vmbus.cpu_hotplug import HV_MAX_TRIES, TRY_NS, cpu_down, cpu_up
from guestproc.vmbus.registers import rdmsr
from guestproc.vmbus.retarget import target_cpu_store
from tests.guestproc.conftest import HOST_VERSIONS
from tests.guestproc.world import SECOND_NS, Task, World, new_world

OPENED = ChannelState.OPENED_STATE


@pytest.fixture(params=["current", "seed"])
def era(request: pytest.FixtureRequest) -> str:
    """A processor comes and goes in both."""
    return str(request.param)


def down(world: World, cpu: int = 1) -> int:
    """Take a processor offline, from CPU 0."""
    return world.call(lambda current: cpu_down(current, cpu))


def up(world: World, cpu: int = 1) -> int:
    """Bring it back."""
    return world.call(lambda current: cpu_up(current, cpu))


def run_state(world: World, cpu: int = 1) -> int:
    """How soon its VP looks."""
    return world.machine.vps.view.load_u32(vp_page_offset(world.cpus[cpu].position) + VP_RUN_STATE)


def online(world: World, cpu: int = 1) -> int:
    """Whether it is."""
    return int(world.tables.cpus.at(cpu).online.load())


def synic_is_on(world: World, cpu: int = 1) -> bool:
    """Whether the hypervisor has its SynIC enabled."""
    return world.call(lambda current: rdmsr(current, HV_X64_MSR_SCONTROL), cpu=cpu) & 1 != 0


def flag_word(world: World, cpu: int = 1) -> int:
    """GPA of the first word of its event flags."""
    gpa: int = world.tables.cpus.at(cpu).synic_event_page_gpa + VMBUS_MESSAGE_SINT * 256
    return gpa


def nics(world: World, *relids: int) -> list[int]:
    """Offer fast devices; the CPUs that were chosen."""
    for relid in relids:
        world.host.device(relid, class_id=BY_NAME["nic"].guid)
    world.settle()
    return [world.channel(relid).target_cpu.load() for relid in relids]


# -- there and back -------------------------------------------------------------------------------------


def test_processor_goes_and_comes_back(booted: World) -> None:
    """Its SynIC is off, its VP OFFLINE; back again it takes interrupts as before."""
    booted.events.clear()
    assert down(booted) == 0
    assert (online(booted), run_state(booted), booted.tables.cpus.at(1).hotplug.load()) == (0, OFFLINE, Hotplug.NOTHING)
    assert up(booted) == 0

    assert (online(booted), run_state(booted) in (AWAKE, HALTED), synic_is_on(booted)) == (1, True, True)
    changes = [(event.name, event.arguments[0], event.actor) for event in booted.events if event.name[:4] == "cpu_"]
    assert changes == [("cpu_offline", 1, "vcpu1"), ("cpu_online", 1, "vcpu1")]
    assert nics(booted, 9, 10) == [0, 1]
    assert booted.shut_down() == {}


def test_asked_twice(booted: World) -> None:
    """It is so already: 0."""
    assert [down(booted), down(booted), up(booted), up(booted)] == [0, 0, 0, 0]


def test_no_such_processor(booted: World) -> None:
    """-EINVAL."""
    assert [down(booted, 2), up(booted, 64)] == [-errno.EINVAL, -errno.EINVAL]


def test_bus_goes_while_a_processor_is_offline(booted: World) -> None:
    """Nobody asks it for anything then."""
    assert down(booted) == 0

    assert booted.shut_down() == {}


# -- nobody needs an offline one ------------------------------------------------------------------------


def test_channels_are_placed_elsewhere(booted: World) -> None:
    """Neither era chooses it, and both do once it is back."""
    assert down(booted) == 0
    assert nics(booted, 9, 10, 11) == [0, 0, 0]
    assert up(booted) == 0

    assert 1 in nics(booted, 12, 13)
    assert all(booted.channel(relid).state.load() == OPENED for relid in (9, 10, 11, 12, 13))


def test_call_of_an_offline_processor(booted: World) -> None:
    """Is an error, not a wait."""
    assert down(booted) == 0

    def call(current: Current) -> str:
        try:
            smp_call_function_single(current, 1, Ipis.PERCPU_CHANNEL_DEQ, 0)
        except ProcessorGone as gone:
            return str(gone)
        return ""

    assert booted.call(call).endswith("CPU 1 is offline or dead")


def test_kick_of_an_offline_processor(booted: World) -> None:
    """It posts nothing; what was requested is taken when the processor is back."""
    assert down(booted) == 0
    booted.settle()
    tokens = booted.machine.wakeup(f"vp.{booted.cpus[1].position}").tokens
    before = booted.cpus[1].counters.reschedules
    booted.call(lambda current: current.actor.kick_cpu(1))
    assert booted.machine.wakeup(f"vp.{booted.cpus[1].position}").tokens == tokens
    assert booted.cpus[1].counters.reschedules == before
    assert up(booted) == 0

    assert booted.cpus[1].counters.reschedules > before


# -- it refuses -----------------------------------------------------------------------------------------


def test_connect_cpu_stays(booted: World) -> None:
    """-EBUSY: the host's messages come to it."""
    assert booted.call(lambda current: cpu_down(current, 0), cpu=1) == -errno.EBUSY
    assert (online(booted, 0), booted.host.device(9) is not None) == (1, True)


def test_processor_that_is_a_target_stays(booted: World) -> None:
    """-EBUSY, and it takes its channel's interrupts as before."""
    assert nics(booted, 9, 10) == [0, 1]

    assert (down(booted), online(booted), synic_is_on(booted)) == (-errno.EBUSY, 1, True)


def test_sub_channel_counts(booted: World) -> None:
    """A processor that takes only a sub-channel's interrupts is needed, too."""
    nic = BY_NAME["nic"].guid
    booted.host.device(9, class_id=nic)
    booted.host.device(20, 9, index=1, class_id=nic)
    booted.settle()
    assert booted.channel(20).target_cpu.load() == 1

    assert down(booted) == -errno.EBUSY


def test_processor_that_is_busy_stays(booted: World) -> None:
    """One that does not look up from its program within 5 s is left alone, for good."""
    program = booted.start(lambda current: delay(current, 20 * SECOND_NS), cpu=1)
    booted.settle()
    task = booted.start(lambda current: cpu_down(current, 1))
    booted.pass_time(6)
    assert (task.result, program.ended()) == (-errno.EBUSY, False)
    booted.pass_time(20)

    assert (program.ended(), online(booted), run_state(booted)) == (True, 1, HALTED)


# -- a flag that was not taken (races.md F4) ------------------------------------------------------------


def with_flag(**options: Any) -> World:
    """A world on the newest version where relid 9's flag is set on CPU 1, whose interrupt has not come."""
    world = World(versions=HOST_VERSIONS["current"], **options)
    world.boot()
    world.tables.ram.atomics.cell_u64(flag_word(world)).fetch_or(1 << 9)
    return world


def test_flag_holds_the_processor() -> None:
    """It looks a few times, 10 ms apart, and refuses: the page would go, and with it the only news of a packet."""
    world = with_flag()
    try:
        task: Task[int] = world.start(lambda current: cpu_down(current, 1))
        world.settle()
        began = world.clock.time_ns
        assert not task.ended()
        world.pass_time(0.1)

        assert (task.result, online(world)) == (-errno.EBUSY, 1)
        assert world.clock.time_ns - began >= HV_MAX_TRIES * TRY_NS
    finally:
        world.close()


def test_flag_goes_with_its_page() -> None:
    """Without `fix.scan_flags_before_offline` the processor goes, and nobody is ever told of that packet."""
    world = with_flag(switches={"scan_flags_before_offline": False})
    try:
        assert (down(world), online(world)) == (0, 0)
    finally:
        world.close()


def test_flag_that_is_taken_meanwhile() -> None:
    """The processor waits with interrupts on; when the flag is gone it goes."""
    world = with_flag()
    try:
        task = world.start(lambda current: cpu_down(current, 1))
        world.settle()
        assert not task.ended()
        world.tables.ram.atomics.cell_u64(flag_word(world)).store(0)
        world.pass_time(0.1)

        assert (task.result, online(world)) == (0, 0)
    finally:
        world.close()


def test_flag_0_is_no_channels() -> None:
    """It holds nobody; and before 4.1, where no channel moves, no flag does."""
    with new_world(versions=HOST_VERSIONS["current"]) as world:
        world.boot()
        world.tables.ram.atomics.cell_u64(flag_word(world)).fetch_or(1)
        assert down(world) == 0
    with new_world(versions={VERSION_WIN10}) as world:
        world.boot()
        world.tables.ram.atomics.cell_u64(flag_word(world)).fetch_or(1 << 9)
        assert down(world) == 0


# -- an offer meanwhile (races.md F3) -------------------------------------------------------------------


def test_offer_waits_for_a_processor_that_goes() -> None:
    """Its CPU is chosen when it is known who is left: behind the look for channels, or before it."""
    world = with_flag()
    try:
        assert nics(world, 30) == [0]  # the next one is CPU 1's turn
        task = world.start(lambda current: cpu_down(current, 1))
        world.settle()
        world.host.device(31, class_id=BY_NAME["nic"].guid)
        world.settle()
        assert (task.ended(), world.tables.relids.lookup(31)) == (False, None)
        world.tables.ram.atomics.cell_u64(flag_word(world)).store(0)
        world.pass_time(0.1)

        assert (task.result, world.channel(31).target_cpu.load()) == (0, 0)
        assert world.channel(31).state.load() == OPENED
    finally:
        world.close()


def test_offer_does_not_wait() -> None:
    """Without `fix.hotplug_lock_on_offer` it takes the processor that is just going, behind the look for channels."""
    world = with_flag(switches={"hotplug_lock_on_offer": False})
    try:
        assert nics(world, 30) == [0]
        task = world.start(lambda current: cpu_down(current, 1))
        world.settle()
        assert nics(world, 31) == [1]
        world.tables.ram.atomics.cell_u64(flag_word(world)).store(0)
        world.pass_time(0.1)

        assert (task.result, online(world), world.channel(31).state.load()) == (0, 0, OPENED)
    finally:
        world.close()


def test_writer_waits_for_readers(booted: World) -> None:
    """And readers for a writer that has begun; two readers are inside at once."""
    order = []

    def read(name: str, nanoseconds: int) -> Task[None]:
        def body(current: Current) -> None:
            with cpus_read_lock(current.connection, current.actor):
                order.append(f"{name} in")
                delay(current, nanoseconds)
                order.append(f"{name} out")

        return booted.start(body, cpu=int(name[-1]))

    def write(current: Current) -> None:
        with cpus_write_lock(current.connection, current.actor):
            order.append("writer")

    read("reader 0", SECOND_NS)
    booted.settle()
    read("reader 1", 2 * SECOND_NS)
    booted.start(write, cpu=0)
    booted.pass_time(3)

    assert order == ["reader 0 in", "reader 1 in", "reader 0 out", "reader 1 out", "writer"]


# -- its tasklets ---------------------------------------------------------------------------------------


def test_pending_tasklet_runs_before_it_goes() -> None:
    """A tasklet that was scheduled there, and may not start yet, is no other processor's: it is waited for."""
    with new_world(cpus=3, versions=HOST_VERSIONS["current"]) as world:
        world.boot()
        nics(world, 8, 9)
        channel = world.channel(9)
        event = channel.callback_event
        tasklet_disable_nosync(event)
        world.host.write(9, b"x" * 8)
        world.settle()
        assert event.scheduled
        handle = channel.handle
        assert world.call(lambda current: target_cpu_store(current, handle, "0")) == 0
        task = world.start(lambda current: cpu_down(current, 1))
        world.settle()
        assert not task.ended()
        world.call(lambda current: tasklet_enable(current.actor, event), cpu=2)

        assert (task.result, event.scheduled, online(world)) == (0, False, 0)
