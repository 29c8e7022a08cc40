"""The back end that `bench doorbell` rings with: whose turn it is, and what a call says."""

from __future__ import annotations

import time

import pytest

from tests.hostproc.devices.ring_bench import OpenChannel
from tools.bench_caller import CALL, INVITATION, Caller, Party


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> list[OpenChannel]:
    """Two channels of one such device."""
    monkeypatch.setattr(Caller, "party", Party())
    backend = Caller()
    return [OpenChannel(backend), OpenChannel(backend)]


def calls(guest: OpenChannel) -> list[tuple[int, int]]:
    """What a guest was told since the last look."""
    return [CALL.unpack(payload) for _, _, _, payload in guest.received()]


def say(guest: OpenChannel, payload: bytes) -> None:
    """Something from a guest, and the device's turn."""
    guest.send(payload)
    guest.run()


def test_nobody_is_called_before_all_have_invited(guests: list[OpenChannel]) -> None:
    """The last invitation begins it, at the first that invited."""
    say(guests[0], INVITATION.pack(2, 5))
    assert calls(guests[0]) == []

    say(guests[1], INVITATION.pack(2, 5))

    assert calls(guests[0]) == [(5, 0)]
    assert calls(guests[1]) == []


def test_calls_go_round_and_tell_when_the_former_one_was(guests: list[OpenChannel]) -> None:
    """Each answer is the next one's turn; the last call of each only tells."""
    began = time.monotonic_ns()
    for guest in guests:
        say(guest, INVITATION.pack(2, 1))
    told: list[list[tuple[int, int]]] = [[], []]
    for turn in (0, 1, 0, 1):
        told[turn] += calls(guests[turn])
        say(guests[turn], b"here")

    for first, last in told:
        assert first == (1, 0)
        assert last[0] == 0 and began <= last[1] <= time.monotonic_ns()
    assert calls(guests[0]) == []


def test_an_invitation_anew_begins_a_new_round(guests: list[OpenChannel]) -> None:
    """The guests of the former round are forgotten."""
    say(guests[0], INVITATION.pack(1, 0))
    say(guests[0], b"here")
    calls(guests[0])

    say(guests[0], INVITATION.pack(1, 7))

    assert calls(guests[0]) == [(7, 0)]
