"""Interrupt words: taken by class, ended, merged; and no request is ever lost, whatever the VP is doing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, count, cycle
from types import FrameType
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu import interrupts
from emu.counters import COUNTERS, Counters
from emu.interrupt_trace import halt_of
from emu.interrupts import (
    AWAKE,
    COMPUTING,
    HALTED,
    HOLD_OFF_NS,
    IN_ISR,
    INTERRUPTS_OFF,
    MOST_REQUESTS,
    POLL_START_NS,
    TURNS,
    Halt,
    InterruptRequester,
    Lapic,
    PollPolicy,
)
from emu.ipc.atomics import AtomicView
from emu.ipc.segments import Segment, object_name
from emu.ipc.semaphores import WATCHDOG_S, Wakeup
from emu.layout import (
    VECTOR_WORDS,
    VP_AUTO_EOI,
    VP_IN_SERVICE,
    VP_REQUEST,
    VP_RUN_STATE,
    RunState,
    vp_page_offset,
    vps_bytes,
)
from emu.machine import KICK_SIGNAL
from emu.tracing import E_HALT, E_HALT_END, E_POLL, OneByOne, Recorder
from tests.interleaving import Actor, Check, SteppedWakeup, Stuck, Turns, explore, stepped_view
from tests.processes import Crowd

PAGE = vp_page_offset(0)


def new_counters() -> Counters:
    """Counters that are flushed to nowhere of interest."""
    return Counters(bytearray(8 * len(COUNTERS)), 0)


class FakeKick:
    """Counts kicks; `process` says whether there is a process to signal."""

    def __init__(self, *, process: bool = True) -> None:
        self.posts = 0
        self.signals = 0
        self.process = process

    def post(self) -> None:
        """A token."""
        self.posts += 1

    def interrupt(self) -> bool:
        """A signal."""
        self.signals += self.process
        return self.process


class Vp:
    """One VP page on a bytearray, with its taker and one requester."""

    def __init__(self, state: int = AWAKE, *, process: bool = True) -> None:
        self.view = AtomicView(bytearray(vps_bytes(1)))
        self.lapic = Lapic(self.view, 0)
        self.kick = FakeKick(process=process)
        self.counters = new_counters()
        self.requester = InterruptRequester(self.view, 0, self.kick, self.counters)
        self.request = self.requester.request
        self.view.store_u32(PAGE + VP_RUN_STATE, state)

    def auto_eoi(self, vector: int) -> None:
        """What the host does at a SINT write."""
        self.view.fetch_or_u64(PAGE + VP_AUTO_EOI + 8 * (vector >> 6), 1 << (vector & 63))

    def words(self, offset: int) -> int:
        """Four words as one number: bit v is vector v."""
        loads = (self.view.load_u64(PAGE + offset + 8 * word) for word in range(VECTOR_WORDS))
        return sum(value << 64 * word for word, value in enumerate(loads))

    @property
    def state(self) -> int:
        """The run state."""
        return self.view.load_u32(PAGE + VP_RUN_STATE)


@pytest.mark.parametrize("state", list(RunState))
@pytest.mark.parametrize("process", [True, False])
@pytest.mark.parametrize("vector", [0x31, 0xF3])
def test_bound_request_is_a_request(state: RunState, process: bool, vector: int) -> None:
    """Twice each, in every run state: the same words, kicks and counts."""
    seen = []
    for bound in (False, True):
        vp = Vp(state, process=process)
        request = vp.requester.bound(vector) if bound else partial(vp.request, vector)
        for _ in range(2):
            request()
        vp.counters.flush()
        counts = [getattr(vp.counters, name) for name in COUNTERS]
        seen.append((vp.words(VP_REQUEST), vp.state, vp.kick.posts, vp.kick.signals, counts))

    assert seen[0] == seen[1]


# -- taking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", range(16, 256))
def test_every_vector_is_taken_once(vector: int) -> None:
    """Request, take, end: each of the 240 vectors, the last bit of each word included."""
    vp = Vp()
    vp.request(vector)

    assert vp.lapic.deliverable()
    assert vp.lapic.take() == vector
    assert (vp.words(VP_REQUEST), vp.words(VP_IN_SERVICE)) == (0, 1 << vector)
    assert vp.lapic.take() == 0
    vp.lapic.eoi()
    assert vp.words(VP_IN_SERVICE) == 0


def test_idle_processor_takes_nothing() -> None:
    """Without a request there is nothing to deliver."""
    vp = Vp()

    assert vp.lapic.deliverable() is False
    assert (vp.lapic.highest_request(), vp.lapic.take()) == (0, 0)


def test_highest_vector_goes_first() -> None:
    """Of several requests the highest vector is taken, whichever word it stands in."""
    vp = Vp()
    for vector in (0x31, 0xF3, 0x72, 0xB0):
        vp.request(vector)

    taken = []
    while vector := vp.lapic.take():
        taken.append(vector)
        vp.lapic.eoi()

    assert taken == [0xF3, 0xB0, 0x72, 0x31]


def test_equal_class_waits_for_the_end_of_interrupt() -> None:
    """A vector of the class in service (same upper four bits), higher or lower, waits for the EOI."""
    vp = Vp()
    vp.request(0xF3)
    vp.lapic.take()
    vp.request(0xFB)
    vp.request(0xF0)

    assert vp.lapic.deliverable() is False
    assert vp.lapic.take() == 0
    vp.lapic.eoi()
    assert vp.lapic.take() == 0xFB


def test_higher_class_interrupts_the_one_in_service() -> None:
    """Service nests by class and ends in reverse order."""
    vp = Vp()
    for vector in (0x31, 0x72, 0xF3):
        vp.request(vector)
        assert vp.lapic.take() == vector

    assert list(vp.lapic.in_service) == [0x31, 0x72, 0xF3]
    vp.lapic.eoi()
    assert list(vp.lapic.in_service) == [0x31, 0x72]
    assert vp.words(VP_IN_SERVICE) == 1 << 0x31 | 1 << 0x72


def test_end_of_interrupt_without_one_does_nothing() -> None:
    """An EOI too many is harmless."""
    vp = Vp()
    vp.lapic.eoi()

    assert vp.words(VP_IN_SERVICE) == 0


def test_auto_eoi_vector_is_never_in_service() -> None:
    """It needs no EOI, and an equal class is not held back by it."""
    vp = Vp()
    vp.auto_eoi(0xF3)
    vp.request(0xF3)
    first = vp.lapic.take()
    vp.request(0xF1)

    assert (first, vp.lapic.in_service) == (0xF3, ())
    assert vp.lapic.take() == 0xF1


def test_request_for_a_vector_in_service_waits_for_its_end() -> None:
    """A request that comes while its handler runs is kept, and taken after the EOI."""
    vp = Vp()
    vp.request(0xF3)
    vp.lapic.take()
    vp.request(0xF3)

    assert vp.lapic.take() == 0
    vp.lapic.eoi()
    assert vp.lapic.take() == 0xF3


class ModelLapic:
    """The same rules on a set and a list, from the text of the specification."""

    def __init__(self, auto_eoi: set[int]) -> None:
        self.requested: set[int] = set()
        self.serving: list[int] = []
        self.auto_eoi = auto_eoi

    def take(self) -> int:
        """The highest request if its class is above that in service."""
        highest = max(self.requested, default=0)
        if not highest or (self.serving and highest >> 4 <= max(self.serving) >> 4):
            return 0
        self.requested.remove(highest)
        if highest not in self.auto_eoi:
            self.serving.append(highest)
        return highest

    def eoi(self) -> None:
        """Ends the highest."""
        if self.serving:
            self.serving.remove(max(self.serving))


vectors = st.integers(min_value=16, max_value=255)
steps = st.one_of(vectors, st.sampled_from(["take", "eoi"]))


@given(auto_eoi=st.sets(vectors, max_size=3), script=st.lists(steps, max_size=40))
def test_words_follow_the_model(auto_eoi: set[int], script: list[int | str]) -> None:
    """Any sequence of requests, takes and EOIs delivers what the specification delivers."""
    vp = Vp()
    for vector in auto_eoi:
        vp.auto_eoi(vector)
    model = ModelLapic(auto_eoi)
    for step in script:
        if step == "take":
            assert vp.lapic.take() == model.take()
        elif step == "eoi":
            vp.lapic.eoi()
            model.eoi()
        else:
            vp.request(int(step))
            model.requested.add(int(step))

    assert list(vp.lapic.in_service) == sorted(model.serving)
    assert vp.words(VP_REQUEST) == sum(1 << vector for vector in model.requested)


# -- kicks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [AWAKE, IN_ISR, INTERRUPTS_OFF])
def test_processor_that_looks_by_itself_is_not_kicked(state: int) -> None:
    """At safe points, in the ISR, with interrupts off: the bit is enough."""
    vp = Vp(state)
    vp.request(0xF3)

    assert (vp.kick.posts, vp.kick.signals, vp.counters.kicks_none) == (0, 0, 1)
    assert vp.state == state


def test_halted_processor_gets_one_token() -> None:
    """Whoever exchanges HALTED away posts; the next requester finds the VP awake."""
    vp = Vp(HALTED)
    vp.request(0xF3)
    vp.request(0xF2)

    assert (vp.kick.posts, vp.state) == (1, AWAKE)
    assert (vp.counters.kicks_semaphore, vp.counters.kicks_none) == (1, 1)


def test_computing_processor_is_signalled() -> None:
    """Each new request interrupts it; the state is the VP's own to change."""
    vp = Vp(COMPUTING)
    vp.request(0xF3)
    vp.request(0xF2)

    assert (vp.kick.signals, vp.state, vp.counters.kicks_signal) == (2, COMPUTING, 2)


def test_processor_without_a_process_is_not_signalled() -> None:
    """A foreign VP that says it computes gets nothing: its bit is set, its looking is its own affair."""
    vp = Vp(COMPUTING, process=False)
    vp.request(0xF3)

    assert (vp.counters.kicks_signal, vp.counters.kicks_none) == (0, 1)


def test_equal_requests_merge() -> None:
    """A vector that is requested already is requested once, and whoever set the bit owes the kick."""
    vp = Vp(HALTED)
    for _ in range(3):
        vp.request(0xF3)

    assert (vp.counters.requested, vp.counters.merged, vp.kick.posts) == (3, 2, 1)
    assert vp.lapic.take() == 0xF3
    assert vp.lapic.take() == 0


@pytest.mark.parametrize("state", [5, 77, 0xFFFFFFFF])
def test_nonsense_in_the_run_state_is_survived(state: int) -> None:
    """A guest may write anything there; the bit is set, nobody is kicked."""
    vp = Vp(state)
    vp.request(0xF3)

    assert (vp.kick.posts, vp.kick.signals, vp.state) == (0, 0, state)
    assert vp.lapic.take() == 0xF3


# -- how long to poll -----------------------------------------------------------------------------


def test_polling_off_never_polls() -> None:
    """`off` blocks at once, whatever was measured."""
    policy = PollPolicy("off")
    policy.blocked_for(1)

    assert policy.window_ns == 0


def test_fixed_polling_stays() -> None:
    """A number of microseconds is not adapted."""
    policy = PollPolicy(50)
    policy.blocked_for(1)
    policy.blocked_for(10**9)

    assert policy.window_ns == 50_000


def test_adaptive_polling_grows_and_shrinks() -> None:
    """It grows to 200 us while wakes come soon after blocking, and goes back to nothing when they do not."""
    policy = PollPolicy("adaptive")
    windows = [policy.window_ns]
    for _ in range(6):
        policy.blocked_for(50_000)
        windows.append(policy.window_ns)
    for _ in range(6):
        policy.blocked_for(1_000_000)
        windows.append(policy.window_ns)

    assert windows[:7] == [0, 10_000, 20_000, 40_000, 80_000, 160_000, 200_000]
    assert windows[7:] == [100_000, 50_000, 25_000, 12_500, 0, 0]
    assert POLL_START_NS == 10_000


@pytest.mark.parametrize(("block_ns", "window_ns"), [(200_001, 10_000), (300_000, 10_000), (300_001, 0)])
def test_block_a_little_longer_than_the_longest_poll_grows_it(block_ns: int, window_ns: int) -> None:
    """A block has wake-ups in it that polling would save: up to one and a half longest polls it is worth a try."""
    policy = PollPolicy("adaptive")

    policy.blocked_for(block_ns)

    assert policy.window_ns == window_ns


def test_adaptive_polling_takes_its_time_when_an_answer_is_due() -> None:
    """Whoever waits for an answer polls for the whole maximum, whatever the past says; a fixed time stays."""
    due = [True]
    policy = PollPolicy("adaptive", lambda: due[0])
    windows = [policy.next_window_ns()]
    due[0] = False
    windows.append(policy.next_window_ns())

    assert windows == [200_000, 0]
    assert PollPolicy("off", lambda: True).next_window_ns() == 0
    assert PollPolicy(50, lambda: True).next_window_ns() == 50_000


# -- halting --------------------------------------------------------------------------------------


class FakeSemaphore:
    """A semaphore whose blocks are scripted: `during[i]()` runs in the i-th and says whether it woke."""

    def __init__(self, *during: Callable[[], bool]) -> None:
        self.during = list(during)
        self.blocks: list[float] = []

    def block(self, timeout_s: float = 1.0) -> bool:
        """One block."""
        self.blocks.append(timeout_s)
        return self.during.pop(0)() if self.during else False


class Sleeper:
    """A run-state word and a halt over it."""

    def __init__(
        self,
        *during: Callable[[], bool],
        look: Callable[[], object] | None = None,
        owed_s: float = 0.0,
        look_again_s: float | None = None,
        longest_s: float | None = None,
    ) -> None:
        self.view = AtomicView(bytearray(8))
        self.counters = new_counters()
        self.semaphore = FakeSemaphore(*during)
        self.halt = Halt(
            self.view,
            0,
            cast(Wakeup, self.semaphore),
            look or (lambda: False),
            PollPolicy("off"),
            self.counters,
            owed_s=owed_s,
            look_again_s=look_again_s,
            longest_s=longest_s,
        ).halt

    @property
    def state(self) -> int:
        """The run state."""
        return self.view.load_u32(0)

    def taken(self, woke: bool) -> bool:
        """A requester takes the announcement away; `woke`: its token is there, too."""
        assert self.view.cas_u32(0, HALTED, AWAKE) == HALTED
        return woke


def test_work_to_do_is_no_halt() -> None:
    """What is there already is neither polled for nor slept on."""
    sleeper = Sleeper(look=lambda: True)
    sleeper.halt(10**9)

    assert (sleeper.state, sleeper.semaphore.blocks, sleeper.counters.blocks) == (AWAKE, [], 0)


def test_sleeper_is_halted_while_it_blocks() -> None:
    """The announcement stands while it sleeps, and a token is the end of it."""
    sleeper = Sleeper(lambda: sleeper.taken(woke=True))
    sleeper.halt(10**9)

    assert (sleeper.state, sleeper.counters.blocks, sleeper.counters.watchdogs) == (AWAKE, 1, 0)


def test_timeout_wins_the_announcement_back() -> None:
    """Nobody took it: no token is owed, and none is waited for."""
    sleeper = Sleeper()
    sleeper.halt(20_000_000)

    assert (sleeper.state, sleeper.semaphore.blocks, sleeper.counters.watchdogs) == (AWAKE, [0.02], 1)


def test_block_is_never_longer_than_the_watchdog() -> None:
    """A poster that was killed between taking and posting costs one period."""
    sleeper = Sleeper()
    sleeper.halt(3600 * 10**9)

    assert sleeper.semaphore.blocks == [WATCHDOG_S]


def test_block_in_turns_ends_when_a_look_finds_something() -> None:
    """Who may be left without a token looks at every turn, and goes on sleeping when there is nothing."""
    looks = iter([False, False, False, True])
    sleeper = Sleeper(look=lambda: next(looks), look_again_s=0.125)
    sleeper.halt(10**9)

    # Two looks before the block, one after each turn.
    assert sleeper.semaphore.blocks == [0.125, 0.125]
    assert (sleeper.state, sleeper.counters.blocks) == (AWAKE, 1)


def test_block_in_turns_ends_when_the_announcement_was_taken() -> None:
    """A state that is not HALTED any more ends the sleep at the next turn, token or not."""
    sleeper = Sleeper(lambda: False, lambda: sleeper.taken(woke=False), owed_s=0.0, look_again_s=0.125)
    sleeper.halt(10**9)

    assert sleeper.semaphore.blocks[:2] == [0.125, 0.125]
    assert sleeper.state == AWAKE


def test_longest_block_is_its_owners_choice() -> None:
    """With a watchdog of 2 s and a look each second, nothing runs in between but the looks."""
    sleeper = Sleeper(look_again_s=1.0, longest_s=2.0)
    sleeper.halt(3600 * 10**9)

    assert sleeper.semaphore.blocks == [1.0, 1.0]
    assert sleeper.counters.watchdogs == 1


def test_block_in_turns_is_no_longer_than_asked() -> None:
    """The last turn is what is left of the time."""
    sleeper = Sleeper(look_again_s=0.125)
    sleeper.halt(300_000_000)

    assert sleeper.semaphore.blocks == [0.125, 0.125, pytest.approx(0.05)]


def test_owed_token_is_taken_after_a_timeout() -> None:
    """The time passed just as somebody took the announcement: his token is waited for."""
    sleeper = Sleeper(lambda: sleeper.taken(woke=False), lambda: True, owed_s=5.0)
    sleeper.halt(10**6)

    assert len(sleeper.semaphore.blocks) == 2
    assert 4.0 < sleeper.semaphore.blocks[1] <= 5.0


def test_signal_does_not_cancel_an_owed_token() -> None:
    """A signal that ends the wait for an owed token ends that block only: the token is still taken."""
    sleeper = Sleeper(lambda: sleeper.taken(woke=False), lambda: False, lambda: False, lambda: True, owed_s=5.0)
    sleeper.halt(10**6)

    assert len(sleeper.semaphore.blocks) == 4


def test_owed_token_that_never_comes_is_given_up() -> None:
    """Where a guest can write the run state, it may take the announcement and post nothing."""
    sleeper = Sleeper(lambda: sleeper.taken(woke=False), owed_s=0.0)
    sleeper.halt(10**6)

    assert sleeper.state == AWAKE
    assert len(sleeper.semaphore.blocks) == 2


def test_token_without_an_exchange_leaves_nobody_halted() -> None:
    """A nudge is a token that took no announcement: the sleeper takes it back and runs as AWAKE."""
    sleeper = Sleeper(lambda: True)
    sleeper.halt(10**9)

    assert sleeper.state == AWAKE


def polling(sleeper: Sleeper, look: Callable[[], object], microseconds: int) -> Halt:
    """The same sleeper, polling for a fixed time before it blocks."""
    wakeup = cast(Wakeup, sleeper.semaphore)
    return Halt(sleeper.view, 0, wakeup, look, PollPolicy(microseconds), sleeper.counters)


def test_polling_that_finds_work_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that comes within the window costs no block."""
    monkeypatch.setattr("emu.interrupts.LONG_YIELD_NS", 10**12)
    answers = iter([False] * 50 + [True])
    sleeper = Sleeper()
    polling(sleeper, lambda: next(answers), 60_000_000).halt(10**9)

    assert sleeper.semaphore.blocks == []
    assert (sleeper.counters.polls_paid, sleeper.counters.polls_vain) == (1, 0)


def test_polling_in_vain_ends_in_a_block() -> None:
    """Nothing came within the window."""
    sleeper = Sleeper()
    polling(sleeper, lambda: False, 20).halt(10**8)

    assert sleeper.semaphore.blocks == [0.1]
    assert (sleeper.counters.polls_paid, sleeper.counters.polls_vain) == (0, 1)


@pytest.mark.parametrize(
    ("window_us", "timeout_ns", "blocks"),
    [
        (200, 50_000, []),  # a deadline within the window: over when the poll is
        (200, 200_000, []),
        (200, 300_000, [0.0001]),  # what is left of it
        (200, 10**9, [1.0]),  # a poll is nothing beside this
        (200, 0, [0.0]),
    ],
)
def test_a_deadline_is_not_later_by_the_poll(
    monkeypatch: pytest.MonkeyPatch, window_us: int, timeout_ns: int, blocks: list[float]
) -> None:
    """Whoever halts for so long is back then, however the time was split between polling and blocking."""
    clock = [0]
    monkeypatch.setattr("emu.interrupts.time.monotonic_ns", lambda: clock[0])
    monkeypatch.setattr("emu.interrupts.os.sched_yield", lambda: clock.__setitem__(0, clock[0] + 10_000))
    sleeper = Sleeper()

    polling(sleeper, lambda: False, window_us).halt(timeout_ns)

    assert sleeper.semaphore.blocks == blocks
    assert sleeper.state == AWAKE


def test_poller_gives_way_when_its_core_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A yield that took long says that others wait for this core: the poll ends at once."""
    monkeypatch.setattr("emu.interrupts.LONG_YIELD_NS", -1)
    looks: list[int] = []
    sleeper = Sleeper()
    polling(sleeper, lambda: looks.append(1), 60_000_000).halt(10**9)

    # One look before polling, twenty while polling, one behind the announcement.
    assert len(looks) == 22
    assert sleeper.counters.polls_vain == 1


@pytest.mark.parametrize(
    ("due_for", "yield_ns", "looks"),
    [
        (1, 150_000, 22),  # the answer came before the first look again: nobody is polled for
        (99, 150_000, 22 + 20),  # still due behind each: so does it here
        (99, 1_500_000, 22),  # the core is lost, whatever is due
    ],
)
def test_poller_goes_on_behind_who_works_on_what_is_due(
    monkeypatch: pytest.MonkeyPatch, due_for: int, yield_ns: int, looks: int
) -> None:
    """Whoever asks shares its core with the poller, works a while, and waits for the answer: then it comes soon."""
    clock, asked = [0], iter([True] * due_for)
    monkeypatch.setattr("emu.interrupts.time.monotonic_ns", lambda: clock[0])
    monkeypatch.setattr("emu.interrupts.os.sched_yield", lambda: clock.__setitem__(0, clock[0] + yield_ns))
    seen: list[int] = []
    sleeper = Sleeper()
    policy = PollPolicy("adaptive", lambda: next(asked, False))
    wakeup = cast(Wakeup, sleeper.semaphore)

    Halt(sleeper.view, 0, wakeup, lambda: seen.append(1), policy, sleeper.counters).halt(10**8)

    assert len(seen) == looks


class Told(OneByOne):
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.polls: list[int] = []
        self.blocks: list[tuple[int, int]] = []
        """Event and its first word."""
        self.record = self._keep

    def _keep(self, event: int, *words: int) -> None:
        if event == E_POLL:
            self.polls.append(words[0])
        if event in (E_HALT, E_HALT_END):
            self.blocks.append((event, words[0]))


def test_recording_has_as_many_polls_as_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds off, having lost its core, has not polled: the counters do not say so, and no record does.

    It blocks each time, and says for how long at most, and for how long it was.
    """
    clock = [0]
    monkeypatch.setattr("emu.interrupts.time.monotonic_ns", lambda: clock[0])
    monkeypatch.setattr("emu.interrupts.os.sched_yield", lambda: clock.__setitem__(0, clock[0] + 3_000_000))
    sleeper, told = Sleeper(), Told()
    wakeup, recorder = cast(Wakeup, sleeper.semaphore), cast(Recorder, told)
    recorded = halt_of(recorder, sleeper.view, 0, wakeup, lambda: False, PollPolicy(200), sleeper.counters)
    halt = recorded.halt
    for _ in range(5):
        halt(10**8)

    assert 0 < sleeper.counters.polls_vain < 5
    assert told.polls == [0] * sleeper.counters.polls_vain
    assert told.blocks == [(E_HALT, 10**8), (E_HALT_END, 0)] * 5


def test_poller_that_lost_its_core_does_not_poll_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody computes there: a block is woken sooner than a yield comes back. Each time it holds off longer."""
    clock = [0]
    monkeypatch.setattr("emu.interrupts.time.monotonic_ns", lambda: clock[0])
    monkeypatch.setattr("emu.interrupts.os.sched_yield", lambda: clock.__setitem__(0, clock[0] + 3_000_000))
    looks: list[int] = []
    sleeper = Sleeper()
    halt = polling(sleeper, lambda: looks.append(1), 200).halt
    counts = []
    for _ in range(3):
        halt(10**8)
        counts.append(len(looks))
        looks.clear()
    clock[0] += HOLD_OFF_NS
    halt(10**8)
    clock[0] += HOLD_OFF_NS
    halt(10**8)

    # A poll, two halts without one; another poll, and this time it is longer until the next.
    assert counts == [22, 2, 2]
    assert len(looks) == 22 + 2


def test_poller_yields_as_often_as_its_core_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """More and more seldom while nobody else is there; at each glance where others poll, who wait for its looks.

    Whether they still do, the last of some turns tells; at everything it looks behind those.
    """
    alone, shared, lost = 1_000, 10_000, 500_000
    took = iter([*[alone] * 5, shared, *[shared] * TURNS, *[shared] * (TURNS - 1), alone, lost])
    clock = [0]
    monkeypatch.setattr("emu.interrupts.time.monotonic_ns", lambda: clock[0])
    looks: list[int] = []
    between: list[int] = []

    def yield_core() -> None:
        between.append(len(looks))
        looks.clear()
        clock[0] += next(took)

    monkeypatch.setattr("emu.interrupts.os.sched_yield", yield_core)
    sleeper = Sleeper()
    polling(sleeper, lambda: looks.append(1), 1_000).halt(10**6)

    turns = [1] * (TURNS - 1)
    assert between == [1 + 20, 40, 80, 160, 160, 160, 0, *turns, 1 + 1, *turns, 1 + 1 + 20]


@pytest.mark.parametrize(
    ("due", "first_ns", "times"),
    [
        (True, 10_000, 3),
        (True, 1_000, 0),  # nobody was there in one of the turns: the others were of who had something to do
        (False, 10_000, 0),  # nobody waits for what it polls for
    ],
)
def test_poller_beside_a_poller_steps_aside(
    monkeypatch: pytest.MonkeyPatch, due: bool, first_ns: int, times: int
) -> None:
    """While an answer is due, behind each row of turns that all took the time of somebody's look (240 of 200 us)."""
    clock, took = [0], chain([1_000, 10_000], cycle([first_ns, *[10_000] * (TURNS - 1)]))
    monkeypatch.setattr("emu.interrupts.time.monotonic_ns", lambda: clock[0])
    monkeypatch.setattr("emu.interrupts.os.sched_yield", lambda: clock.__setitem__(0, clock[0] + next(took)))
    told: list[int] = []
    sleeper, policy = Sleeper(), PollPolicy("adaptive", lambda: due)
    policy.window_ns = policy.maximum_ns
    wakeup = cast(Wakeup, sleeper.semaphore)

    Halt(sleeper.view, 0, wakeup, lambda: False, policy, sleeper.counters, aside=lambda: told.append(clock[0])).halt(
        10**8
    )

    assert len(told) == times


def test_poll_ends_with_a_glance_or_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a glance sees ends the poll at once; what it does not see, the look at the next yield does."""
    monkeypatch.setattr("emu.interrupts.LONG_YIELD_NS", 10**12)
    monkeypatch.setattr("emu.interrupts.LOST_CORE_NS", 10**12)
    for seen, looks in ((True, [False]), (False, [False, False, False, True])):
        answers = iter(looks)
        sleeper = Sleeper()
        halt = polling(sleeper, answers.__next__, 60_000_000)
        halt._glance = {True: lambda: True, False: lambda: False}[seen]
        halt.halt(10**9)

        assert sleeper.semaphore.blocks == []
        assert sleeper.counters.polls_paid == 1
        assert list(answers) == []


# -- every order of steps -------------------------------------------------------------------------


class LookThenLeave(Halt):
    """The wrong order: it looks, and announces afterwards."""

    def halt(self, timeout_ns: int) -> None:
        """Look, then leave."""
        if not self._look():
            self._state.store(HALTED)
            self._sleep(timeout_ns / 1e9)


class KickThenRequest(InterruptRequester):
    """The wrong order on the other side: it looks at the run state before the bit is set."""

    def request(self, vector: int) -> None:
        """Kick, then set the bit."""
        self.kick()
        self._or[vector >> 6](1 << (vector & 63))


def halting(
    turns: Turns,
    requests: list[list[int]],
    sleeper: type[Halt] = Halt,
    requester: type[InterruptRequester] = InterruptRequester,
) -> tuple[list[Actor], Check]:
    """A VP that halts until it has taken every vector of all requesters, and then has no token left."""
    buffer = bytearray(vps_bytes(1))
    view = stepped_view(turns, buffer)
    wakeup = SteppedWakeup(turns)
    # A taking is one step here; what may come between request and halt is what matters.
    lapic = Lapic(AtomicView(buffer), 0)
    wanted = {vector for vectors in requests for vector in vectors}
    taken: list[int] = []

    class Kick:
        def post(self) -> None:
            wakeup.post()

        def interrupt(self) -> bool:
            raise AssertionError("nobody computes here")

    def processor() -> None:
        # One word is looked at, so that the number of orders stays small; all vectors stand in it.
        look = view.cell_u64(PAGE + VP_REQUEST + 24).load
        halt = sleeper(view, PAGE + VP_RUN_STATE, wakeup.as_wakeup(), look, PollPolicy("off"), new_counters())
        while set(taken) != wanted:
            halt.halt(10**9)
            while vector := lapic.take():
                taken.append(vector)
                lapic.eoi()

    def request(vectors: list[int]) -> None:
        requesting = requester(view, 0, Kick(), new_counters())
        for vector in vectors:
            requesting.request(vector)

    def check() -> None:
        assert set(taken) == wanted
        assert wakeup.tokens == 0
        assert AtomicView(buffer).load_u32(PAGE + VP_RUN_STATE) == AWAKE

    return [processor, *(partial(request, vectors) for vectors in requests)], check


def test_no_order_of_steps_loses_a_request() -> None:
    """One halting VP, one requester, every order of their steps: taken, awake, no token left."""
    assert explore(lambda turns: halting(turns, [[0xF3]])) > 50


def test_two_requesters_lose_nothing() -> None:
    """Two requesters with vectors of their own, every order with at most two preemptions."""
    assert explore(lambda turns: halting(turns, [[0xF3], [0xE2]]), preemptions=2) > 200


def test_merging_requesters_lose_nothing() -> None:
    """Two requesters of one vector: whose bit was set already owes nothing, and nothing is lost."""
    assert explore(lambda turns: halting(turns, [[0xF3], [0xF3]]), preemptions=2) > 100


@pytest.mark.soak
def test_requests_in_a_row_lose_nothing() -> None:
    """Two requesters, of which one asks twice, and deeper orders of two that ask once."""
    explore(lambda turns: halting(turns, [[0xF3, 0xD1], [0xE2]]), preemptions=2)
    explore(lambda turns: halting(turns, [[0xF3], [0xE2]]), preemptions=3)


def test_explorer_sees_a_lost_wakeup_of_the_sleeper() -> None:
    """The wrong order in the sleeper is found: it looks, a request comes, it sleeps for ever."""
    with pytest.raises(Stuck):
        explore(lambda turns: halting(turns, [[0xF3]], sleeper=LookThenLeave))


def test_explorer_sees_a_lost_wakeup_of_the_requester() -> None:
    """The wrong order in the requester is found, too."""
    with pytest.raises(Stuck):
        explore(lambda turns: halting(turns, [[0xF3]], requester=KickThenRequest))


# -- real processes -------------------------------------------------------------------------------

PID_READY, PREEMPTED = 4, 8
"""Words of the machine page that say here: the processor may be requested; it was interrupted while it computed."""
ACKNOWLEDGED = 4096
"""Where the processor counts how often it took each vector (u64 each), behind the VP page."""
LAST_VECTOR = 0x20


class SmallProcessor:
    """A vCPU in miniature: takes at safe points, by signal while it computes, and in its halt."""

    def __init__(self, segment: Segment, wakeup: Wakeup, poll: str | int, seed: int) -> None:
        self.lapic = Lapic(segment.view, 0)
        self.counters = new_counters()
        self._view = segment.view
        self._set_state = segment.view.cell_u32(PAGE + VP_RUN_STATE).store
        self._halt = Halt(
            segment.view,
            PAGE + VP_RUN_STATE,
            wakeup,
            self.lapic.deliverable,
            PollPolicy(poll),
            self.counters,
        )
        self._computing = False
        self._random = random.Random(seed)
        self.last = False
        self.preempted = 0
        signal.signal(KICK_SIGNAL, self._on_kick)

    def take(self) -> None:
        """Take, count and end everything that is due."""
        while vector := self.lapic.take():
            self._view.fetch_add_u64(PAGE + ACKNOWLEDGED + 8 * vector, 1)
            self.last = self.last or vector == LAST_VECTOR
            self.lapic.eoi()

    def _on_kick(self, _number: int, _frame: FrameType | None) -> None:
        if not self._computing:
            return
        while True:
            self._computing = False
            self._set_state(IN_ISR)
            self.preempted += 1
            self._view.store_u32(PREEMPTED, 1)
            self.take()
            self._computing = True
            self._set_state(COMPUTING)
            if not self.lapic.deliverable():
                return

    def _compute(self) -> None:
        """Count to some number, or until interrupted, with the signal as only help."""
        self._computing = True
        self._set_state(COMPUTING)
        if self.lapic.deliverable():
            self._on_kick(0, None)
        before = self.preempted
        for _ in range(self._some()):
            if self.preempted != before:
                break
        self._computing = False
        self._set_state(AWAKE)
        self.take()

    def _interrupts_off(self) -> None:
        self._set_state(INTERRUPTS_OFF)
        for _ in range(self._some()):
            if self.lapic.deliverable():
                break
        self._set_state(AWAKE)
        self.take()

    def _some(self) -> int:
        """Short stays end while a request is on its way, long ones by a request."""
        return self._random.choice((0, 10, 1_000, 20_000))

    def run(self) -> None:
        """Change from state to state at random until the last vector came."""
        while not self.last:
            self._random.choice((self._compute, self._interrupts_off, self._halt_once))()
        self._set_state(INTERRUPTS_OFF)

    def _halt_once(self) -> None:
        self._halt.halt(60 * 10**9)
        self.take()


class ProcessKick:
    """Kicks the processor by its semaphore or, once its pid is there, by the signal."""

    def __init__(self, wakeup: Wakeup, pidfd: int) -> None:
        self.post = wakeup.post
        self._pidfd = pidfd

    def interrupt(self) -> bool:
        """The real-time signal."""
        signal.pidfd_send_signal(self._pidfd, KICK_SIGNAL)
        return True


def requests_meet_a_processor(name: str, poll: str | int, rounds: int) -> None:
    """Two processes request vectors of their own, each waiting for the last one to be taken.

    They make `rounds` requests each, and more until one has met the processor while it computes: which of its states a
    request meets is chance, and on a busy computer nearly always the same one.
    """
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    segment = Segment.create(object_name(name, "vps"), vps_bytes(1) + 4096)
    semaphore = object_name(name, "vp.0")
    Wakeup.create(semaphore)
    done = segment.view.cell_u32(0)

    def processor() -> None:
        # No watchdog helps here: a lost wakeup has to show.
        vars(interrupts)["WATCHDOG_S"] = 3600.0
        small = SmallProcessor(segment, Wakeup.attach(semaphore), poll, seed)
        segment.view.store_u32(PID_READY, 1)
        small.run()
        assert small.counters.blocks > 0 or poll != "off"

    def request(who: int, pidfd: int) -> None:
        chance = random.Random(seed + who)
        counters = new_counters()
        requester = InterruptRequester(segment.view, 0, ProcessKick(Wakeup.attach(semaphore), pidfd), counters)
        mine = [vector for vector in range(0x30, 0x100) if vector % 2 == who]
        asked = dict.fromkeys(mine, 0)
        bound = {vector: requester.bound(vector) for vector in mine}
        preempted = segment.view.cell_u32(PREEMPTED).load
        chance_ends = time.monotonic() + 30
        for number in count():
            if number >= rounds:
                if preempted():
                    break
                assert time.monotonic() < chance_ends, f"no request met it computing (seed {seed})"
            vector = chance.choice(mine)
            chance.choice((bound[vector], partial(requester.request, vector)))()
            asked[vector] += 1
            taken = segment.view.cell_u64(PAGE + ACKNOWLEDGED + 8 * vector).load
            deadline = time.monotonic() + 30
            while taken() < asked[vector]:
                os.sched_yield()
                assert time.monotonic() < deadline, f"request {number} of {vector:#x} was lost (seed {seed})"
            for _ in range(chance.choice((0, 10, 100, 2_000))):
                pass
        # The one who ends last ends the processor.
        if done.fetch_add(1) == 1:
            requester.request(LAST_VECTOR)

    try:
        before = signal.signal(KICK_SIGNAL, signal.SIG_IGN)
        with Crowd() as crowd:
            vcpu = crowd.start(processor)
            pidfd = os.pidfd_open(vcpu.pid)
            while not segment.view.load_u32(PID_READY):
                os.sched_yield()
            for who in range(2):
                crowd.start(partial(request, who, pidfd))
        signal.signal(KICK_SIGNAL, before)
        os.close(pidfd)
        assert Wakeup.attach(semaphore).try_take() is False
        assert [segment.view.load_u64(PAGE + VP_REQUEST + 8 * word) for word in range(4)] == [0] * 4
    finally:
        segment.close()


@pytest.mark.parametrize("poll", ["off", 20, "adaptive"])
def test_no_request_to_a_real_processor_is_lost(machine_name: str, poll: str | int) -> None:
    """Requests at random moments meet a VP that halts, computes, has interrupts off: all are taken."""
    requests_meet_a_processor(machine_name, poll, rounds=700)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("poll", ["off", 20, "adaptive"])
def test_no_request_of_very_many_is_lost(machine_name: str, poll: str | int) -> None:
    """The same for long."""
    requests_meet_a_processor(machine_name, poll, rounds=20_000)


def test_words_of_requests_that_are_remembered_are_bounded() -> None:
    """A peer that requests another set of vectors each time makes a processor remember no more than so many."""
    view = AtomicView(bytearray(vps_bytes(1)))
    lapic = Lapic(view, 0)
    for pattern in range(1, 3 * MOST_REQUESTS):
        view.store_u64(PAGE + VP_REQUEST + 24, pattern)
        assert lapic.take() == 191 + pattern.bit_length()
        lapic.eoi()

    assert len(lapic._highest) <= MOST_REQUESTS
