"""The signal doorbell: each id is told apart, rings merge, and none is lost between two processes."""

from __future__ import annotations

import os
import random
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu import interrupts
from emu.counters import COUNTERS, Counters
from emu.doorbells import DoorbellServer, make_bell
from emu.interrupts import Halt, PollPolicy
from emu.ipc.atomics import AtomicView
from emu.layout import (
    CONNECTIONS,
    D_CONNECTION,
    D_CONNECTION_SUMMARY,
    D_HOST_RUN_STATE,
    DOORBELLS,
    RunState,
)
from tests.emu.conftest import MakeMachine
from tests.interleaving import Actor, Check, SteppedWakeup, Turns, explore, stepped_view
from tests.processes import Crowd

connection_ids = st.integers(min_value=0, max_value=CONNECTIONS - 1)


def new_doorbells() -> AtomicView:
    """A doorbell segment that nobody rang."""
    return AtomicView(bytearray(DOORBELLS.size))


def nobody() -> None:
    """A host that must not be posted to."""
    raise AssertionError("the host was awake")


def new_counters() -> Counters:
    """Counters that are flushed to nowhere of interest."""
    return Counters(bytearray(8 * len(COUNTERS)), 0)


# -- ringing and taking ---------------------------------------------------------------------------


@given(st.sets(connection_ids, max_size=40))
def test_every_id_that_rang_is_taken_once(ids: set[int]) -> None:
    """Any set of ids comes back as it was rung, and then nothing more."""
    view = new_doorbells()
    server = DoorbellServer(view)
    for connection_id in ids:
        make_bell(view, connection_id, nobody)()

    assert sorted(server.take()) == sorted(ids)
    assert server.take() == []
    assert [load() for load in server.loads] == [0, 0, 0, 0]


def test_rings_of_one_id_merge() -> None:
    """An id that rang three times before the host looked rang once."""
    view = new_doorbells()
    bell = make_bell(view, 0x2007, nobody)
    for _ in range(3):
        bell()

    assert DoorbellServer(view).take() == [0x2007]


@pytest.mark.parametrize("connection_id", [-1, CONNECTIONS, 1 << 24])
def test_id_without_a_bit_has_no_bell(connection_id: int) -> None:
    """Ids of 16,384 and above use the hypercall; making a bell for one is our mistake."""
    with pytest.raises(AssertionError):
        make_bell(new_doorbells(), connection_id, nobody)


def test_halted_host_is_woken_by_whoever_takes_its_announcement() -> None:
    """One token for a halted host, however many ring."""
    view = new_doorbells()
    posts: list[int] = []
    view.store_u32(D_HOST_RUN_STATE, RunState.HALTED)
    for connection_id in (1, 2, 3):
        make_bell(view, connection_id, lambda: posts.append(1))()

    assert posts == [1]
    assert view.load_u32(D_HOST_RUN_STATE) == RunState.AWAKE


def test_host_survives_a_bitmap_full_of_rings() -> None:
    """A guest may set every bit there is: each id comes once, in one bounded taking."""
    view = new_doorbells()
    for word in range(CONNECTIONS // 64):
        view.store_u64(D_CONNECTION + 8 * word, (1 << 64) - 1)
    for word in range(4):
        view.store_u64(D_CONNECTION_SUMMARY + 8 * word, (1 << 64) - 1)
    server = DoorbellServer(view)

    assert server.take() == list(range(CONNECTIONS))
    assert server.take() == []


def test_summary_without_a_ring_is_nothing() -> None:
    """A summary bit whose word is empty (its ring was taken with an earlier one) is no ring."""
    view = new_doorbells()
    view.store_u64(D_CONNECTION_SUMMARY, 0b101)

    assert DoorbellServer(view).take() == []


def test_ring_without_its_summary_waits_for_it() -> None:
    """A ringer between its two stores is not missed, only not seen yet."""
    view = new_doorbells()
    server = DoorbellServer(view)
    view.store_u64(D_CONNECTION, 1 << 5)
    before = server.take()
    view.store_u64(D_CONNECTION_SUMMARY, 1)

    assert (before, server.take()) == ([], [5])


# -- every order of steps -------------------------------------------------------------------------


def ringing(turns: Turns, ids: list[list[int]]) -> tuple[list[Actor], Check]:
    """Ringers with their ids, and a host that halts until it has taken each of them."""
    view = stepped_view(turns, bytearray(DOORBELLS.size))
    host = SteppedWakeup(turns)
    wanted = {connection_id for some in ids for connection_id in some}
    taken: set[int] = set()

    def ring(some: list[int]) -> None:
        for connection_id in some:
            make_bell(view, connection_id, host.post)()

    def serve() -> None:
        server = DoorbellServer(view)
        # One word of the four is in use: looked at alone, the number of orders stays small.
        server.loads = server.loads[:1]
        halt = Halt(view, D_HOST_RUN_STATE, host.as_wakeup(), server.loads[0], PollPolicy("off"), new_counters())
        while taken != wanted:
            halt.halt(10**9)
            taken.update(server.take())

    def check() -> None:
        assert taken == wanted
        assert host.tokens == 0

    return [serve, *(partial(ring, some) for some in ids)], check


def test_no_order_of_steps_loses_a_ring() -> None:
    """One ringer and a halting host, every order with at most four preemptions."""
    assert explore(lambda turns: ringing(turns, [[7]]), preemptions=4) > 100


def test_ringers_of_one_word_lose_nothing() -> None:
    """Two ringers whose bits stand in one word: the second is found with the first, or comes by itself."""
    assert explore(lambda turns: ringing(turns, [[7], [9]]), preemptions=1) > 100


@pytest.mark.soak
def test_ringers_lose_nothing_in_many_orders() -> None:
    """More preemptions, and two rings each, in one word and in two."""
    explore(lambda turns: ringing(turns, [[7], [9]]), preemptions=2)
    explore(lambda turns: ringing(turns, [[7, 70], [9, 71]]), preemptions=1)


# -- real processes -------------------------------------------------------------------------------


def rings_meet_a_host(make_machine: MakeMachine, rounds: int) -> None:
    """Two ringers, each waiting until its ring was taken, and a host that blocks whenever it can."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    machine = make_machine()
    view = machine.doorbells.view
    ids = [range(0, 256, 2), range(1, 256, 2)]
    left = machine.ram.view.cell_u32(0)
    left.store(2)

    def heard_at(connection_id: int) -> int:
        return 4096 + 8 * connection_id

    def serve() -> None:
        # No watchdog helps here: a lost ring has to show.
        vars(interrupts)["WATCHDOG_S"] = 3600.0
        server = DoorbellServer(view)
        loads = server.loads
        counters = new_counters()
        halt = Halt(
            view,
            D_HOST_RUN_STATE,
            machine.wakeup("host"),
            lambda: any(load() for load in loads) or not left.load(),
            PollPolicy("off"),
            counters,
        )
        while left.load():
            for connection_id in server.take():
                machine.ram.view.fetch_add_u64(heard_at(connection_id), 1)
            halt.halt(60 * 10**9)
        assert counters.blocks > 0

    def ring(who: int) -> None:
        chance = random.Random(seed + who)
        bells = {one: make_bell(view, one, machine.wakeup("host").post) for one in ids[who]}
        rung = dict.fromkeys(bells, 0)
        for number in range(rounds):
            connection_id = chance.choice(ids[who])
            bells[connection_id]()
            rung[connection_id] += 1
            heard = machine.ram.view.cell_u64(heard_at(connection_id)).load
            deadline = time.monotonic() + 30
            while heard() < rung[connection_id]:
                os.sched_yield()
                assert time.monotonic() < deadline, f"ring {number} of {connection_id} was lost (seed {seed})"
            for _ in range(chance.choice((0, 10, 300, 2_000))):
                pass
        left.fetch_sub(1)
        # Whoever leaves rings once more, so that the host looks at `left`.
        make_bell(view, 300, machine.wakeup("host").post)()

    with Crowd() as crowd:
        crowd.start(serve)
        crowd.start(lambda: ring(0))
        crowd.start(lambda: ring(1))

    assert machine.wakeup("host").try_take() is False


def test_no_ring_between_processes_is_lost(make_machine: MakeMachine) -> None:
    """Rings at random moments meet a host that blocks: all are heard, no token stays."""
    rings_meet_a_host(make_machine, rounds=1_000)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_no_ring_of_very_many_is_lost(make_machine: MakeMachine) -> None:
    """The same for long."""
    rings_meet_a_host(make_machine, rounds=50_000)
