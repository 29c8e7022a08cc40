"""The host's one loop: exits, doorbells and timers served directly, everything else as tasks that yield.

A task is a generator. It yields WAIT when it has nothing to do until `wake`, or AGAIN after a bounded amount
of work; a task that a sync point parks is simply not resumed, while exits and doorbells go on. A round takes
a bounded amount from each source, so that no guest can starve another task.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator
from enum import Enum
from itertools import count
from typing import Final

LONGEST_HALT_NS: Final = 1_000_000_000
LOOK_AGAIN_S: Final = 0.09
"""Guests may write the words that would wake the host: halted, it looks at every source within 100 ms all the same."""
OWED_TOKEN_S: Final = 0.01
"""The rest of those 100 ms: how long the host waits for a token that a guest seemed to owe it."""


class Step(Enum):
    """What a task's yield means."""

    WAIT = 0
    AGAIN = 1


WAIT: Final = Step.WAIT
AGAIN: Final = Step.AGAIN

TaskBody = Generator[Step, None, None]
AnyBody = Generator[object, None, None]
"""Such a task of an author's, who may have yielded anything: what is not AGAIN is as good as WAIT.

But for another generator, which would wait or send if it ran: that is a `yield from` without its `from`.
"""


class Task:
    """One generator and whether it is to run; `wake` may be called from anywhere in this thread."""

    __slots__ = ("_body", "_ready", "finished", "name", "queued")

    def __init__(self, name: str, body: AnyBody, ready: deque[Task]) -> None:
        self.name = name
        self._body = body
        self._ready = ready
        self.queued = False
        self.finished = False

    def wake(self) -> None:
        """Run in the next round; waking a task that is to run anyway changes nothing."""
        if not self.queued and not self.finished:
            self.queued = True
            self._ready.append(self)

    def step(self) -> None:
        """Resume the generator once."""
        # Cleared before the body runs: a wake from inside it queues the task again.
        self.queued = False
        try:
            step = next(self._body)
            if step is not AGAIN and step is not WAIT and isinstance(step, Generator):
                # It is raised where that was yielded, so the traceback has the author's line.
                what = getattr(step, "__qualname__", type(step).__name__)
                self._body.throw(TypeError(f"{what} was yielded and has not run; write `yield from` before it"))
        except StopIteration:
            self.finished = True
            return
        if step is AGAIN:
            self.wake()

    def close(self) -> None:
        """End the generator; it is never resumed again."""
        self.finished = True
        self._body.close()


class Loop:
    """Rounds over sources and tasks until `stopping` says so."""

    def __init__(
        self,
        *,
        serve: Callable[[], bool],
        halt: Callable[[int], None],
        stopping: Callable[[], bool],
        now: Callable[[], int],
    ) -> None:
        """`serve` takes exits and doorbells and says whether there were any; `halt(ns)` waits for more."""
        self._serve = serve
        self._halt = halt
        self._stopping = stopping
        self._now = now
        self._ready: deque[Task] = deque()
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self.rounds = 0

    def task(self, name: str, body: AnyBody) -> Task:
        """Add a task; it runs in the next round."""
        task = Task(name, body, self._ready)
        task.wake()
        return task

    def call_at(self, deadline_ns: int, action: Callable[[], None]) -> None:
        """Call `action` once when machine time has reached `deadline_ns`."""
        heapq.heappush(self._timers, (deadline_ns, next(self._order), action))

    def has_work(self) -> bool:
        """Whether a task is to run now."""
        return bool(self._ready)

    def run(self) -> None:
        """Sources, then each ready task once, then timers; halt when a round found nothing."""
        ready = self._ready
        serve, stopping = self._serve, self._stopping
        while not stopping():
            self.rounds += 1
            busy = serve()
            for _ in range(len(ready)):
                ready.popleft().step()
                busy = True
            if self._timers:
                busy = self._run_timers() or busy
            if not busy:
                self._halt(self._until_next_timer())

    def _run_timers(self) -> bool:
        ran = False
        # A bounded number: an action that asks for a moment already past comes again in the next round.
        for _ in range(len(self._timers)):
            if self._timers[0][0] > self._now():
                break
            heapq.heappop(self._timers)[2]()
            ran = True
        return ran

    def _until_next_timer(self) -> int:
        if not self._timers:
            return LONGEST_HALT_NS
        return max(0, min(LONGEST_HALT_NS, self._timers[0][0] - self._now()))
