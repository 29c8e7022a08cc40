"""Interrupt words of a virtual processor: request, take, end; and the halt and kick protocol.

The truth is the bit in the request words, never the kick. Whoever requests sets the bit, then looks at the
run state; whoever goes where it looks less often stores the new state, then looks for a bit. Both sides are
full barriers, so one of the two always sees the other. Owner of request, in-service and run-state words.

    AWAKE, IN_ISR, INTERRUPTS_OFF   will look by itself: no kick
    HALTED                          exchanged away; the winner posts exactly one token
    COMPUTING                       a real-time signal: the ISR runs between two bytecodes
    OFFLINE                         takes nothing until somebody starts it: no kick
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, Protocol

from emu.counters import Counters
from emu.ipc.atomics import AtomicU64, AtomicView
from emu.ipc.semaphores import WATCHDOG_S, Wakeup
from emu.layout import (
    VECTOR_WORDS,
    VP_AUTO_EOI,
    VP_IN_SERVICE,
    VP_REQUEST,
    VP_RUN_STATE,
    RunState,
    vp_page_offset,
)

# Module-level ints: an enum look-up costs 70 ns more on the hot path.
AWAKE: Final = int(RunState.AWAKE)
HALTED: Final = int(RunState.HALTED)
COMPUTING: Final = int(RunState.COMPUTING)
IN_ISR: Final = int(RunState.IN_ISR)
INTERRUPTS_OFF: Final = int(RunState.INTERRUPTS_OFF)
OFFLINE: Final = int(RunState.OFFLINE)
_NOT_LOOKING: Final = (HALTED, COMPUTING)

LOOKS_BEFORE_YIELD: Final = 20
MOST_BEFORE_YIELD: Final = 160
"""Twice as many each time, as long as nobody else wants the core: a yield takes as long as a dozen looks."""
LOOK_AT: Final = 80
"""Glances between two looks at everything; a yield counts as `LOOKS_BEFORE_YIELD` of them."""
SHARED_YIELD: Final = 3
"""A yield that takes so many times the quickest one let somebody else run."""
LONG_YIELD_NS: Final = 100_000
TURNS: Final = 8
"""Of who shares its core, between two looks at everything."""
LOST_CORE_NS: Final = 1_000_000
"""A yield that took so long gave the core to somebody who computes: he has it for whole slices, a poller for none."""
HOLD_OFF_NS: Final = 20_000_000
MOST_HOLD_OFF_NS: Final = 1_000_000_000
"""For how long there is no polling then: twice as long each time, up to this."""
MOST_STRAYS: Final = 1_000
POLL_START_NS: Final = 10_000
NO_CLOCK: Final = 100
"""Of a halt that may last longer than so many polls, the poll's own time is nothing, and no clock is read for it."""
SOON: Final = 1.5
"""A block that lasted up to so many longest polls grows the next one.

Not 1: what was measured has wake-ups in it, one's own and those of whoever is called before, which polling saves. With
1, eight processors that are called in turn, each every 250 us while all block and every 180 us while all poll, stayed
in whichever of the two they happened to be.
"""

_TURNS: Final = range(TURNS)
_ALL: Final = (1 << 64) - 1


class Kick(Protocol):
    """How to reach a VP that would not look by itself."""

    def post(self) -> None:
        """Post one token to the VP's semaphore."""

    def interrupt(self) -> bool:
        """Send the real-time signal; False when there is nobody to send it to."""


class InterruptRequester:
    """Requests interrupts of one VP on behalf of one actor, and counts how it had to kick."""

    __slots__ = ("_counters", "_kick", "_or", "_state_cas", "_state_load")

    def __init__(self, vps: AtomicView, position: int, kick: Kick, counters: Counters) -> None:
        base = vp_page_offset(position)
        self._or = tuple(vps.cell_u64(base + VP_REQUEST + 8 * word).fetch_or for word in range(VECTOR_WORDS))
        state = vps.cell_u32(base + VP_RUN_STATE)
        self._state_load = state.load
        self._state_cas = state.cas
        self._kick = kick
        self._counters = counters

    def bound(self, vector: int) -> Callable[[], None]:
        """`request` of one vector, for who makes it over and over: the same steps, with everything at hand."""
        set_bit, bit = self._or[vector >> 6], 1 << (vector & 63)
        counters, state_load, kick = self._counters, self._state_load, self.kick

        def request() -> None:
            counters.requested += 1
            if set_bit(bit) & bit:
                counters.merged += 1
            elif state_load() in _NOT_LOOKING:
                kick()
            else:
                counters.kicks_none += 1

        return request

    def request(self, vector: int) -> None:
        """Request `vector` (16..255) and kick the VP if it would not look by itself."""
        bit = 1 << (vector & 63)
        counters = self._counters
        counters.requested += 1
        # seq_cst or: the bit is visible before the run state is read. Otherwise this side sees AWAKE, the VP
        # sees no bit and halts, and the interrupt is lost.
        if self._or[vector >> 6](bit) & bit:
            # Whoever set it owes the kick; requests merge.
            counters.merged += 1
            return
        if self._state_load() in _NOT_LOOKING:
            self.kick()
        else:
            counters.kicks_none += 1

    def kick(self) -> None:
        """Wake the VP if its run state asks for it."""
        state = self._state_load()
        if state == HALTED:
            if self._state_cas(HALTED, AWAKE) == HALTED:
                self._kick.post()
                self._counters.kicks_semaphore += 1
                return
        elif state == COMPUTING and self._kick.interrupt():
            self._counters.kicks_signal += 1
            return
        self._counters.kicks_none += 1


MOST_REQUESTS: Final = 256
"""Different words of requests whose highest vector is kept: nearly always there are two or three."""


class _Steps:
    """Of one vector: what clears its request and the bits that stay, its auto-EOI word, its in-service word."""

    __slots__ = ("auto_eoi", "bit", "clear", "in_service", "others", "vector")

    def __init__(self, vector: int, request: AtomicU64, auto_eoi: AtomicU64, in_service: AtomicU64) -> None:
        self.vector: Final = vector
        self.bit: Final = 1 << (vector & 63)
        self.clear: Final[Callable[[int], int]] = request.fetch_and
        self.others: Final = self.bit ^ _ALL
        self.auto_eoi: Final[Callable[[], int]] = auto_eoi.load
        self.in_service: Final = in_service


class Lapic:
    """The VP's own side of its interrupt words; used by the one thread that is this processor."""

    __slots__ = ("_base", "_from_the_top", "_highest", "_in_service", "_load", "_load_highest", "_steps", "_vps")

    def __init__(self, vps: AtomicView, position: int) -> None:
        self._vps = vps
        self._base = vp_page_offset(position)
        self._load = tuple(vps.cell_u64(self._base + VP_REQUEST + 8 * word).load for word in range(VECTOR_WORDS))
        self._from_the_top = self._load[::-1]
        self._load_highest: Final = self._load[3]
        self._steps: dict[int, _Steps] = {}
        self._highest: dict[int, _Steps] = {}
        """By what the word of vectors 192 and up holds."""
        self._in_service: list[int] = []

    def highest_request(self) -> int:
        """The highest requested vector, or 0."""
        load = self._load
        if bits := load[3]():
            return 191 + bits.bit_length()
        if bits := load[2]():
            return 127 + bits.bit_length()
        if bits := load[1]():
            return 63 + bits.bit_length()
        if bits := load[0]():
            return bits.bit_length() - 1
        return 0

    def deliverable(self) -> bool:
        """Whether a request waits whose class is above the highest in service."""
        load3, load2, load1, load0 = self._from_the_top
        # Asked at every safe point, and nearly always in vain, with nothing in service: four loads and no more then.
        if not (load3() or load2() or load1() or load0() > 1):  # there is no vector 0
            return False
        return not self._in_service or self.highest_request() >> 4 > self._in_service[-1] >> 4

    @property
    def glance(self) -> Callable[[], int]:
        """The load of the word of vectors 192 and up, the hypervisor's and ours: for a poll's quick looks."""
        return self._load_highest

    def take(self) -> int:
        """Take the highest deliverable vector: clear its request, put it in service; 0 when there is none."""
        if bits := self._load_highest():  # the hypervisor's vectors and ours
            steps = self._highest.get(bits) or self._bind_highest(bits)
        else:
            _load3, load2, load1, load0 = self._from_the_top
            if not (load2() or load1() or load0()) or not (highest := self.highest_request()):
                return 0
            steps = self._steps.get(highest) or self._bind(highest)
        serving, vector = self._in_service, steps.vector
        if serving and vector >> 4 <= serving[-1] >> 4:
            return 0
        # Cleared before the handler looks at pages: a request that comes later sets the bit anew.
        steps.clear(steps.others)
        if not steps.auto_eoi() & steps.bit:
            in_service = steps.in_service
            in_service.store(in_service.load() | steps.bit)
            serving.append(vector)
        return vector

    def _bind(self, vector: int) -> _Steps:
        """At a vector's first interrupt."""
        at, cell = self._base + 8 * (vector >> 6), self._vps.cell_u64
        steps = self._steps[vector] = _Steps(
            vector, cell(at + VP_REQUEST), cell(at + VP_AUTO_EOI), cell(at + VP_IN_SERVICE)
        )
        return steps

    def _bind_highest(self, bits: int) -> _Steps:
        """At the first time that the highest word holds just this."""
        vector = 191 + bits.bit_length()
        if len(self._highest) >= MOST_REQUESTS:
            self._highest.clear()  # anybody may request any
        steps = self._highest[bits] = self._steps.get(vector) or self._bind(vector)
        return steps

    def eoi(self) -> None:
        """End the highest vector in service; nothing happens when there is none (TLFS "EOI Register")."""
        if self._in_service:
            steps = self._steps[self._in_service.pop()]
            steps.in_service.store(steps.in_service.load() & steps.others)

    @property
    def in_service(self) -> tuple[int, ...]:
        """Vectors in service, lowest class first."""
        return tuple(self._in_service)


class PollPolicy:
    """How long a halting processor polls first: `off`, a fixed time, or adaptive like KVM's halt_poll_ns.

    `expecting` says whether an answer is due (a request is pending, a message was just posted): then an
    adaptive processor polls for the whole maximum, whatever the past says. Waking a halted core costs 30 to
    60 us; a bring-up of a channel has six such waits.
    """

    __slots__ = ("_soon_ns", "adaptive", "expecting", "maximum_ns", "window_ns")

    def __init__(self, poll: str | int, expecting: Callable[[], object] | None = None) -> None:
        """`poll` is "off", "adaptive", or microseconds."""
        self.adaptive = poll == "adaptive"
        self.maximum_ns = 0 if poll == "off" else 200_000 if poll == "adaptive" else int(poll) * 1_000
        self._soon_ns = int(SOON * self.maximum_ns)
        self.window_ns = 0 if self.adaptive else self.maximum_ns
        self.expecting = expecting

    def next_window_ns(self) -> int:
        """How long to poll now."""
        return self.maximum_ns if self.answer_is_due() else self.window_ns

    def answer_is_due(self) -> bool:
        """Whether an adaptive processor expects an answer."""
        return self.adaptive and self.expecting is not None and bool(self.expecting())

    def blocked_for(self, nanoseconds: int) -> None:
        """Adapt after a block: grow when the wake came soon, shrink when polling was in vain."""
        if not self.adaptive:
            return
        if nanoseconds <= self._soon_ns:
            self.window_ns = min(self.maximum_ns, self.window_ns * 2 or POLL_START_NS)
        else:
            self.window_ns //= 2
            if self.window_ns < POLL_START_NS:
                self.window_ns = 0


class Halt:
    """Polls, then blocks, until `look` says there is something to do; used by VPs and by the host.

    `state` is the run-state word that this sleeper announces itself in; `look` must be a handful of loads. `glance`
    is what a poll looks at, and `glance_too`: a load each, of what comes most often, and the poll ends with what they
    see; now and then it looks as well.
    Where guests may write the run state, nobody may have meant to post: `owed_s` bounds the wait for a token from
    somebody who took the announcement away, and every `look_again_s` of a block it looks, whatever the state says.
    A block ends after `longest_s`, the watchdog; without `look_again_s` it is one turn. `aside` is called where another
    poller shares the core while an answer is due.
    """

    __slots__ = (
        "_aside",
        "_block",
        "_counters",
        "_glance",
        "_glance_too",
        "_hold_off_ns",
        "_hold_off_until",
        "_longest_s",
        "_look",
        "_look_again_s",
        "_looks",
        "_owed_s",
        "_quickest_yield_ns",
        "_state",
        "policy",
    )

    def __init__(
        self,
        view: AtomicView,
        state_offset: int,
        wakeup: Wakeup,
        look: Callable[[], object],
        policy: PollPolicy,
        counters: Counters,
        *,
        glance: Callable[[], object] | None = None,
        glance_too: Callable[[], object] | None = None,
        owed_s: float | None = None,
        look_again_s: float | None = None,
        longest_s: float | None = None,
        aside: Callable[[], object] | None = None,
    ) -> None:
        self._owed_s = WATCHDOG_S if owed_s is None else owed_s
        self._longest_s = WATCHDOG_S if longest_s is None else longest_s
        self._look_again_s = self._longest_s if look_again_s is None else look_again_s
        self._state = view.cell_u32(state_offset)
        self._block = wakeup.block
        self._look = look
        self._glance = glance
        self._glance_too = glance_too
        self._aside = aside
        self._looks = LOOKS_BEFORE_YIELD
        self._quickest_yield_ns = LONG_YIELD_NS
        self._hold_off_ns = 0
        self._hold_off_until = 0
        self.policy = policy
        self._counters = counters

    def halt(self, timeout_ns: int) -> None:
        """Return when `look` is true, a token came, a signal handler ran, or `timeout_ns` passed."""
        look = self._look
        if look():
            return
        window_ns = self.policy.next_window_ns()
        if window_ns:
            if timeout_ns > NO_CLOCK * window_ns:
                if self._poll(look, window_ns):
                    return
            elif timeout_ns > 0:
                # What it polls is part of the wait: a deadline that is nearer than the window is not passed twice.
                end = time.monotonic_ns() + timeout_ns
                if self._poll(look, min(window_ns, timeout_ns)):
                    return
                timeout_ns = end - time.monotonic_ns()
                if timeout_ns <= 0:
                    return
        # Announce, then look: a requester that came between has set its bit before it read our state, so
        # either it sees HALTED and posts, or we see its bit here (lost 101 of 139,000 the other way round).
        self._state.store(HALTED)
        if look() and self._state.cas(HALTED, AWAKE) == HALTED:
            return  # taken back: no token will come
        self._counters.blocks += 1
        self._counters.flush()
        before = time.monotonic_ns()
        self._sleep(min(timeout_ns / 1e9, self._longest_s))
        self.policy.blocked_for(time.monotonic_ns() - before)

    def _sleep(self, timeout_s: float) -> None:
        """Block until a token, the timeout or a signal; leave HALTED by an atomic exchange only."""
        if self._block_in_turns(timeout_s):
            # A token that nobody's exchange stands behind (the launcher's nudge, a guest's) leaves us HALTED:
            # taken back here, or we would run as HALTED and be sent another one.
            if self._state.cas(HALTED, AWAKE) == HALTED:
                self._take_strays()
            return
        # Timed out, or a signal ran a handler. If the state is still HALTED nobody owes us a token.
        if self._state.cas(HALTED, AWAKE) == HALTED:
            self._counters.watchdogs += 1
            return
        # Somebody exchanged it away and posts now; its death between the two costs the time we wait here. A
        # signal ends a block, not the debt: a token left behind would wake the next halt for nothing.
        now = time.monotonic
        end = now() + self._owed_s
        while not self._block(max(0.0, end - now())) and now() < end:
            pass

    def _block_in_turns(self, timeout_s: float) -> bool:
        """Block, looking every `look_again_s`; False when there is something to do, or the time is over."""
        turn_s = self._look_again_s
        while not self._block(min(turn_s, timeout_s)):
            timeout_s -= turn_s
            # Whatever a caller would find in a round of its own is one of these three: no round is run for nothing.
            if timeout_s <= 0 or self._state.load() != HALTED or self._look():
                return False
        return True

    def _take_strays(self) -> None:
        """Take the tokens away that somebody posted for nothing: each would end a halt of its own.

        Nobody owes one now, and whoever wakes looks anyway, so none of them is missed.
        """
        for _ in range(MOST_STRAYS):
            if not self._block(0.0):
                break

    def _poll(self, look: Callable[[], object], window_ns: int) -> bool:
        """Look for at most `window_ns`, giving the processor away every 20 to 160 looks; True when it paid.

        Who shares its core with other pollers gives it away after each glance: they wait for their turn as we do.
        """
        now, yield_core, glance = time.monotonic_ns, os.sched_yield, self._glance or look
        glance_too, looks, since, aside = self._glance_too, self._looks, 0, self._aside
        end = (before := now()) + window_ns
        if before < self._hold_off_until:
            return False
        while before < end:
            if looks == 1:
                shortest = LONG_YIELD_NS
                for _ in _TURNS:
                    yield_core()
                    # The clock first: who lost its core must know, also where an answer has come meanwhile.
                    took = (after := now()) - before
                    before = after
                    if took > LONG_YIELD_NS:
                        break
                    if took < shortest:
                        shortest = took
                    if glance() or glance_too is not None and glance_too():
                        return self._paid()
                else:
                    if look():
                        return self._paid()
                    if took <= SHARED_YIELD * self._quickest_yield_ns:
                        self._looks = looks = LOOKS_BEFORE_YIELD
                    elif (
                        aside is not None
                        and shortest > SHARED_YIELD * self._quickest_yield_ns
                        and self.policy.answer_is_due()
                    ):
                        aside()
                        before = now()
                    continue
            else:
                if glance_too is None:
                    for _ in range(looks):
                        if glance():
                            return self._paid()
                else:
                    for _ in range(looks):
                        if glance() or glance_too():
                            return self._paid()
                since += looks + LOOKS_BEFORE_YIELD
                if since >= LOOK_AT and glance is not look:
                    since = 0
                    if look():
                        return self._paid()
                # A poller that keeps its core starves the very process it waits for (205 us instead of 5).
                yielded = now()
                yield_core()
                before = now()
                took = before - yielded
            if took > LONG_YIELD_NS:
                # The core is wanted: this poll ends, the window stays. If it is wanted for long, a blocked
                # processor is woken sooner than one that yields gets its turn.
                if took > LOST_CORE_NS:
                    self._hold_off_ns = min(MOST_HOLD_OFF_NS, 2 * self._hold_off_ns or HOLD_OFF_NS)
                    self._hold_off_until = before + self._hold_off_ns
                    break
                if not self.policy.answer_is_due():
                    break
                # Wanted by whoever asked, most likely, and it waits for the answer now (a device of 2,000: 15 us).
                continue
            if took < self._quickest_yield_ns:
                self._quickest_yield_ns = took
            # Who ran meanwhile is a poller, perhaps, which waits for our looks as we do for its.
            looks = 1 if took > SHARED_YIELD * self._quickest_yield_ns else min(2 * looks, MOST_BEFORE_YIELD)
            self._looks = looks
        self._counters.polls_vain += 1
        return False

    def _paid(self) -> bool:
        self._counters.polls_paid += 1
        if self._hold_off_ns:
            self._hold_off_ns = self._hold_off_ns // 2 if self._hold_off_ns > HOLD_OFF_NS else 0
        return True
