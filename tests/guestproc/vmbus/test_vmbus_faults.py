"""Every error exit of an offer, reached by a fault on demand: one RELID_RELEASED, nothing left, the id good again."""

from __future__ import annotations

import errno
from itertools import product
from struct import Struct
from typing import Any

import pytest

from emu.fault_plan import FaultPlan, Faults
from emu.wire.messages import MessageType, RescindChannelOffer
from emu.wire.synic import HYPERVISOR_CALLBACK_VECTOR
from guestproc.kernel.functions import CHANNEL_CALLBACKS
from guestproc.kernel.layout import Channel, ChannelState
from guestproc.kernel.work_records import WorkItem
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol import faults, uevent_text
from guestproc.protocol.numbers import Works
from guestproc.vcpu import WorkerThread
from guestproc.vmbus.message_dpc import MOST_TRIES, look_at_slot_again
from tests.guestproc.scripted_host import HostChannel
from tests.guestproc.world import World, new_world

T = MessageType
SUB_CREATED = 920
LINES = {
    "alloc_channel": "Unable to allocate channel object",
    "work_alloc": "Unable to allocate channel object",
    "device_register": "unable to add child device object (relid 9)",
    "add_kobj": "unable to add child device object (relid 9)",
}
"""What the kernel's log says; device_create and a sub-channel's directory fail without a word."""
OF_PRIMARY = ("alloc_channel", "work_alloc", "device_create", "device_register", "add_kobj")
OF_SUB = ("alloc_channel", "work_alloc", "add_kobj")
IN_THE_WORK = ("device_create", "device_register", "add_kobj")


@CHANNEL_CALLBACKS.register(SUB_CREATED)
def must_not_be_told(current: object, channel: object) -> None:
    """A driver that must not hear of a sub-channel that failed."""
    raise AssertionError("called for a sub-channel that could not be added")


def plan(world: World, fault: str, times: int = 1, relid: int = 0) -> None:
    """Let it fail."""
    faults.plan(FaultPlan(world.machine.control), fault, times, relid)


def nothing_left_of(world: World, *relids: int) -> None:
    """No trace of these in the guest, no offer in progress, every record whole."""
    tables = world.tables
    assert tables.connection.offer_in_progress.load() == 0
    assert not set(relids) & set(tables.relids.published())
    assert not [one for one in tables.channels.live() if one.relid in relids]
    assert tables.work.in_use == tables.requests.in_use == 0
    assert tables.damage() == []


@pytest.fixture
def primary(booted: World) -> Channel:
    """An open primary, relid 5, whose driver hears of sub-channels."""
    booted.host.device(5)
    booted.settle()
    channel = booted.channel(5)
    channel.sc_creation_callback = SUB_CREATED
    return channel


# -- the plan -------------------------------------------------------------------------------------------


def test_fault_strikes_as_often_as_planned(world: World) -> None:
    """Of any relid, or of one; then no more, and no other fault."""
    looked_up = Faults(world.machine.control)
    faults.plan(looked_up.plan, "probe", 2)
    faults.plan(looked_up.plan, "add_kobj", 1, 7)
    assert faults.planned(looked_up.plan) == [("probe", 2, 0), ("add_kobj", 1, 7)]

    assert [bool(faults.strikes(looked_up, "probe", relid)) for relid in (1, 2, 3)] == [True, True, False]
    assert [bool(faults.strikes(looked_up, "add_kobj", relid)) for relid in (6, 7, 7)] == [False, True, False]
    assert not faults.strikes(looked_up, "device_create", 7)
    assert faults.planned(looked_up.plan) == []


def test_plan_is_taken_back(world: World) -> None:
    """No times are none; `forget_all` forgets every fault and lets what hangs go."""
    looked_up = Faults(world.machine.control)
    faults.plan(looked_up.plan, "probe", 3, 9)
    faults.plan(looked_up.plan, "probe", 0, 9)
    assert faults.planned(looked_up.plan) == []
    faults.plan(looked_up.plan, "probe_hang", 1)
    hang = faults.strikes(looked_up, "probe_hang", 9)
    assert hang is not None and not hang.over
    faults.plan(looked_up.plan, "probe_hang", 3)
    assert not hang.over
    faults.forget_all(looked_up.plan)

    assert faults.planned(looked_up.plan) == []
    assert hang.over


# -- messages -------------------------------------------------------------------------------------------


def test_message_without_memory_stays_in_its_slot() -> None:
    """As in the kernel, without a reserve: no EOM; the next interrupt takes it, and what waited behind it."""
    with new_world(switches={"msg_reserve": False}) as world:
        world.boot()
        plan(world, "message_work")
        world.host.device(9)
        world.host.device(10)
        world.settle()
        assert not world.tables.relids.published()
        world.partition.request_interrupt(world.cpus[0].position, HYPERVISOR_CALLBACK_VECTOR)
        world.settle()

        assert sorted(world.tables.relids.published()) == [9, 10]


def test_message_without_memory_takes_a_record_that_is_kept(booted: World) -> None:
    """A reserve takes the message, and what comes behind it goes on."""
    plan(booted, "message_work")
    booted.host.device(9)
    booted.host.device(10)
    booted.settle()

    assert sorted(booted.tables.relids.published()) == [9, 10]


def hoard(world: World) -> list[WorkItem]:
    """All records of work that there are, the kept ones too, each with a rescind of a relid that nobody has."""
    rescind = RescindChannelOffer(77).pack()
    message = Struct("<IBBHQ").pack(1, len(rescind), 0, 0, 0) + rescind
    hoarded = []
    while (
        item := world.tables.work_queues.allocate(Works.VMBUS_ONMESSAGE_WORK, (), message, reserved=True)
    ) is not None:
        hoarded.append(item)
    return hoarded


def give_back(world: World, hoarded: list[WorkItem]) -> None:
    """All of them, the last one through a worker, which is how somebody hears of it."""
    queues, last = world.tables.work_queues, hoarded.pop()
    for item in hoarded:
        queues.discard(item)
    world.call(lambda current: queues.queue_work(current.actor, QueueNumber.RESCIND, last))
    world.settle()


def test_message_without_any_record_is_taken_when_one_comes_back(booted: World) -> None:
    """The kept ones are in use, too: it stays in its slot until a worker is done, and needs no interrupt for that."""
    hoarded = hoard(booted)
    booted.host.device(9)
    booted.host.device(10)
    booted.settle()
    assert not booted.tables.relids.published()

    give_back(booted, hoarded)

    assert sorted(booted.tables.relids.published()) == [9, 10]
    assert booted.shut_down() == {}


def test_every_processor_whose_message_found_no_record_is_interrupted(booted: World) -> None:
    """A host may post to any of them: who comes second to wait for a record does not take the first one's place."""
    hoarded = hoard(booted)
    for relid, cpu in ((9, 0), (10, 1)):
        offer = booted.host.device(relid, early=True)
        booted.host.channels[relid] = HostChannel(offer)
        booted.host.send(offer, position=booted.cpus[cpu].position)
    booted.settle()
    assert not booted.tables.relids.published()

    give_back(booted, hoarded)

    assert sorted(booted.tables.relids.published()) == [9, 10]
    assert booted.shut_down() == {}


@pytest.mark.parametrize("refusals", [2, 3, 4])
def test_record_comes_back_at_any_moment_of_the_search_for_one(
    booted: World, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    """Before the tasklet says that it waits, while it looks once more, or behind that: the message is taken."""
    queues = booted.tables.work_queues
    hoarded = []
    while (item := queues.allocate(Works.VMBUS_ONMESSAGE_WORK, reserved=True)) is not None:
        hoarded.append(item)
    worker = next(iter(booted.workers.values()))
    hooks = worker.hooks
    assert isinstance(hooks, WorkerThread)
    allocate, refused = queues.allocate, 0

    def allocate_beside_a_worker(*arguments: Any, **keywords: Any) -> WorkItem | None:
        nonlocal refused
        item = allocate(*arguments, **keywords)
        if item is None:
            refused += 1
            if refused == refusals:
                while hoarded:
                    queues.discard(hoarded.pop())
                if worker.connection.slot_waits.load():  # as `carry_out` ends
                    look_at_slot_again(worker, hooks)
        return item

    monkeypatch.setattr(queues, "allocate", allocate_beside_a_worker)
    booted.host.device(9)
    booted.settle()

    assert (refused, [*booted.tables.relids.published()]) == (refusals, [9])


def test_a_tasklet_that_never_gives_up_is_called_stuck() -> None:
    """The older form asks again for ever; its processor's process says so and ends."""
    with new_world(switches={"msg_reserve": False, "variant": "spin"}) as world:
        world.boot()
        plan(world, "message_work", 2 * MOST_TRIES)
        world.host.device(9)
        with pytest.raises(AssertionError, match="INV-29: the message tasklet asked"):
            world.settle()


def test_request_without_memory_fails_its_caller(booted: World) -> None:
    """No record for the GPADL's answer: probe fails, nothing was posted, the next device is opened."""
    plan(booted, "request", 1, 9)
    booted.host.device(9)
    booted.host.device(10)
    booted.settle()

    assert booted.tables.devices.from_handle(booted.channel(9).device_obj).probe_error == errno.ENOMEM
    assert booted.channel(10).state.load() == ChannelState.OPENED_STATE
    assert booted.shut_down() == {}


# -- primaries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", OF_PRIMARY, ids=str)
def test_offer_that_fails_is_given_back_once(booted: World, fault: str) -> None:
    """RELID_RELEASED once, the kernel's line, nothing leaked; the same id is good for the next offer."""
    plan(booted, fault)
    booted.host.device(9)
    booted.settle()
    assert booted.host.released == [9]
    nothing_left_of(booted, 9)
    assert booted.tables.devices.in_use == 0 and booted.tables.chn_list.empty
    assert LINES.get(fault, "") in "\n".join(booted.log)
    del booted.host.channels[9]
    booted.host.device(9)
    booted.settle()

    assert booted.channel(9).state.load() == ChannelState.OPENED_STATE
    assert booted.shut_down() == {}
    assert booted.host.released == [9, 9]


def test_directory_that_fails_closes_what_probe_opened(booted: World) -> None:
    """The driver had the device already: it is removed, its channel closed and torn down, then the id given back."""
    plan(booted, "add_kobj")
    booted.host.posted.clear()
    booted.host.device(9)
    booted.settle()

    assert [one for one in booted.host.types() if one != T.GPADL_BODY] == [
        T.GPADL_HEADER,
        T.OPENCHANNEL,
        T.CLOSECHANNEL,
        T.GPADL_TEARDOWN,
        T.RELID_RELEASED,
    ]
    told = [one.head.partition("@")[0] for one in uevent_text.since(booted.tables, 0)[-4:]]
    assert told == ["add", "bind", "unbind", "remove"]
    assert booted.shut_down() == {}


def test_probe_that_fails_is_no_error_of_the_offer(booted: World) -> None:
    """The device stays, unbound; nothing is released before its rescind."""
    plan(booted, "probe")
    booted.host.device(9)
    booted.settle()
    assert booted.host.released == []
    assert booted.tables.devices.from_handle(booted.channel(9).device_obj).probe_error == errno.EIO
    booted.host.rescind(9)
    booted.settle()

    assert booted.host.released == [9]
    nothing_left_of(booted, 9)


@pytest.mark.parametrize(("fault", "late"), list(product(IN_THE_WORK, (False, True))))
def test_rescind_meets_an_offer_that_fails(booted: World, fault: str, late: bool) -> None:
    """Claimed before the failure, or handled after it: one release, by one of the two; the id is good again."""
    plan(booted, fault)
    booted.host.device(9)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn("WORK")
    if late:
        booted.turn("PRI_CHAN")
    booted.host.rescind(9)
    booted.settle()
    assert booted.host.released == [9]
    nothing_left_of(booted, 9)
    del booted.host.channels[9]
    booted.host.device(9)
    booted.settle()

    assert booted.channel(9).state.load() == ChannelState.OPENED_STATE
    assert booted.shut_down() == {}


@pytest.mark.parametrize("fault", ("alloc_channel", "work_alloc"))
def test_rescind_of_an_offer_that_was_never_a_channel(booted: World, fault: str) -> None:
    """Its id was given back by the offer: the rescind finds nothing, and releases nothing."""
    plan(booted, fault)
    booted.host.device(9)
    booted.host.rescind(9)
    booted.settle()

    assert booted.host.released == [9]
    nothing_left_of(booted, 9)


def test_fault_of_one_relid_leaves_the_others_alone(booted: World) -> None:
    """Three offers at once, the second fails: the others are opened."""
    plan(booted, "device_register", 1, 8)
    for relid in (7, 8, 9):
        booted.host.device(relid)
    booted.settle()

    assert booted.host.released == [8]
    assert sorted(booted.tables.relids.published()) == [7, 9]
    assert booted.shut_down() == {}


def test_many_offers_that_fail_everywhere(booted: World) -> None:
    """Each fault five times over forty offers: as many releases as failures, and the rest open."""
    for fault in OF_PRIMARY:
        plan(booted, fault, 5)
    for relid in range(1, 41):
        booted.host.device(relid)
    booted.settle()

    released = booted.host.released
    assert len(released) == len(set(released)) == 25
    assert len(booted.tables.relids.published()) == 15
    assert booted.shut_down() == {}
    assert sorted(booted.host.released) == list(range(1, 41))


# -- sub-channels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", OF_SUB, ids=str)
def test_sub_channel_that_fails_is_given_back_once(booted: World, primary: Channel, fault: str) -> None:
    """Off its primary's list, released once, the driver does not hear of it; the primary goes on."""
    plan(booted, fault, 1, 9)
    booted.host.device(9, instance=5, index=1)
    booted.settle()

    assert booted.host.released == [9]
    nothing_left_of(booted, 9)
    assert booted.tables.sc_list(primary).empty
    assert booted.tables.connection.nr_chan_close_on_suspend.load() == 0
    assert primary.state.load() == ChannelState.OPENED_STATE
    primary.sc_creation_callback = 0
    booted.host.device(9, instance=5, index=1)
    booted.settle()
    assert booted.channel(9).primary_channel == primary.handle
    assert booted.shut_down() == {}


@pytest.mark.parametrize("late", [False, True])
def test_rescind_meets_a_sub_channel_that_fails(booted: World, primary: Channel, late: bool) -> None:
    """One release, by one of the two."""
    plan(booted, "add_kobj", 1, 9)
    booted.host.device(9, instance=5, index=1)
    booted.host.step()
    booted.turn("vcpu0")
    booted.turn("WORK")
    if late:
        booted.turn("SUB_CHAN")
    booted.host.rescind(9)
    booted.settle()

    assert booted.host.released == [9]
    nothing_left_of(booted, 9)
    assert booted.shut_down() == {}
