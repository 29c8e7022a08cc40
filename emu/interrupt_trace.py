"""Recorded variants of what requests interrupts and of what halts: the same classes, with records around their steps.

Chosen when a process attaches to a machine that records; a machine that does not has no trace of this in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from emu.counters import Counters
from emu.interrupts import Halt, InterruptRequester, Kick
from emu.ipc.atomics import AtomicView
from emu.tracing import E_HALT, E_HALT_END, E_IRQ_RAISE, E_KICK, E_POLL, Bound, Recorder
from emu.tracing import Kick as How

_MERGED: Final = int(How.MERGED)
_NONE: Final = int(How.NONE)
_SEMAPHORE: Final = int(How.SEMAPHORE)
_SIGNAL: Final = int(How.SIGNAL)


class RecordedRequester(InterruptRequester):
    """Says of each request that it is made, and then how it reached the VP."""

    __slots__ = ("_bound", "_counted", "_position", "_recorder")

    def __init__(self, vps: AtomicView, position: int, kick: Kick, counters: Counters, recorder: Recorder) -> None:
        super().__init__(vps, position, kick, counters)
        self._counted = counters
        self._position = position
        self._recorder = recorder
        self._bound: dict[int, tuple[Bound, tuple[Bound, ...]]] = {}
        # What each vector's requests record: made at its first.

    def bound(self, vector: int) -> Callable[[], None]:
        """Each request of it recorded."""
        return partial(self.request, vector)

    def request(self, vector: int) -> None:
        """Record, request, record what came of it."""
        counted = self._counted
        merged, semaphore, signals = counted.merged, counted.kicks_semaphore, counted.kicks_signal
        raised, kicks = self._bound.get(vector) or self._bind(vector)
        # Before the request: the interrupt it asks for may be taken before we are back.
        raised()
        InterruptRequester.request(self, vector)
        how = _NONE
        if counted.merged != merged:
            how = _MERGED
        elif counted.kicks_semaphore != semaphore:
            how = _SEMAPHORE
        elif counted.kicks_signal != signals:
            how = _SIGNAL
        kicks[how]()

    def _bind(self, vector: int) -> tuple[Bound, tuple[Bound, ...]]:
        bind = self._recorder.bind
        kicks = tuple(bind(E_KICK, self._position, vector, how) for how in How)
        bound = self._bound[vector] = bind(E_IRQ_RAISE, self._position, vector), kicks
        return bound


class RecordedHalt(Halt):
    """Says of each poll whether it paid, and of each block when it began and how long it was: `record_with` first."""

    __slots__ = ("_blocks", "_polled", "_woke")

    def record_with(self, recorder: Recorder) -> None:
        """Record by this actor's recorder."""
        self._polled = recorder.bind_first(E_POLL)
        self._blocks = recorder.bind_first(E_HALT)
        self._woke = recorder.bind_first(E_HALT_END)

    def _poll(self, look: Callable[[], object], window_ns: int) -> bool:
        vain, before = self._counters.polls_vain, time.monotonic_ns()
        paid = Halt._poll(self, look, window_ns)
        # Who has lost its core holds off for a while: it has not polled then, and no counter says so either.
        if paid or self._counters.polls_vain != vain:
            self._polled(paid, time.monotonic_ns() - before)
        return paid

    def _sleep(self, timeout_s: float) -> None:
        before = time.monotonic_ns()
        self._blocks(int(timeout_s * 1e9))
        Halt._sleep(self, timeout_s)
        self._woke(time.monotonic_ns() - before)


def requester_of(
    recorder: Recorder | None, vps: AtomicView, position: int, kick: Kick, counters: Counters
) -> InterruptRequester:
    """What requests interrupts of one VP, recorded if this actor records."""
    if recorder is None:
        return InterruptRequester(vps, position, kick, counters)
    return RecordedRequester(vps, position, kick, counters, recorder)


def halt_of(recorder: Recorder | None, *arguments: Any, **more: Any) -> Halt:
    """A `Halt` of these arguments, recorded if this actor records."""
    if recorder is None:
        return Halt(*arguments, **more)
    halt = RecordedHalt(*arguments, **more)
    halt.record_with(recorder)
    return halt
