"""Every order in which host, guest, devices and the guest's administrator may act, to a given depth.

A state of the pair is the state of each core and the two queues between them. Breadth first, so that what is found
is found by the shortest way; the invariants are looked at in each new state. One transition is one of:

    the guest takes the oldest message of the host's, and runs until nobody in it can go on
    the host takes the oldest of the guest's
    a device comes, goes, or answers the server with yes or no (and its RESCIND is sent twice, if that is asked for)
    the guest's administrator binds or unbinds a driver, or unloads the bus

With `threads` the guest does not run until it stands still: whoever takes a message or begins something runs until it
waits, and it is a transition of its own which of those that can go on does so, until it waits or comes to a sync point.
"""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from emu.errors import UserError
from emu.machine import KICK_SIGNAL
from guestproc.kernel.layout import ChannelState as GuestState
from hostproc.protocol.session import Link
from hostproc.protocol.states import REVOKED_STATES, GpadlState
from hostproc.protocol.states import ChannelState as HostState
from tools.explore_cores import Core, Input, Messages, Setting, Step
from tools.explore_events import Event, Names, of_guest, of_host, of_message, same
from tools.explore_guest import Guest, GuestFacts
from tools.explore_host import Host, HostFacts

LONGEST_QUEUE: Final = 64
"""Messages under way in one direction; more are a violation, for nobody in this small world owes so many."""

HOSTS_KEPT: Final = 1024
GUESTS_KEPT: Final = 32
"""A guest has a dozen threads, and RAM."""

TO_GUEST: Final = "to guest"
TO_HOST: Final = "to host"
HOST: Final = "host"
GUEST: Final = "guest"

Pair = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""State of the host, of the guest, messages to the guest, messages to the host."""
Transition = tuple[str, Input | None]


@dataclass(slots=True)
class Violation:
    """What was broken, after which transitions."""

    problems: list[str]
    schedule: list[Event]


@dataclass(slots=True)
class Found:
    """What an exploration came to; `depth`: the deepest level all of whose states were expanded."""

    transitions: int = 0
    states: int = 1
    depth: int = 0
    exhausted: bool = False
    stopped: str = ""
    violation: Violation | None = None
    parents: dict[Pair, tuple[Pair, Transition]] = field(default_factory=dict)


class Explorer:
    """The two cores, joined. `guest` and `host` are their classes: a test may break a rule in one of them."""

    def __init__(
        self,
        setting: Setting | None = None,
        *,
        guest: type[Guest] = Guest,
        host: type[Host] = Host,
    ) -> None:
        # Each guest sets the handler of the kick, which nobody sends here.
        self._handler = signal.getsignal(KICK_SIGNAL)
        self.messages = Messages()
        self._host_class, self._guest_class = host, guest
        self.setting = setting or Setting()
        self._boot = self._record_boot()
        self.host = Core(self._new_host, self.messages, kept=HOSTS_KEPT)
        self.guest = Core(self._new_guest, self.messages, kept=GUESTS_KEPT, ahead="run")
        self.slots = host(self.setting).slots()
        self._own: dict[tuple[int, int], list[Transition]] = {}
        """What may happen besides messages, by the states of the two: many pairs of queues share it."""
        self._judged: dict[tuple[int, int, tuple[int, ...] | None], list[str]] = {}

    def close(self) -> None:
        """Let go of every guest."""
        self.guest.close()
        self.host.close()
        signal.signal(KICK_SIGNAL, self._handler)

    # -- beginning --------------------------------------------------------------------------------------------

    def _record_boot(self) -> list[tuple[str, bytes]]:
        """What the two say until the guest has connected and asked for offers."""
        guest, host = self._guest_class(self.setting), self._host_class(self.setting)
        said: list[tuple[str, bytes]] = []
        posts = guest.boot()
        while posts:
            answers: list[bytes] = []
            for payload in posts:
                said.append((TO_HOST, payload))
                answers += host.do("receive", payload)[0]
            posts = []
            for payload in answers:
                said.append((TO_GUEST, payload))
                posts += guest.do("deliver", payload)[0]
        guest.close()
        return said

    def said_by_guest(self) -> list[bytes]:
        """What the guest says until it has asked for offers."""
        return [payload for way, payload in self._boot if way == TO_HOST]

    def _new_host(self) -> Host:
        host = self._host_class(self.setting)
        for payload in self.said_by_guest():
            host.do("receive", payload)
        return host

    def _new_guest(self) -> Guest:
        guest = self._guest_class(self.setting)
        guest.boot()
        for way, payload in self._boot:
            if way == TO_GUEST:
                guest.do("deliver", payload)
        guest.begin()
        return guest

    # -- walking ----------------------------------------------------------------------------------------------

    def transitions(self, pair: Pair) -> list[Transition]:
        """What may happen next."""
        host, guest, to_guest, to_host = pair
        own = self._own.get((host, guest))
        if own is None:
            own = self._own[host, guest] = [
                *((HOST, what) for what in self.host.actions(host)),
                *((GUEST, what) for what in self.guest.actions(guest)),
            ]
        if not to_guest:
            return [(TO_HOST, None), *own] if to_host else own
        return [(TO_GUEST, None), (TO_HOST, None), *own] if to_host else [(TO_GUEST, None), *own]

    def follow(self, pair: Pair, transition: Transition) -> tuple[Pair, tuple[str, ...]]:
        """Where a transition leads, and which rules it broke on the way."""
        host, guest, to_guest, to_host = pair
        who, what = transition
        if who in (TO_GUEST, GUEST):
            if what is None:
                what, to_guest = self.messages.delivered[to_guest[0]], to_guest[1:]
            step: Step = self.guest.step(guest, what)
            return (host, step.state, to_guest, to_host + step.sent), step.problems
        if what is None:
            what, to_host = self.messages.received[to_host[0]], to_host[1:]
        step = self.host.step(host, what)
        return (step.state, guest, to_guest + step.sent, to_host), step.problems

    def explore(
        self, depth: int, *, seed: int = 0, states: int = 0, out_of_time: Callable[[], bool] | None = None
    ) -> Found:
        """Walk level by level; `states` bounds how many are kept (0: no bound)."""
        with _few_collections():
            return self._explore(depth, seed, states, out_of_time)

    def _explore(self, depth: int, seed: int, states: int, out_of_time: Callable[[], bool] | None) -> Found:
        root: Pair = (0, 0, (), ())
        found = Found()
        parents = found.parents
        level = [root]
        order = random.Random(seed)
        for reached in range(1, depth + 1):
            order.shuffle(level)
            following: list[Pair] = []
            for pair in level:
                for transition in self.transitions(pair):
                    found.transitions += 1
                    after, problems = self.follow(pair, transition)
                    if problems:
                        found.violation = self._violation(found, pair, transition, list(problems))
                        return found
                    if after in parents or after == root:
                        continue
                    parents[after] = (pair, transition)
                    following.append(after)
                    wrong = self.judge(after)
                    if wrong:
                        found.violation = self._violation(found, pair, transition, wrong)
                        return found
                if out_of_time is not None and out_of_time():
                    found.stopped = "time"
                    return self._counted(found)
                if states and len(parents) >= states:
                    found.stopped = "states"
                    return self._counted(found)
            found.depth = reached
            level = following
            if not level:
                found.exhausted = True
                break
        return self._counted(found)

    def replay(self, schedule: Sequence[Mapping[str, Any]]) -> Found:
        """Do the transitions that a schedule names, one after the other, to the first violation or the end."""
        found = Found()
        pair: Pair = (0, 0, (), ())
        names = Names()
        for number, wanted in enumerate(schedule, 1):
            possible = [(one, self.event_of(pair, one, names)) for one in self.transitions(pair)]
            transition = next((one for one, event in possible if same(event, wanted)), None)
            if transition is None:
                others = "; ".join(event["text"] for _, event in possible)
                what = wanted.get("text", dict(wanted))
                raise UserError(f"schedule, step {number}: {what!r} is not possible here; possible: {others}")
            pair, problems = self.told(pair, transition, names)
            found.transitions = found.depth = number
            wrong = list(problems) or self.judge(pair)
            if wrong:
                found.violation = Violation(wrong, [dict(one) for one in schedule[:number]])
                break
        found.states = found.transitions + 1
        return found

    def _counted(self, found: Found) -> Found:
        found.states = len(found.parents) + 1
        return found

    # -- judging ----------------------------------------------------------------------------------------------

    def judge(self, pair: Pair) -> list[str]:
        """Which invariants a state breaks."""
        number, other, to_guest, to_host = pair
        if len(to_guest) > LONGEST_QUEUE or len(to_host) > LONGEST_QUEUE:
            return ["INV-29: a queue grows without end"]
        # Of the queues only this matters: whether they are empty, else which relids are on their way back.
        releases = self.messages.releases
        key = number, other, tuple(releases[one] for one in to_host) if to_guest or to_host else None
        wrong = self._judged.get(key)
        if wrong is None:
            host: HostFacts = self.host.facts(number)
            guest: GuestFacts = self.guest.facts(other)
            wrong = _always(host, guest, key[2] or ())
            if key[2] is None and not (host.open_answers or guest.runnable):
                wrong += _when_quiet(host, guest)
            self._judged[key] = wrong
        return wrong

    # -- telling ----------------------------------------------------------------------------------------------

    def _violation(self, found: Found, pair: Pair, transition: Transition, problems: list[str]) -> Violation:
        self._counted(found)
        steps = [(pair, transition)]
        while pair in found.parents:
            pair, transition = found.parents[pair]
            steps.append((pair, transition))
        names = Names()
        schedule = []
        for pair, transition in reversed(steps):
            schedule.append(self.event_of(pair, transition, names))
            self.told(pair, transition, names)
        return Violation(problems, schedule)

    def told(self, pair: Pair, transition: Transition, names: Names) -> tuple[Pair, tuple[str, ...]]:
        """As `follow`; `names` learns what was offered."""
        after, problems = self.follow(pair, transition)
        for number in after[2][len(pair[2]) - (transition[0] == TO_GUEST) :]:
            names.sent(self.messages.payloads[number])
        return after, problems

    def event_of(self, pair: Pair, transition: Transition, names: Names) -> Event:
        """A transition as plain values."""
        who, what = transition
        if who == TO_GUEST:
            return of_message("deliver", self.messages.payloads[pair[2][0]], names)
        if who == TO_HOST:
            return of_message("receive", self.messages.payloads[pair[3][0]], names)
        assert what is not None
        if who == HOST:
            return of_host(what, names, self.slots)
        held: GuestFacts = self.guest.facts(self.guest.step(pair[1], what).state)
        return of_guest(what, names, held.held)


@contextmanager
def _few_collections() -> Iterator[None]:
    """What an exploration makes, it keeps: looking through all of that for garbage is most often in vain."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _always(host: HostFacts, guest: GuestFacts, released: Sequence[int]) -> list[str]:
    """What holds in every state; `released`: relids whose RELID_RELEASED is under way."""
    wrong: list[str] = []
    if host.link is not Link.CONNECTED:
        return wrong
    for relid, channel in guest.channels.items():
        theirs = host.channels.get(relid)
        if channel.state is GuestState.OPENED_STATE and not channel.rescinded and theirs is None:
            wrong.append(f"INV-01: relid {relid} is open in the guest, and released on the host")
    known = {gpadl for _type, _relid, gpadl in guest.requests}
    known |= {channel.gpadl for channel in guest.channels.values() if channel.pages}
    for relid, theirs in host.channels.items():
        if theirs.state in REVOKED_STATES or relid in released:
            continue
        for gpadl, state in theirs.gpadls.items():
            if state is GpadlState.ACCEPTED and gpadl not in known:
                wrong.append(f"INV-12: the host holds GPADL {gpadl:#x} of relid {relid}, the guest has its pages back")
    return wrong


def _when_quiet(host: HostFacts, guest: GuestFacts) -> list[str]:
    """What holds when nothing is under way, and no device owes an answer."""
    wrong = [f"INV-15: {name} of relid {relid} is never answered" for name, relid, _gpadl in guest.requests]
    wrong += [f"INV-28: {one} of the guest waits for ever" for one in guest.busy]
    if guest.unloaded:
        wrong += [f"INV-28: unloaded, and {leak} not given back" for leak in guest.leaks]
        if host.link is not Link.DISCONNECTED or host.gpadls:
            wrong.append(f"INV-12: unloaded, and the host is {host.link.value} with {host.gpadls} GPADLs")
        return wrong
    for relid in sorted(guest.channels.keys() ^ host.channels.keys()):
        where = "guest" if relid in guest.channels else "host"
        wrong.append(f"INV-01: only the {where} has relid {relid}")
    for relid in sorted(guest.channels.keys() & host.channels.keys()):
        ours, theirs = guest.channels[relid], host.channels[relid]
        if theirs.state in REVOKED_STATES:
            # An open sub-channel is left to whoever closes its primary, also when it alone is taken back.
            if ours.sub and ours.state is GuestState.OPENED_STATE:
                continue
            wrong.append(f"INV-01: relid {relid} was rescinded and is never released")
        elif (ours.state is GuestState.OPENED_STATE) != (theirs.state is HostState.OPEN):
            wrong.append(f"INV-30: relid {relid} is {ours.state.name} in the guest, {theirs.state.name} on the host")
        if theirs.gpadls and ours.state is not GuestState.OPENED_STATE:
            wrong.append(f"INV-12: relid {relid} is closed, and the host has {len(theirs.gpadls)} GPADLs of it")
    return wrong
