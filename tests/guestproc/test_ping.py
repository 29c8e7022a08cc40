"""PING in a machine that records: it waits for the drain before that would lose anything, and not for ever."""

from __future__ import annotations

from array import array
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emu.layout import MachineState
from guestproc.echo_session import EchoSession
from guestproc.pinger import MOST_BEHIND, Pinger
from guestproc.tally import ChannelGone


class Recording:
    """A trace whose drain comes as far as it is told at each look, and a processor whose halts are counted."""

    def __init__(self, *behind: int) -> None:
        self._behind = list(behind)
        self.halts = 0

    def behind(self) -> int:
        return self._behind.pop(0) if len(self._behind) > 1 else self._behind[0]

    def idle(self, _timeout_ns: int) -> None:
        self.halts += 1

    def pinger(self) -> Pinger:
        session = SimpleNamespace(
            vcpu=self, current=SimpleNamespace(trace=self), channel=SimpleNamespace(relid=1), send=None, take=None
        )
        return Pinger(cast(Any, session), b"", array("Q"))


@pytest.mark.parametrize(
    ("behind", "halts"),
    [((MOST_BEHIND // 2,), 0), ((MOST_BEHIND, MOST_BEHIND // 2 + 1, MOST_BEHIND // 2), 2)],
)
def test_ping_waits_until_half_of_what_waits_is_drained(behind: tuple[int, ...], halts: int) -> None:
    """Not less, or it would wait again soon: each wait lets the processor cool down."""
    recording = Recording(*behind)

    assert recording.pinger().let_drain() >= 0
    assert recording.halts == halts


def test_ping_goes_on_where_nobody_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 30 ms: a flight recorder's rings are never drained."""
    clock = iter(range(0, 10**12, 10_000_000))
    monkeypatch.setattr("guestproc.pinger.now_ns", lambda: next(clock))
    recording = Recording(MOST_BEHIND + 1)

    recording.pinger().let_drain()

    assert recording.halts == 2


class Prompt:
    """An echo that answers at once, and a program that needs `step_ns` from one look at the clock to the next."""

    def __init__(self, step_ns: int) -> None:
        self._waiting: deque[str] = deque()
        self.vcpu = self
        self.current = SimpleNamespace(trace=None)
        self.channel = SimpleNamespace(relid=1)
        self._now = 0
        self._step_ns = step_ns
        self.sent_ns: list[int] = []

    def monotonic_ns(self) -> int:
        self._now += self._step_ns
        return self._now

    def send(self, payloads: list[bytes], **_words: int) -> int:
        self.sent_ns.append(self._now)
        self._waiting.append("answer")
        return len(payloads)

    def take(self) -> list[str]:
        came = list(self._waiting)
        self._waiting.clear()
        return came

    def wait(self) -> None: ...

    def safe_point(self) -> None: ...


def test_answer_is_taken_as_soon_as_it_is_there_by_who_is_behind_his_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that cannot be held makes its sender late, which is told; answers that have come are no later by that."""
    prompt = Prompt(step_ns=1_000)
    monkeypatch.setattr("guestproc.pinger.now_ns", prompt.monotonic_ns)
    samples = array("Q")

    Pinger(cast(Any, prompt), b"", samples).run(wanted_ns=100_000, every_ns=100)

    assert len(samples) == 2 * len(prompt.sent_ns) == 2_000
    assert max(done - sent for done, sent in zip(samples[1::2], prompt.sent_ns, strict=True)) <= 2_000


def session_of(came: deque[Any], *, rescinded: bool) -> EchoSession:
    """A session whose halt ends at once, with this in its inbox."""
    session: Any = EchoSession.__new__(EchoSession)
    session.inbox = came
    session.vcpu = SimpleNamespace(idle=lambda _timeout_ns: None, now=lambda: 0)
    session._machine_state = lambda: int(MachineState.RUNNING)
    session._claims = lambda: 0
    session._rescind = lambda: int(rescinded)
    session._moved = True
    assert isinstance(session, EchoSession)
    return session


def test_pause_that_brings_nothing_sees_that_the_channel_is_gone() -> None:
    """Who waits for an answer that never comes would wait for ever; who has one sends again, and hears it then."""
    session_of(deque(["answer"]), rescinded=True).pause()
    session_of(deque(), rescinded=False).pause()
    with pytest.raises(ChannelGone):
        session_of(deque(), rescinded=True).pause()
