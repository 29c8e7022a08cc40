"""A core of the explorer as a graph that is found while it is walked: each step of the real code is made once.

What a core does with an input depends on its state alone. So a step, once made by the real code, is an edge that
every pair of states may use in which this one is met again with whatever the other core and the two queues hold:
there are far more pairs than states of either. A state is reached again by the inputs that led to it first; the
instances used last are kept where they are, for the step that follows is often theirs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

Input = tuple[str, Any]
I = TypeVar("I", bound="Instance")  # noqa: E741


class Instance(Protocol):
    """A core that runs: the guest, or the host."""

    def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
        """Do one input: what was sent, what was wrong."""

    def actions(self) -> list[Input]:
        """Inputs that are possible now, besides messages."""

    def facts(self) -> Any:
        """What the invariants ask of."""

    def digest(self) -> bytes:
        """Equal for equal states."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an input led to: the next state, what was sent, what was wrong."""

    state: int
    sent: tuple[int, ...]
    problems: tuple[str, ...]


@dataclass(slots=True)
class _State:
    path: tuple[Input, ...]
    actions: tuple[Input, ...]
    facts: Any


class Messages:
    """Messages by number, so that a queue is a tuple of numbers."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self.payloads: Final[list[bytes]] = []

    def number(self, payload: bytes) -> int:
        """The number of a message."""
        found = self._numbers.get(payload)
        if found is None:
            found = self._numbers[payload] = len(self.payloads)
            self.payloads.append(payload)
        return found


class Core(Generic[I]):
    """The states of a core that are known, and the steps between them."""

    def __init__(self, make: Callable[[], I], messages: Messages, *, kept: int) -> None:
        """`kept`: how many instances are kept at the state that they are in."""
        self._make = make
        self._most = kept
        self._messages = messages
        self._numbers: dict[bytes, int] = {}
        self._states: list[_State] = []
        self._steps: list[dict[Input, Step]] = []
        self._kept: OrderedDict[int, I] = OrderedDict()
        self.made = 0
        """Steps that the real code made, those on the way back to a state included."""
        root = make()
        self._enter(root, ())
        self._keep(0, root)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def edges(self) -> int:
        """How many different steps are known."""
        return sum(len(steps) for steps in self._steps)

    def actions(self, state: int) -> tuple[Input, ...]:
        """What is possible in a state, besides messages."""
        return self._states[state].actions

    def facts(self, state: int) -> Any:
        """Facts of a state."""
        return self._states[state].facts

    def step(self, state: int, what: Input) -> Step:
        """Where an input leads."""
        found = self._steps[state].get(what)
        if found is None:
            found = self._steps[state][what] = self._walk(state, what)
        return found

    def close(self) -> None:
        """Let go of every instance."""
        while self._kept:
            self._kept.popitem()[1].close()

    def _walk(self, state: int, what: Input) -> Step:
        instance = self._at(state)
        self.made += 1
        sent, problems = instance.do(*what)
        numbers = tuple(map(self._messages.number, sent))
        if problems:
            instance.close()
            return Step(state, numbers, tuple(problems))
        following = self._enter(instance, (*self._states[state].path, what))
        self._keep(following, instance)
        return Step(following, numbers, ())

    def _at(self, state: int) -> I:
        """An instance in that state, which is the caller's from now on."""
        instance = self._kept.pop(state, None)
        if instance is None:
            instance = self._make()
            for what in self._states[state].path:
                instance.do(*what)
                self.made += 1
        return instance

    def _enter(self, instance: I, path: tuple[Input, ...]) -> int:
        digest = instance.digest()
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = len(self._states)
            self._states.append(_State(path, tuple(instance.actions()), instance.facts()))
            self._steps.append({})
        return number

    def _keep(self, state: int, instance: I) -> None:
        if state in self._kept:
            instance.close()
            return
        self._kept[state] = instance
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)[1].close()
