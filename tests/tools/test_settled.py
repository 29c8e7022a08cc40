"""Settled or not: everybody is looked at, who runs or is under way is named, and nobody is waited for in vain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emu.blocked import Blocked
from emu.control import ActorKind
from emu.interrupts import AWAKE
from emu.layout import (
    D_CONNECTION_SUMMARY,
    D_HOST_RUN_STATE,
    VP_EXIT_SLOT,
    VP_REQUEST,
    VP_RUN_STATE,
    X_CLAIMER,
    X_OPERATION,
    X_STATE,
    ExitOperation,
    ExitState,
    vp_page_offset,
)
from emu.orders import OrderDesk, Recipient
from emu.syncpoint import Point, Tickets
from emu.task_board import Program, TaskBoard
from emu.wire.messages import MessageType
from guestproc.kernel.wait import sleepers
from guestproc.kernel.waiters import Waiter, WaiterState
from guestproc.kernel.workqueue import QueueNumber
from tests.guestproc.world import World, new_world
from tests.tools.settled_world import publish
from tools.settled import Settlement, SettleTest
from tools.waits import chain, waits


@pytest.fixture(params=[True, False], ids=["told", "announced"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A guest with one open channel; its threads say when they sleep, or only announce it."""
    with new_world(races=request.param) as world:
        world.boot()
        world.host.device(9)
        world.settle()
        publish(world)
        yield world


def look(world: World, *parked: int) -> Settlement:
    """One look at it."""
    return SettleTest(world.machine, lambda: parked, world.tables, asleep=lambda _pid: True).take()


def slot_named(world: World, name: str) -> int:
    """Slot of an actor in the process table."""
    return next(row.slot for row in world.machine.control.rows() if row.name == name)


def test_world_that_ran_to_its_end_is_settled(world: World) -> None:
    """Processors halted, workers on their semaphores, nothing under way."""
    assert look(world) == Settlement()
    assert look(world).text() == "settled"


def test_running_processor_is_named(world: World) -> None:
    """One that is awake will do something, and one that was sent a token for a vector.

    One that somebody holds will not; nor will one that sleeps on a vector without a token: nobody woke it.
    """
    position = world.cpus[1].position
    state = vp_page_offset(position) + VP_RUN_STATE
    world.machine.vps.view.store_u32(state, AWAKE)
    assert look(world).moving == ("vcpu1 is AWAKE",)
    assert look(world, slot_named(world, "vcpu1")).settled

    world.machine.vps.view.store_u32(state, 1)
    world.machine.vps.view.store_u64(vp_page_offset(position) + VP_REQUEST + 24, 1 << (0xF3 - 192))

    assert look(world).settled
    world.machine.wakeup(f"vp.{position}").post()
    assert look(world).moving == ("vcpu1 has vector 0xf3 to take",)


def test_processor_that_has_taken_its_token_is_about_to_wake(world: World) -> None:
    """It still says HALTED, on a loaded computer for milliseconds; the kernel knows that it does not sleep."""
    position = world.cpus[1].position
    world.machine.vps.view.store_u64(vp_page_offset(position) + VP_REQUEST + 24, 1 << (0xF3 - 192))

    found = SettleTest(world.machine, lambda: (), world.tables, asleep=lambda _pid: False).take()

    assert found.moving == ("vcpu1 has vector 0xf3 to take",)


def test_vector_behind_one_in_service_is_not_deliverable(world: World) -> None:
    """What must wait for an EOI that does not come is no reason to wait for it."""
    vps, page = world.machine.vps.view, vp_page_offset(world.cpus[0].position)
    vps.store_u64(page + VP_REQUEST + 24, 1 << (0xF3 - 192))
    vps.store_u64(page + VP_REQUEST + 64 + 24, 1 << (0xF3 - 192))

    assert look(world).settled


def test_running_worker_is_named_with_its_work() -> None:
    """A worker whose word says that it is in no wait."""
    with new_world(races=True) as world:
        world.boot()
        publish(world)
        slot = slot_named(world, "WORK")
        world.machine.control.blocked_word(slot).store(Blocked.RUNS)

        assert look(world).text() == "not settled: WORK runs"
        assert look(world, slot).settled


def waiter_for_an_opening(world: World) -> Waiter:
    """A settled world in which the host keeps the result of an opening back; who waits for it."""
    world.host.hold(MessageType.OPENCHANNEL)
    world.host.device(10)
    world.settle()
    publish(world)
    assert look(world).settled
    sleeper = next(number for number, wait in waits(world.tables).items() if not wait.idle)
    return next(one for one in world.tables.waiters.live() if one.actor == sleeper)


def test_woken_sleeper_will_run(world: World) -> None:
    """Between its waker's swap and its own next step a sleeper still says that it sleeps."""
    waiter = waiter_for_an_opening(world)
    waiter.state.store(WaiterState.WOKEN)

    assert any("was woken" in text for text in look(world).moving)

    waiter.state.store(WaiterState.WAITING)


def test_sleeper_whose_wait_is_over_will_run(world: World) -> None:
    """Machine time that is past a waiter's deadline wakes it, however late it gets a core to notice; nobody held."""
    waiter = waiter_for_an_opening(world)
    assert waiter.until_ns > world.clock.time_ns

    world.clock.time_ns = waiter.until_ns

    name = next(row.name for row in world.machine.control.rows() if row.number == waiter.actor)
    assert f"{name} has not noticed yet that its wait is over" in look(world).moving
    row = world.machine.control.row(slot_named(world, name))
    assert not any(name in text for text in look(world, row.slot).moving)


def test_host_that_runs_or_is_rung_for(world: World) -> None:
    """Its run state, the summary of its doorbells, its next timer."""
    doorbells = world.machine.doorbells.view
    doorbells.store_u32(D_HOST_RUN_STATE, AWAKE)
    assert look(world).moving == ("hypervisor runs",)
    publish(world)
    doorbells.store_u64(D_CONNECTION_SUMMARY, 1)
    assert look(world).moving == ("hypervisor was rung for",)
    doorbells.store_u64(D_CONNECTION_SUMMARY, 0)
    world.machine.control.host_wakes_ns.store(0)
    due = ("a timer of hypervisor is due",) if world.machine.config["races"] else ()

    assert look(world).moving == due


def test_exit_in_flight_is_named_by_its_claimer(world: World) -> None:
    """An exit is answered, unless its claimer is held in the middle of it."""
    slot = slot_named(world, "vcpu0")
    at = vp_page_offset(world.cpus[0].position) + VP_EXIT_SLOT
    vps = world.machine.vps.view
    vps.store_u32(at + X_CLAIMER, world.cpus[0].row.number)
    vps.store_u32(at + X_OPERATION, ExitOperation.HYPERCALL)
    vps.store_u32(at + X_STATE, ExitState.RUNG)
    vp = world.machine.vp_index(world.cpus[0].position)

    assert look(world).moving == (f"vcpu0 is in an exit (HYPERCALL, slot 0 of VP {vp})",)
    assert look(world, slot).settled


def test_letters_and_ordered_programs_are_under_way(world: World) -> None:
    """Somebody will take them."""
    desk = OrderDesk(world.machine.control)
    desk.post(Recipient.GUEST, "bind", lambda: None, timeout_s=1.0)
    TaskBoard(world.machine.control).order(Program.PING, 1)

    assert look(world).moving == ("a letter was posted", "PING was ordered on vcpu1")


def test_thread_that_has_not_begun_will_take_the_next_letter(world: World) -> None:
    """Of two that make calls one is held, and the other has not enlisted yet: the second call waits for that one."""
    control, desk = world.machine.control, OrderDesk(world.machine.control)
    for _ in range(2):
        desk.post(Recipient.GUEST, "bind", lambda: None, timeout_s=1.0)
    desk.take(Recipient.GUEST)
    held = control.enlist(ActorKind.WORKER, "user/1").slot
    assert look(world, held).moving == ("a letter was taken and nobody works on it yet",)

    second = control.enlist(ActorKind.WORKER, "user/2").slot
    assert look(world, held, second).settled


def test_letter_that_was_taken_is_somebodys_who_waits_for_none(world: World) -> None:
    """Both threads that make calls wait: somebody is about to begin with it. Where one is held, that one has it."""
    control, desk = world.machine.control, OrderDesk(world.machine.control)
    desk.post(Recipient.GUEST, "bind", lambda: None, timeout_s=1.0)
    desk.take(Recipient.GUEST)
    slots = [control.enlist(ActorKind.WORKER, f"user/{number}").slot for number in (1, 2)]
    for slot in slots:
        control.blocked_word(slot).store(Blocked.IDLE)
    assert look(world).moving == ("a letter was taken and nobody works on it yet",)

    assert look(world, slots[0]).settled


def test_work_waits_for_a_worker_that_has_not_begun(world: World) -> None:
    """Its queue has two threads: with one of them missing the work is not stuck, whoever else is held."""
    queue = world.tables.queues.at(QueueNumber.SYSTEM)
    begun, queue.worker_actors[1] = queue.worker_actors[1], 0
    queue.head = 1
    assert look(world).settled, "nobody is there whose threads would take it"

    world.machine.control.enlist(ActorKind.WORKQUEUE, "workqueue")
    assert look(world).moving == ("work waits on queue SYSTEM, and a worker of it has not begun",)

    queue.worker_actors[1] = begun
    assert look(world).settled
    queue.head = 0


def test_dead_actor_ends_the_wait_at_once(world: World) -> None:
    """Nobody waits for the dead; the wait says who it is."""
    world.machine.control.set_dead(slot_named(world, "vcpu1"), 9)
    world.machine.doorbells.view.store_u32(D_HOST_RUN_STATE, AWAKE)

    found = SettleTest(world.machine, tables=world.tables).wait(3600.0)

    assert found.dead == ("vcpu1 (wait status 9)",)
    assert found.text() == "dead: vcpu1 (wait status 9)"


def test_deadline_names_who_still_runs(world: World) -> None:
    """A wait that ends without an answer says what it waited for, having let others work meanwhile."""
    world.machine.doorbells.view.store_u32(D_HOST_RUN_STATE, AWAKE)
    pumped: list[float] = []

    def pump(seconds: float) -> None:
        pumped.append(seconds)

    found = SettleTest(world.machine, tables=world.tables).wait(0.01, pump)

    assert found.text() == "not settled: hypervisor runs"
    assert set(pumped) == {0.0}


def test_step_between_two_counts_makes_the_look_invalid(world: World) -> None:
    """Who did something while it was looked at may have left what was seen before."""
    test = SettleTest(world.machine, tables=world.tables)
    counters = world.machine.control.counters(slot_named(world, "WORK"))
    before = test.moving

    def moving_meanwhile() -> Iterator[str]:
        yield from before()
        counters.works += 1
        counters.flush()

    test.moving = moving_meanwhile  # type: ignore[method-assign]

    assert test.take().moving == ("somebody did a step while it was looked at",)


def test_actors_of_a_world_are_those_that_move_it(world: World) -> None:
    """Host, processors and workers are looked at; nobody else moves a machine."""
    kinds = {row.kind for row in SettleTest(world.machine, tables=world.tables).view.actors()}

    assert kinds == {ActorKind.HYPERVISOR, ActorKind.VCPU, ActorKind.WORKER}


def test_poison_is_no_waiter(world: World) -> None:
    """Whoever follows a chain while its records go reads poison for an index: the chain ends there."""
    poison = 0x6B6B6B6B

    assert chain(world.tables, poison) == []
    assert sleepers(world.tables.waiters, poison) == []


@pytest.mark.parametrize("error", [AssertionError, IndexError, ValueError])
def test_record_that_goes_during_the_look_is_a_reason(world: World, error: type[Exception]) -> None:
    """What was looked at is another's by now: something moves, and nobody falls over it."""
    test = SettleTest(world.machine, tables=world.tables)

    def moving() -> Iterator[str]:
        raise error

    test.moving = moving  # type: ignore[method-assign]

    assert test.take().moving == ("a record went while it was looked at",)


@pytest.mark.parametrize(("halted", "moving"), [(True, ("vcpu1 is AWAKE",)), (False, ())])
def test_processor_that_is_held_may_take_interrupts(halted: bool, moving: tuple[str, ...]) -> None:
    """If it was held with interrupts on; with them off nothing comes of it, whatever the point is for as a rule."""
    with new_world(races=True) as world:
        world.boot()
        world.settle()
        publish(world)
        tickets, row = Tickets(world.machine.control), world.cpus[1].row
        number = tickets.arm(Point.LIST_AT_NODE)
        assert tickets.take(Point.LIST_AT_NODE, row.number, 1, 0, halted=halted) == number
        world.machine.vps.view.store_u32(vp_page_offset(world.cpus[1].position) + VP_RUN_STATE, AWAKE)

        assert look(world, row.slot).moving == moving
