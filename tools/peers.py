"""Other ways to move bytes between two processes: what `bench` compares itself with, in the same run.

Each peer is used as its own documentation uses it, with its own batch calls where it has any, the two ends on
two cores. Bytes go in and bytes come out: nothing is pickled that need not be. A peer that is not installed,
cannot carry messages of a size, fails, or passes its deadline is left out, and `LeftOut` says why.
"""

from __future__ import annotations

import mmap
import time
from array import array
from collections.abc import Callable
from itertools import repeat
from typing import Final

from emu.errors import DeadlinePassed, VmbusError
from tools.peer_links import BATCH, LINKS, LeftOut, Link, Receiving, Sending
from tools.two_ends import Cpus, Marks, run_both

__all__ = ["PEERS", "LeftOut", "messages_per_second", "missing", "round_trips"]

DEADLINE_S: Final = 20.0
PEERS: Final = tuple(LINKS)
"""Every peer's name."""


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here; None if it can."""
    return LINKS[name].missing()


def messages_per_second(name: str, size: int, count: int, cpus: Cpus, deadline_s: float = DEADLINE_S) -> float:
    """Send `count` messages of `size` bytes from the first core to the second, with batch calls if the peer has any.

    Raises LeftOut.
    """
    payload = bytes(range(1, 256)) * (size // 255 + 1)
    payload = payload[:size]
    warm = 1 + count // 4
    with _link(name, size) as link, Marks() as marks:

        def send() -> None:
            # One end opens after the other: not every library can be opened at both at once.
            marks.wait_until_ready()
            sending = link.sending()
            # Whatever connects, maps or grows at the first messages has done so before the clock runs.
            _send_all(sending, payload, warm)
            marks.wait_until_warm()
            marks.begin()
            _send_all(sending, payload, count)
            sending.finish()

        def receive() -> None:
            receiving = link.receiving()
            marks.ready()
            _receive_all(receiving, warm)
            marks.warm()
            last = _receive_all(receiving, count)
            marks.end()
            if last != payload:
                raise VmbusError(f"{name}: the last message came back as {len(last)} other bytes")
            receiving.finish()

        _run(name, send, receive, cpus, deadline_s)
        return count * 1e9 / marks.elapsed_ns


def round_trips(name: str, size: int, count: int, cpus: Cpus, deadline_s: float = DEADLINE_S) -> list[int]:
    """Send a message of `size` bytes to the second core and take it back, `count` times; ns of each.

    Each end waits as the peer itself waits for a message. Raises LeftOut.
    """
    payload = b"x" * size
    with _link(name, size) as there, _link(name, size) as back, Marks() as marks:
        memory = mmap.mmap(-1, 8 * count)

        def ask() -> None:
            marks.wait_until_ready()
            sending, receiving = there.sending(), back.receiving()
            send, receive, now = sending.one, receiving.one, time.monotonic_ns
            times = array("Q")
            for _ in repeat(None, count):
                begin = now()
                send(payload)
                receive()
                times.append(now() - begin)
            memory[:] = times.tobytes()
            receiving.finish()
            sending.finish()

        def answer() -> None:
            receiving, sending = there.receiving(), back.sending()
            send, receive = sending.one, receiving.one
            marks.ready()
            for _ in repeat(None, count):
                send(receive())
            receiving.finish()
            sending.finish()

        _run(name, ask, answer, cpus, deadline_s)
        times = array("Q", memory[:])
        memory.close()
        return list(times)


def _link(name: str, size: int) -> Link:
    if reason := missing(name):
        raise LeftOut(name, reason)
    link = LINKS[name](size)
    try:
        link.open()
    except Exception as error:
        link.close()
        raise LeftOut(name, f"cannot be opened: {error}") from error
    return link


def _run(name: str, first: Callable[[], None], second: Callable[[], None], cpus: Cpus, deadline_s: float) -> None:
    try:
        run_both(name, first, second, cpus, deadline_s)
    except DeadlinePassed:
        raise LeftOut(name, f"was not done after {deadline_s:g} s") from None
    except VmbusError as error:
        raise LeftOut(name, str(error)) from error


def _send_all(sending: Sending, payload: bytes, count: int) -> None:
    if sending.many is None:
        one = sending.one
        for _ in repeat(None, count):
            one(payload)
        return
    payloads = [payload] * BATCH
    while count > 0:
        count -= sending.many(payloads[:count])


def _receive_all(receiving: Receiving, count: int) -> bytes:
    """Take all messages; the last one."""
    message = b""
    if receiving.some is None:
        one = receiving.one
        for _ in repeat(None, count):
            message = one()
        return message
    while count > 0:
        messages = receiving.some()
        if messages:
            count -= len(messages)
            message = messages[-1]
    return message
