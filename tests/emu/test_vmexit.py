"""VM exits: every one is answered once, sleepers get exactly one token, and a guest's nonsense hurts nobody."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.counters import COUNTERS, Counters
from emu.errors import DeadlinePassed, GeneralProtection, MachineStopping
from emu.interrupts import Halt, PollPolicy
from emu.ipc.atomics import AtomicView
from emu.ipc.semaphores import Wakeup
from emu.layout import (
    D_EXIT_BELL,
    D_HOST_RUN_STATE,
    DOORBELLS,
    EXIT_SLOT,
    EXIT_SLOTS,
    VP_EXIT_SLOT,
    X_ARGUMENTS,
    X_CLAIMER,
    X_OPERATION,
    X_SERIAL,
    X_STATE,
    ExitOperation,
    ExitState,
    Fault,
    RunState,
    vp_page_offset,
    vps_bytes,
)
from emu.machine import Machine
from emu.vmexit import KEEP_NS, ExitClient, ExitRequest, ExitServer, HostBell, InvalidOpcode
from tests.emu.conftest import MakeMachine
from tests.interleaving import Actor, Check, SteppedWakeup, Turns, explore, stepped_view
from tests.processes import Crowd, Forked

WRMSR = ExitOperation.WRMSR


class FakeSemaphore:
    """Tokens of one slot, in this thread."""

    def __init__(self) -> None:
        self.tokens = 0
        self.blocks = 0

    def post(self) -> None:
        """One token."""
        self.tokens += 1

    def block(self, timeout_s: float = 1.0) -> bool:
        """Take a token if there is one; time does not pass."""
        self.blocks += 1
        if not self.tokens:
            return False
        self.tokens -= 1
        return True


class Exits:
    """Client of one VP and server of `vp_count`, on bytearrays; `serve_when_asked` answers while it polls."""

    def __init__(
        self,
        vp_count: int = 1,
        position: int = 0,
        *,
        deadline_ns: int = 5 * 10**9,
        poll_ns: int = -1,
        aside: Callable[[], object] | None = None,
    ) -> None:
        buffer = bytearray(vps_bytes(vp_count))
        self.memory = memoryview(buffer)
        self.vps = AtomicView(buffer)
        self.doorbells = AtomicView(bytearray(DOORBELLS.size))
        self.host = FakeSemaphore()
        self.semaphores = [[FakeSemaphore() for _ in range(EXIT_SLOTS)] for _ in range(vp_count)]
        self.stopping = False
        self.server = ExitServer(
            self.vps,
            self.memory,
            self.doorbells,
            vp_count,
            lambda position, slot: cast(Wakeup, self.semaphores[position][slot]),
        )
        self.client = ExitClient(
            self.vps,
            self.memory,
            self.doorbells,
            position,
            HostBell(self.doorbells, cast(Wakeup, self.host)),
            lambda slot: cast(Wakeup, self.semaphores[position][slot]),
            claimer=0x1234,
            poll_ns=poll_ns,
            stopping=lambda: self.stopping,
            deadline_ns=deadline_ns,
            aside=aside,
        )

    def at(self, position: int, slot: int, field: int = 0) -> int:
        """Offset of a field of a slot."""
        return vp_page_offset(position) + VP_EXIT_SLOT + EXIT_SLOT.size * slot + field

    def state(self, slot: int, position: int = 0) -> int:
        """State of a slot."""
        return self.vps.load_u32(self.at(position, slot, X_STATE))

    def ring(self, index: int) -> None:
        """Set a bell, as any guest can."""
        self.doorbells.fetch_or_u64(D_EXIT_BELL + 8 * (index // 64), 1 << index % 64)

    def answered(self, answer: Callable[[ExitRequest], tuple[tuple[int, int], int]]) -> None:
        """From now on the host answers as soon as it is woken (it is always HALTED before)."""
        self.doorbells.store_u32(D_HOST_RUN_STATE, RunState.HALTED)

        def serve() -> None:
            for request in self.server.take():
                result, fault = answer(request)
                self.server.answer(request, result, fault)

        vars(self.host)["post"] = serve
        self.client._host = HostBell(self.doorbells, cast(Wakeup, self.host))


def echo(request: ExitRequest) -> tuple[tuple[int, int], int]:
    """Answer with the first two arguments."""
    return (request.arguments[0], request.arguments[1]), Fault.NONE


# -- one exit -------------------------------------------------------------------------------------


def test_exit_gives_what_the_host_answered() -> None:
    """Arguments go in, two result words come back, and the slot is free again."""
    exits = Exits()
    exits.answered(echo)

    assert exits.client.exit(WRMSR, (1 << 64) - 1, 7, 9) == ((1 << 64) - 1, 7)
    assert exits.state(0) == ExitState.FREE
    assert exits.doorbells.load_u64(D_EXIT_BELL) == 0


def test_host_copies_the_whole_request() -> None:
    """Position, slot, claimer, operation, all three arguments and the serial reach the host."""
    exits = Exits(vp_count=3, position=2)
    seen: list[ExitRequest] = []
    exits.vps.store_u64(exits.at(2, 0, X_SERIAL), 99)

    def note(request: ExitRequest) -> tuple[tuple[int, int], int]:
        seen.append(request)
        return echo(request)

    exits.answered(note)
    exits.client.exit(ExitOperation.HYPERCALL, 1, 2, 3)

    (request,) = seen
    assert (request.position, request.slot, request.claimer, request.serial) == (2, 0, 0x1234, 99)
    assert (request.operation, request.arguments) == (ExitOperation.HYPERCALL, (1, 2, 3))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(Fault.GENERAL_PROTECTION, GeneralProtection), (Fault.INVALID_OPCODE, InvalidOpcode)],
)
@pytest.mark.parametrize("operation", [ExitOperation.RDMSR, 0, 99])
def test_fault_is_raised_and_frees_the_slot(fault: int, kind: type[Exception], operation: int) -> None:
    """A fault is no status: it is raised, for operations that do not exist, too, and the slot is free."""
    exits = Exits()
    exits.answered(lambda _request: ((0, 0), fault))

    with pytest.raises(kind) as caught:
        exits.client.exit(operation, 0x40000071)

    assert type(caught.value) is kind
    assert exits.state(0) == ExitState.FREE


def test_slot_keeps_no_fault_for_the_next_exit() -> None:
    """An exit that went wrong does not colour its successor."""
    exits = Exits()
    exits.answered(lambda _request: ((0, 0), Fault.GENERAL_PROTECTION))
    with pytest.raises(GeneralProtection):
        exits.client.exit(WRMSR)
    exits.answered(echo)

    assert exits.client.exit(WRMSR, 5) == (5, 0)


def test_host_that_is_awake_gets_no_token() -> None:
    """Only a host that said HALTED is woken; the bell is enough for the others."""
    exits = Exits(deadline_ns=1)
    with pytest.raises(DeadlinePassed):
        exits.client.exit(WRMSR)

    assert exits.host.tokens == 0
    assert exits.doorbells.load_u64(D_EXIT_BELL) == 1


def test_sleeper_gets_one_token() -> None:
    """The host posts for a slot that says SLEEPING, and for no other."""
    exits = Exits()
    request = ExitRequest(0, 3, 1, WRMSR, (0, 0, 0), 0)
    tokens = {}
    for state in ExitState:
        exits.vps.store_u32(exits.at(0, 3), state)
        exits.server.answer(request, (1, 2), 0)
        tokens[state] = exits.semaphores[0][3].tokens
        exits.semaphores[0][3].tokens = 0

    assert {state for state, count in tokens.items() if count} == {ExitState.SLEEPING}
    assert tokens[ExitState.SLEEPING] == 1


def test_stale_token_does_not_end_a_wait() -> None:
    """A token that a dead predecessor left behind wakes the sleeper, who finds no answer and sleeps on."""
    exits = Exits()
    semaphore = exits.semaphores[0][0]
    semaphore.post()
    looks: list[int] = []

    def answer_late(_timeout_s: float = 1.0) -> bool:
        looks.append(1)
        if len(looks) == 2:
            (request,) = exits.server.take()
            exits.server.answer(request, (8, 0))
        return FakeSemaphore.block(semaphore)

    vars(semaphore)["block"] = answer_late

    assert exits.client.exit(WRMSR) == (8, 0)
    assert len(looks) == 2
    assert semaphore.tokens == 0


# -- no answer ------------------------------------------------------------------------------------


def test_dead_host_is_a_deadline() -> None:
    """Without an answer the exit ends with the slot's name and the time it waited."""
    exits = Exits(deadline_ns=3_000_000)
    with pytest.raises(DeadlinePassed, match=r"exit slot 0 of VP page 0: no answer within 0.003 s"):
        exits.client.exit(WRMSR)

    assert exits.semaphores[0][0].blocks >= 1


def test_stopping_machine_ends_a_wait() -> None:
    """A machine that ends is not waited for."""
    exits = Exits()
    exits.stopping = True

    with pytest.raises(MachineStopping):
        exits.client.exit(WRMSR)


def fill(exits: Exits) -> None:
    """Claim all slots, as eight threads in flight do."""
    for slot in range(EXIT_SLOTS):
        exits.vps.store_u32(exits.at(0, slot), ExitState.CLAIMED)


def test_full_slots_are_waited_for_until_the_deadline() -> None:
    """A ninth thread that never gets a slot says what it waited for."""
    exits = Exits(deadline_ns=2_000_000)
    fill(exits)

    with pytest.raises(DeadlinePassed, match="a free exit slot of VP page 0"):
        exits.client.exit(WRMSR)


def test_stopping_machine_ends_the_wait_for_a_slot() -> None:
    """Neither is a slot waited for on a machine that ends."""
    exits = Exits()
    fill(exits)
    exits.stopping = True

    with pytest.raises(MachineStopping):
        exits.client.exit(WRMSR)


def test_ninth_thread_takes_the_slot_that_becomes_free() -> None:
    """As soon as one is given back the exit goes on, in that slot."""
    exits = Exits()
    exits.answered(echo)
    fill(exits)
    threading.Timer(0.01, lambda: exits.vps.store_u32(exits.at(0, 6), ExitState.FREE)).start()

    assert exits.client.exit(WRMSR, 4) == (4, 0)


# -- bells ----------------------------------------------------------------------------------------


def test_every_slot_of_every_vp_has_a_bell() -> None:
    """A request in any slot is found by its own bell, and by no other."""
    exits = Exits(vp_count=9)
    for index in range(9 * EXIT_SLOTS):
        position, slot = divmod(index, EXIT_SLOTS)
        exits.vps.store_u32(exits.at(position, slot), ExitState.RUNG)
        exits.ring(index)

        requests = exits.server.take()

        assert [(request.position, request.slot) for request in requests] == [(position, slot)]
        exits.vps.store_u32(exits.at(position, slot), ExitState.FREE)


def test_bells_of_one_round_are_taken_once() -> None:
    """All that rang come in one taking, and none comes again."""
    exits = Exits()
    for slot in range(EXIT_SLOTS):
        exits.vps.store_u32(exits.at(0, slot), ExitState.RUNG)
        exits.ring(slot)

    assert [request.slot for request in exits.server.take()] == list(range(EXIT_SLOTS))
    assert exits.server.take() == []


@pytest.mark.parametrize("state", [ExitState.FREE, ExitState.CLAIMED, ExitState.DONE])
def test_bell_without_an_exit_is_counted(state: int) -> None:
    """A guest that rings for nothing gets nothing, and is counted."""
    exits = Exits()
    exits.vps.store_u32(exits.at(0, 2), state)
    exits.ring(2)

    assert exits.server.take() == []
    assert exits.server.unknown_bells == 1


def test_bell_of_no_slot_is_counted() -> None:
    """Bits behind the last VP's are cleared and counted."""
    exits = Exits(vp_count=2)
    exits.ring(2 * EXIT_SLOTS)
    exits.ring(63)

    assert exits.server.take() == []
    assert exits.server.unknown_bells == 2
    assert [load() for load in exits.server.loads] == [0]


def test_slots_of_a_dead_guest_are_free_again() -> None:
    """Whatever state it died in, its slots can be claimed; an ATTACH that waits already is its successor's."""
    exits = Exits()
    for slot, state in enumerate(ExitState):
        exits.vps.store_u32(exits.at(0, slot), state)
        exits.vps.store_u32(exits.at(0, slot, X_OPERATION), ExitOperation.WRMSR)
    exits.vps.store_u32(exits.at(0, 5), ExitState.SLEEPING)
    exits.vps.store_u32(exits.at(0, 5, X_OPERATION), ExitOperation.ATTACH)

    exits.server.reclaim()

    assert [exits.state(slot) for slot in range(6)] == [0, 0, 0, 0, 0, ExitState.SLEEPING]


@given(
    slots=st.lists(st.binary(min_size=64, max_size=64), min_size=EXIT_SLOTS, max_size=EXIT_SLOTS),
    bells=st.integers(min_value=0, max_value=(1 << 64) - 1),
)
def test_host_survives_any_slots_and_any_bells(slots: list[bytes], bells: int) -> None:
    """Whatever bytes stand in slots and bells: what looks like an exit is answered, the rest is counted."""
    exits = Exits()
    for slot, content in enumerate(slots):
        exits.memory[exits.at(0, slot) : exits.at(0, slot) + 64] = content
    exits.doorbells.store_u64(D_EXIT_BELL, bells)

    requests = exits.server.take()
    for request in requests:
        exits.server.answer(request, (1, 2), Fault.NONE)
    exits.server.reclaim()

    assert len(requests) + exits.server.unknown_bells == bells.bit_count()
    assert exits.server.take() == []


def test_slot_that_changes_under_the_host_is_answered_as_it_was_read() -> None:
    """The host copies once: what the guest writes behind the copy concerns nobody."""
    exits = Exits()
    exits.vps.store_u32(exits.at(0, 0), ExitState.RUNG)
    exits.vps.store_u64(exits.at(0, 0, X_ARGUMENTS), 5)
    exits.ring(0)
    (request,) = exits.server.take()
    exits.vps.store_u64(exits.at(0, 0, X_ARGUMENTS), 6)
    exits.vps.store_u32(exits.at(0, 0, X_CLAIMER), 7)

    assert request.arguments == (5, 0, 0)
    exits.server.answer(request)
    assert exits.state(0) == ExitState.DONE


# -- every order of steps -------------------------------------------------------------------------


def new_counters() -> Counters:
    """Counters that are flushed to nowhere of interest."""
    return Counters(bytearray(8 * len(COUNTERS)), 0)


def exits_and_host(turns: Turns, clients: int) -> tuple[list[Actor], Check]:
    """Threads of one VP that exit once each, and a host that halts until it has answered them all."""
    vps, doorbells = bytearray(vps_bytes(1)), bytearray(DOORBELLS.size)
    vps_view, doorbells_view = stepped_view(turns, vps), stepped_view(turns, doorbells)
    host = SteppedWakeup(turns)
    semaphores = [SteppedWakeup(turns) for _ in range(EXIT_SLOTS)]
    answers: list[tuple[int, int]] = []

    def thread(number: int) -> None:
        client = ExitClient(
            vps_view,
            memoryview(vps),
            doorbells_view,
            0,
            HostBell(doorbells_view, host.as_wakeup()),
            lambda slot: semaphores[slot].as_wakeup(),
            poll_ns=-1,
            stopping=lambda: False,
        )
        answers.append(client.exit(WRMSR, number))

    def serve() -> None:
        server = ExitServer(
            vps_view,
            memoryview(vps),
            doorbells_view,
            1,
            lambda _position, slot: semaphores[slot].as_wakeup(),
        )
        look = server.loads[0]
        halt = Halt(doorbells_view, D_HOST_RUN_STATE, host.as_wakeup(), look, PollPolicy("off"), new_counters())
        left = clients
        while left:
            halt.halt(10**9)
            for request in server.take():
                server.answer(request, (request.arguments[0] + 10, 0))
                left -= 1

    def check() -> None:
        assert sorted(answers) == [(number + 10, 0) for number in range(clients)]
        assert [semaphore.tokens for semaphore in semaphores] == [0] * EXIT_SLOTS
        assert host.tokens == 0
        view = AtomicView(vps)
        first = vp_page_offset(0) + VP_EXIT_SLOT
        assert [view.load_u32(first + 64 * slot) for slot in range(EXIT_SLOTS)] == [0] * EXIT_SLOTS

    return [*(partial(thread, number) for number in range(clients)), serve], check


def test_no_order_of_steps_loses_an_exit() -> None:
    """One thread and the host, every order with at most one preemption: answered, no token left."""
    assert explore(lambda turns: exits_and_host(turns, 1), preemptions=1) > 40


@pytest.mark.soak
def test_no_order_of_many_steps_loses_an_exit() -> None:
    """One thread with more preemptions, and two threads."""
    explore(lambda turns: exits_and_host(turns, 1), preemptions=2)
    explore(lambda turns: exits_and_host(turns, 2), preemptions=1)


# -- real processes -------------------------------------------------------------------------------


def client_of(machine: Machine, position: int, *, poll_ns: int, deadline_ns: int = 60 * 10**9) -> ExitClient:
    """A client on a real machine, as a vCPU makes it."""
    return ExitClient(
        machine.vps.view,
        machine.vps_memory,
        machine.doorbells.view,
        position,
        HostBell(machine.doorbells.view, machine.wakeup("host")),
        machine.exit_wakeups(position),
        poll_ns=poll_ns,
        stopping=lambda: machine.stopping,
        deadline_ns=deadline_ns,
    )


def many_threads_exit(machine: Machine, threads: int, exits: int) -> None:
    """A guest process with several threads on each of two VPs, and a host process that halts in between."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    left = machine.vps.view.cell_u32(2048)
    left.store(2)

    def guest(position: int) -> None:
        wrong: list[object] = []

        def run(number: int) -> None:
            chance = random.Random(seed + 100 * position + number)
            client = client_of(machine, position, poll_ns=chance.choice((0, 0, 60_000)))
            for _ in range(exits):
                value = chance.getrandbits(64)
                answer = client.exit(WRMSR, value, number)
                if answer != (value ^ 0xFF, number):
                    wrong.append((value, answer))

        crowd = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        assert wrong == []
        left.fetch_sub(1)
        HostBell(machine.doorbells.view, machine.wakeup("host")).wake()

    def host() -> None:
        server = ExitServer(
            machine.vps.view,
            machine.vps_memory,
            machine.doorbells.view,
            machine.vp_count,
            lambda position, slot: machine.wakeup(f"exit.{position}.{slot}"),
        )
        halt = Halt(
            machine.doorbells.view,
            D_HOST_RUN_STATE,
            machine.wakeup("host"),
            lambda: any(load() for load in server.loads) or not left.load(),
            PollPolicy("off"),
            new_counters(),
        )
        answered = 0
        while left.load():
            for request in server.take():
                server.answer(request, (request.arguments[0] ^ 0xFF, request.arguments[1]))
                answered += 1
            halt.halt(10**9)
        assert answered == 2 * threads * exits
        assert server.unknown_bells == 0

    with Crowd() as crowd:
        crowd.start(host)
        crowd.start(lambda: guest(0))
        crowd.start(lambda: guest(1))

    for position in range(machine.vp_count):
        for slot in range(EXIT_SLOTS):
            assert machine.wakeup(f"exit.{position}.{slot}").try_take() is False
            assert machine.vps.view.load_u32(vp_page_offset(position) + VP_EXIT_SLOT + 64 * slot) == 0


def test_many_threads_on_one_vp_are_all_answered(make_machine: MakeMachine) -> None:
    """Ten threads share the eight slots of each of two VPs: every exit gets its own answer, no token stays."""
    many_threads_exit(make_machine(), threads=10, exits=150)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_very_many_exits_are_all_answered(make_machine: MakeMachine) -> None:
    """The same for long."""
    many_threads_exit(make_machine(), threads=10, exits=3_000)


def test_killed_host_is_noticed_by_the_deadline(make_machine: MakeMachine) -> None:
    """A host that dies with an exit in its hands: the guest's thread ends with the reason, in time."""
    machine = make_machine()
    served = machine.vps.view.cell_u32(2048)

    def host() -> None:
        server = ExitServer(
            machine.vps.view,
            machine.vps_memory,
            machine.doorbells.view,
            machine.vp_count,
            lambda position, slot: machine.wakeup(f"exit.{position}.{slot}"),
        )
        while not (requests := server.take()):
            os.sched_yield()
        server.answer(requests[0])
        while not server.take():
            os.sched_yield()
        served.store(1)
        while True:
            signal.pause()  # until it is killed

    with Forked(host) as dying:
        client = client_of(machine, 0, poll_ns=0, deadline_ns=400_000_000)
        first = client.exit(WRMSR)

        def kill() -> None:
            while not served.load():
                os.sched_yield()
            dying.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(DeadlinePassed):
            client.exit(WRMSR)
        killer.join()

    assert first == (0, 0)


def test_a_host_that_waits_for_this_core_is_let_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exit keeps its core 20 us; behind one whose answer came with a long yield, the next yields at once.

    That it was so is told to whoever may take the thread to another core.
    """
    told: list[int] = []
    moment = SimpleNamespace(now=0, took=0, yielded=0)
    pair = Exits(poll_ns=1_000_000, aside=lambda: told.append(moment.took))

    def tick() -> int:
        moment.now += 1_000
        return int(moment.now)

    def give_away() -> None:
        moment.yielded = moment.now
        moment.now += moment.took
        for request in pair.server.take():
            pair.server.answer(request)

    monkeypatch.setattr("emu.vmexit.time.monotonic_ns", tick)
    monkeypatch.setattr("emu.vmexit.os.sched_yield", give_away)
    kept = []
    for took in (30_000, 30_000, 1_000, 1_000):
        moment.took, began = took, moment.now
        pair.client.exit(WRMSR)
        kept.append(moment.yielded - began >= KEEP_NS)

    assert kept == [True, False, False, True]
    assert told == [30_000, 30_000]
