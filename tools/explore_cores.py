"""A core of the explorer as a graph that is found while it is walked: each step of the real code is made once.

What a core does with an input depends on its state alone. So a step, once made by the real code, is an edge that
every pair of states may use in which this one is met again with whatever the other core and the two queues hold:
there are far more pairs than states of either. The first step out of a state is made by whoever came there, if it
still stands there; for others the nearest state before it that could be kept is put back, and what led from there
to this one is done again. What will be asked for in a new state is made as long as somebody stands there (`ahead`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from emu.wire.messages import RelidReleased, parse

FLAT: Final = 2
"""The version of `marshal` that writes equal values alike: later ones refer back to what is the same object."""

MOST_AHEAD: Final = 8
"""Steps that are made in one go, at most: those behind the last level of an exploration are made in vain."""

Input = tuple[str, Any]
I = TypeVar("I", bound="Instance")  # noqa: E741


@dataclass(frozen=True, slots=True)
class Setting:
    """The small world that is explored; `without`: switches that are off (`emu.switches`)."""

    devices: int = 2
    subchannels: int = 1
    threads: bool = False
    """Whether it is a transition which of the guest's threads goes on; else the guest runs until it stands still."""
    without: tuple[str, ...] = ()
    era: str = "current"
    twice: bool = False
    """Whether the host may send each RESCIND a second time (the fault `host.dup_rescind`)."""

    @property
    def switches(self) -> dict[str, bool]:
        """As a scenario's `[switches]` has them."""
        return dict.fromkeys(self.without, False)


class Instance(Protocol):
    """A core that runs: the guest, or the host."""

    def do(self, kind: str, argument: Any) -> tuple[list[bytes], list[str]]:
        """Do one input: what was sent, what was wrong."""

    def again(self, kind: str, argument: Any) -> None:
        """Do an input of which it is known what comes of it."""

    def actions(self) -> list[Input]:
        """Inputs that are possible now, besides messages."""

    def facts(self) -> Any:
        """What the invariants ask of."""

    def digest(self) -> bytes:
        """Equal for equal states."""

    def save(self) -> Any:
        """What `restore` of any other instance needs to be in this state; None for a state that cannot be kept."""

    def restore(self, saved: Any) -> None:
        """Be in that state."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an input led to: the next state, what was sent, what was wrong."""

    state: int
    sent: tuple[int, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _State:
    came: tuple[int, Input] | None
    """From which state, by which input; None for the first."""
    actions: tuple[Input, ...]
    facts: Any
    saved: Any


class Messages:
    """Messages by number, so that a queue is a tuple of numbers."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self.payloads: Final[list[bytes]] = []
        self.delivered: Final[list[Input]] = []
        """Of each message: the guest takes it."""
        self.received: Final[list[Input]] = []
        """Of each message: the host takes it."""
        self.releases: Final[list[int]] = []
        """Of each message: the relid that it gives back, 0 for none."""

    def number(self, payload: bytes) -> int:
        """The number of a message."""
        found = self._numbers.get(payload)
        if found is None:
            found = self._numbers[payload] = len(self.payloads)
            self.payloads.append(payload)
            self.delivered.append(("deliver", payload))
            self.received.append(("receive", payload))
            message = parse(payload)
            self.releases.append(message.child_relid if isinstance(message, RelidReleased) else 0)
        return found


class Core(Generic[I]):
    """The states of a core that are known, and the steps between them."""

    def __init__(self, make: Callable[[], I], messages: Messages, *, kept: int, ahead: str = "") -> None:
        """`kept`: how many instances are kept at the state that they are in.

        `ahead`: the kind of input that is made before it is asked for ("": none).
        """
        self._ahead = ahead
        self._make = make
        self._most = kept
        self._messages = messages
        self._numbers: dict[bytes, int] = {}
        self._states: list[_State] = []
        self._steps: list[dict[Input, Step]] = []
        self._kept: OrderedDict[int, I] = OrderedDict()
        self._spare: list[I] = []
        self.made = 0
        """Steps that the real code made, those on the way back to a state included."""
        root = make()
        self._enter(root, None)
        assert self._states[0].saved is not None, "a core begins in a state that can be kept"
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
            self._walk(state, what)
            found = self._steps[state][what]
        return found

    def close(self) -> None:
        """Let go of every instance."""
        while self._kept:
            self._kept.popitem()[1].close()
        while self._spare:
            self._spare.pop().close()

    def _walk(self, state: int, what: Input) -> None:
        """Make a step, and then, as long as that leads to what was never seen, one that is possible there.

        Such a step will be asked for, and then nobody would stand there any more: what led there would be done again.
        """
        instance = self._at(state)
        for _ in range(MOST_AHEAD):
            self.made += 1
            sent, problems = instance.do(*what)
            numbers = tuple(map(self._messages.number, sent))
            if problems:
                instance.close()  # nobody knows what it is good for now
                self._steps[state][what] = Step(state, numbers, tuple(problems))
                return
            known = len(self._states)
            following = self._enter(instance, (state, what))
            self._steps[state][what] = Step(following, numbers, ())
            ahead = next((one for one in self._states[following].actions if one[0] == self._ahead), None)
            state = following
            if following < known or ahead is None:
                break
            what = ahead
        self._keep(state, instance)

    def _at(self, state: int) -> I:
        """An instance in that state, which is the caller's from now on."""
        instance = self._kept.pop(state, None)
        if instance is not None:
            return instance
        inputs: list[Input] = []
        known = self._states[state]
        while known.saved is None:
            assert known.came is not None
            state, what = known.came
            inputs.append(what)
            known = self._states[state]
        instance = self._spare.pop() if self._spare else self._make()
        instance.restore(known.saved)
        for what in reversed(inputs):
            instance.again(*what)
            self.made += 1
        return instance

    def _enter(self, instance: I, came: tuple[int, Input] | None) -> int:
        digest = instance.digest()
        number = self._numbers.get(digest)
        if number is None:
            number = self._numbers[digest] = len(self._states)
            self._states.append(_State(came, tuple(instance.actions()), instance.facts(), instance.save()))
            self._steps.append({})
        return number

    def _keep(self, state: int, instance: I) -> None:
        if state in self._kept:
            self._spare.append(instance)
            return
        self._kept[state] = instance
        if len(self._kept) > self._most:
            self._spare.append(self._kept.popitem(last=False)[1])
