"""Every interleaving of a few actors over shared words, one run after the other.

An actor is a plain function in a thread of its own. Each access to a stepped word, each post and each block
is one step; between two steps any other actor may take any number of its own. `explore` runs a scenario once
for every order of steps (or every order with at most so many preemptions) and says when one ends with
somebody blocked for ever. Orders are sequentially consistent, which is what the code under test pays for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from emu.ipc.atomics import AtomicView
from emu.ipc.semaphores import Wakeup
from emu.memory import GuestMemory

Actor = Callable[[], None]
Check = Callable[[], None]
Scenario = Callable[["Turns"], tuple[list[Actor], Check]]


class Stuck(AssertionError):
    """An order of steps after which nobody can go on: a wakeup was lost."""


class _Abandoned(BaseException):
    """Ends the thread of an actor that waits for ever."""


class _Thread:
    """One actor: whose turn it is stands in `baton`; `ready` says whether its next step can be taken."""

    def __init__(self, turns: Turns, body: Actor) -> None:
        self.baton = _closed()
        self.ready: Callable[[], bool] = _always
        self.finished = False
        self.error: BaseException | None = None
        self._turns = turns
        self._body = body
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.baton.acquire()
        try:
            self._body()
        except _Abandoned:
            pass
        except BaseException as error:  # told to the test's own thread
            self.error = error
        self.finished = True
        self._turns.yielded.release()


class Turns:
    """Whose turn it is in one run; the first choices are given, later ones take the first option."""

    def __init__(self, prefix: list[int], preemptions: int | None) -> None:
        self.yielded = _closed()
        self.choices: list[tuple[int, int]] = []
        self._prefix = prefix
        self._preemptions = preemptions
        self._threads: list[_Thread] = []
        self._current: _Thread | None = None
        self._abandoned = False

    def gate(self, ready: Callable[[], bool] | None = None) -> None:
        """Wait for this actor's turn (and until `ready` holds), just before a step."""
        current = self._current
        if current is None:
            return  # the test itself looks at a word
        current.ready = ready or _always
        self.yielded.release()
        current.baton.acquire()
        if self._abandoned:
            raise _Abandoned

    def run(self, actors: list[Actor]) -> None:
        """Run all actors to their ends; raises Stuck, or what an actor raised."""
        self._threads = [_Thread(self, body) for body in actors]
        for thread in self._threads:
            thread.thread.start()
        last: _Thread | None = None
        while options := self._options(last):
            position = len(self.choices)
            choice = self._prefix[position] if position < len(self._prefix) else 0
            self.choices.append((choice, len(options)))
            if last in options and options[choice] is not last and self._preemptions is not None:
                self._preemptions -= 1
            last = options[choice]
            self._resume(last)
        stuck = [index for index, thread in enumerate(self._threads) if not thread.finished]
        self._abandoned = True
        for index in stuck:
            self._resume(self._threads[index])
        for thread in self._threads:
            thread.thread.join()
            if thread.error is not None:
                raise thread.error
        if stuck:
            order = [choice for choice, _options in self.choices]
            raise Stuck(f"actors {stuck} wait for ever; order {order}")

    def _options(self, last: _Thread | None) -> list[_Thread]:
        """Actors that can take a step, the one that took the last step first."""
        able = [thread for thread in self._threads if not thread.finished and thread.ready()]
        if last in able:
            if self._preemptions == 0:
                return [last]
            able.remove(last)
            able.insert(0, last)
        return able

    def _resume(self, thread: _Thread) -> None:
        self._current = thread
        thread.baton.release()
        self.yielded.acquire()
        self._current = None


def explore(scenario: Scenario, *, preemptions: int | None = None) -> int:
    """Run `scenario` in every order of its steps; how many there were. Raises Stuck or a check's assertion.

    `scenario(turns)` makes fresh memory and returns the actors and a check of the end state.
    """
    prefix: list[int] = []
    runs = 0
    while True:
        turns = Turns(prefix, preemptions)
        actors, check = scenario(turns)
        turns.run(actors)
        check()
        runs += 1
        choices = turns.choices
        while choices and choices[-1][0] + 1 == choices[-1][1]:
            choices.pop()
        if not choices:
            return runs
        prefix = [choice for choice, _options in choices[:-1]] + [choices[-1][0] + 1]


class _Stepped:
    """Stands for an AtomicView or one of its cells; each call is a step of the actor that makes it."""

    def __init__(self, turns: Turns, target: Any) -> None:
        self._turns = turns
        self._target = target

    def __getattr__(self, name: str) -> Any:
        turns, method = self._turns, getattr(self._target, name)
        if name.startswith("cell_"):
            return lambda offset: _Stepped(turns, method(offset))

        def step(*arguments: int) -> Any:
            turns.gate()
            return method(*arguments)

        return step


def stepped_view(turns: Turns, buffer: bytearray) -> AtomicView:
    """Atomic words on `buffer`, each access a step."""
    return cast(AtomicView, _Stepped(turns, AtomicView(buffer)))


class SteppedWakeup:
    """A semaphore whose post and block are steps; a block without a token waits for ever."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.tokens = 0

    def post(self) -> None:
        """One token."""
        self._turns.gate()
        self.tokens += 1

    def block(self, timeout_s: float = 1.0) -> bool:
        """Take a token; the timeout never comes, so that a lost wakeup is seen. (0: look only.)"""
        if timeout_s == 0:
            self._turns.gate()
            if not self.tokens:
                return False
        else:
            self._turns.gate(lambda: self.tokens > 0)
        self.tokens -= 1
        return True

    def as_wakeup(self) -> Wakeup:
        """The same, typed as what it stands for."""
        return cast(Wakeup, self)


class SteppedMemory(GuestMemory):
    """Guest RAM whose atomic accesses are steps; plain copies belong to the step before them."""

    __slots__ = ("_stepped",)

    def __init__(self, turns: Turns, size: int) -> None:
        super().__init__(None, bytearray(size))
        assert isinstance(self.buffer, bytearray)
        self._stepped = stepped_view(turns, self.buffer)

    @property
    def atomics(self) -> AtomicView:
        """Atomic words anywhere in RAM."""
        return self._stepped


def _closed() -> threading.Lock:
    """A lock that its next taker waits for; handed over by a release (in C, unlike threading.Semaphore)."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _always() -> bool:
    return True
