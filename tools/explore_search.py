"""Every order in which host, guest, devices and the guest's administrator may act, to a given depth.

A state of the pair is the state of each core and the two queues between them. Breadth first, so that what is found
is found by the shortest way; the invariants are looked at in each new state. One transition is one of:

    the guest takes the oldest message of the host's, and runs until nobody in it can go on
    the host takes the oldest of the guest's
    a device comes, goes, or answers the server with yes or no
    the guest's administrator binds or unbinds a driver, or unloads the bus
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from emu.errors import UserError
from emu.machine import KICK_SIGNAL
from guestproc.kernel.layout import ChannelState as GuestState
from hostproc.protocol.session import Link
from hostproc.protocol.states import REVOKED_STATES, GpadlState
from hostproc.protocol.states import ChannelState as HostState
from tools.explore_cores import Core, Input, Messages, Step
from tools.explore_guest import Guest, GuestFacts
from tools.explore_host import Host, HostFacts
from tools.explore_messages import text_of

LONGEST_QUEUE: Final = 64
"""Messages under way in one direction; more are a violation, for nobody in this small world owes so many."""

HOSTS_KEPT: Final = 1024
GUESTS_KEPT: Final = 24
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
    """What was broken, after which transitions (in words)."""

    problems: list[str]
    schedule: list[str]


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
        *,
        devices: int = 2,
        subchannels: int = 1,
        guest: type[Guest] = Guest,
        host: type[Host] = Host,
    ) -> None:
        # Each guest sets the handler of the kick, which nobody sends here.
        self._handler = signal.getsignal(KICK_SIGNAL)
        self.messages = Messages()
        self._host_class, self._guest_class = host, guest
        self._sizes = devices, subchannels
        self._boot = self._record_boot()
        self.host = Core(self._new_host, self.messages, kept=HOSTS_KEPT)
        self.guest = Core(self._new_guest, self.messages, kept=GUESTS_KEPT)
        self._words = host(*self._sizes)

    def close(self) -> None:
        """Let go of every guest."""
        self.guest.close()
        self.host.close()
        signal.signal(KICK_SIGNAL, self._handler)

    # -- beginning --------------------------------------------------------------------------------------------

    def _record_boot(self) -> list[tuple[str, bytes]]:
        """What the two say until the guest has connected and asked for offers."""
        guest, host = self._guest_class(*self._sizes), self._host_class(*self._sizes)
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

    def _new_host(self) -> Host:
        host = self._host_class(*self._sizes)
        for way, payload in self._boot:
            if way == TO_HOST:
                host.do("receive", payload)
        return host

    def _new_guest(self) -> Guest:
        guest = self._guest_class(*self._sizes)
        guest.boot()
        for way, payload in self._boot:
            if way == TO_GUEST:
                guest.do("deliver", payload)
        return guest

    # -- walking ----------------------------------------------------------------------------------------------

    def transitions(self, pair: Pair) -> Iterator[Transition]:
        """What may happen next."""
        host, guest, to_guest, to_host = pair
        if to_guest:
            yield TO_GUEST, None
        if to_host:
            yield TO_HOST, None
        for what in self.host.actions(host):
            yield HOST, what
        for what in self.guest.actions(guest):
            yield GUEST, what

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

    def replay(self, schedule: Sequence[str]) -> Found:
        """Do the transitions that a schedule names, one after the other, to the first violation or the end."""
        found = Found()
        pair: Pair = (0, 0, (), ())
        for number, line in enumerate(schedule, 1):
            transition = next((one for one in self.transitions(pair) if self.text_of(pair, one) == line), None)
            if transition is None:
                possible = "; ".join(self.text_of(pair, one) for one in self.transitions(pair))
                raise UserError(f"schedule, step {number}: {line!r} is not possible here; possible: {possible}")
            after, problems = self.follow(pair, transition)
            found.transitions = found.depth = number
            wrong = list(problems) or self.judge(after)
            if wrong:
                found.violation = Violation(wrong, list(schedule[:number]))
                break
            pair = after
        found.states = found.transitions + 1
        return found

    def _counted(self, found: Found) -> Found:
        found.states = len(found.parents) + 1
        return found

    # -- judging ----------------------------------------------------------------------------------------------

    def judge(self, pair: Pair) -> list[str]:
        """Which invariants a state breaks."""
        host: HostFacts = self.host.facts(pair[0])
        guest: GuestFacts = self.guest.facts(pair[1])
        if len(pair[2]) > LONGEST_QUEUE or len(pair[3]) > LONGEST_QUEUE:
            return ["INV-29: a queue grows without end"]
        wrong = _always(host, guest, [self.messages.releases[one] for one in pair[3]])
        if not pair[2] and not pair[3] and not host.open_answers:
            wrong += _when_quiet(host, guest)
        return wrong

    # -- telling ----------------------------------------------------------------------------------------------

    def _violation(self, found: Found, pair: Pair, transition: Transition, problems: list[str]) -> Violation:
        self._counted(found)
        steps = [(pair, transition)]
        while pair in found.parents:
            pair, transition = found.parents[pair]
            steps.append((pair, transition))
        return Violation(problems, [self.text_of(*step) for step in reversed(steps)])

    def text_of(self, pair: Pair, transition: Transition) -> str:
        """A transition for people."""
        who, what = transition
        if who == TO_GUEST:
            return f"guest takes {text_of(self.messages.payloads[pair[2][0]])}"
        if who == TO_HOST:
            return f"host takes {text_of(self.messages.payloads[pair[3][0]])}"
        assert what is not None
        if who == HOST:
            return self._words.text_of(*what)
        return f"guest: {what[0]}" + (f" relid {what[1]}" if what[1] else "")


def _always(host: HostFacts, guest: GuestFacts, released: list[int]) -> list[str]:
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
            wrong.append(f"INV-01: relid {relid} was rescinded and is never released")
        elif (ours.state is GuestState.OPENED_STATE) != (theirs.state is HostState.OPEN):
            wrong.append(f"INV-30: relid {relid} is {ours.state.name} in the guest, {theirs.state.name} on the host")
        if theirs.gpadls and ours.state is not GuestState.OPENED_STATE:
            wrong.append(f"INV-12: relid {relid} is closed, and the host has {len(theirs.gpadls)} GPADLs of it")
    return wrong
