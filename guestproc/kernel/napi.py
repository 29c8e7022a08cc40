"""NAPI: a driver's interrupt only schedules a poll, and the poll reads until nothing comes, a budget at a time.

The whole state is one u32 word, so every step is one atomic operation:

    SCHED      somebody owns it: a poll is due or runs, or it is disabled; only the owner reads the ring
    MISSED     an interrupt came while it was owned: who completes must poll once more
    DISABLE    somebody waits to own it for good: nobody schedules it any more
    WAITED     that somebody sleeps: who completes wakes them

What the kernel runs in NET_RX_SOFTIRQ is a tasklet of its own here (`net_rx_action` with one instance on its list): it
runs on the processor that took the interrupt, with interrupts on, and `TaskletQueue` bounds how often it runs anew.
A poll that used its whole budget stays owner and comes again, its ring still masked; one that used less has completed,
and its driver unmasks and looks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from guestproc.kernel.actors import Actor
from guestproc.kernel.records import Part, Ram
from guestproc.kernel.tasklet import Tasklet, TaskletQueue, tasklet_kill
from guestproc.kernel.wait import DEFAULT_TIMEOUT_NS, WaitQueue, assert_may_wait

SCHED: Final = 1
MISSED: Final = 2
DISABLE: Final = 4
WAITED: Final = 8
WEIGHT: Final = 64
"""The budget of one poll (NAPI_POLL_WEIGHT)."""


class Napi:
    """`napi_struct`: the state word u32, 4 bytes of nothing, the tasklet that polls."""

    SIZE: Final = 8 + Tasklet.SIZE

    __slots__ = ("name", "tasklet", "word")

    def __init__(self, ram: Ram, gpa: int, name: str) -> None:
        self.word: Final = ram.u32(gpa)
        self.tasklet: Final = Tasklet(ram, gpa + 8, name)
        self.name: Final = name

    @property
    def scheduled(self) -> bool:
        """Whether somebody owns it."""
        return bool(self.word.load() & SCHED)


def netif_napi_add(napi: Napi, function: int, argument: int) -> None:
    """Make it: the tasklet `function` will call `napi_poll`. It is disabled until `napi_enable`."""
    napi.tasklet.init(function, argument)
    napi.word.store(SCHED)


def netif_napi_del(actor: Actor, napi: Napi, idle: WaitQueue) -> None:
    """After `napi_disable`: wait until the tasklet has returned; the record may be freed."""
    tasklet_kill(actor, napi.tasklet, idle)


def napi_enable(napi: Napi) -> None:
    """It may be scheduled; what came while it could not be is forgotten."""
    seen = napi.word.fetch_and(~(SCHED | MISSED) & 0xFFFFFFFF)
    assert seen & SCHED, f"{napi.name} is enabled already"


def napi_disable(actor: Actor, napi: Napi, idle: WaitQueue, timeout_ns: int = DEFAULT_TIMEOUT_NS) -> None:
    """Own it for good: waits until the poll that runs, or is due, has completed."""
    assert_may_wait(actor, napi.name)
    word = napi.word
    word.fetch_or(DISABLE)

    def owned_or_announced() -> bool:
        while True:
            seen = word.load()
            if not seen & SCHED:
                # DISABLE has done its work as soon as nobody but us can own it.
                if word.cas(seen, SCHED) == seen:
                    return True
            elif seen & WAITED or word.cas(seen, seen | WAITED) == seen:
                return False

    idle.wait_until(actor, owned_or_announced, timeout_ns, f"{napi.name} to be idle")


def napi_schedule_prep(napi: Napi) -> bool:
    """Become the owner; False: it has one, who will poll once more, or it is being disabled."""
    word = napi.word
    while True:
        seen = word.load()
        if seen & DISABLE:
            return False
        if word.cas(seen, seen | (MISSED if seen & SCHED else SCHED)) == seen:
            return not seen & SCHED


def __napi_schedule(queue: TaskletQueue, napi: Napi) -> None:
    """Let the owned one poll, on this processor, once its interrupt has ended."""
    assert napi.scheduled, f"{napi.name} is scheduled by nobody"
    queue.schedule(napi.tasklet)


def napi_schedule(queue: TaskletQueue, napi: Napi) -> bool:
    """Both halves, for a driver with nothing to do between them; whether it was not owned."""
    if not napi_schedule_prep(napi):
        return False
    __napi_schedule(queue, napi)
    return True


def napi_complete_done(actor: Actor, queue: TaskletQueue, napi: Napi, idle: WaitQueue) -> bool:
    """In a poll: give it up. False: an interrupt was missed, and it polls once more before that."""
    word = napi.word
    while True:
        seen = word.load()
        assert seen & SCHED, f"{napi.name} is completed by nobody"
        again = bool(seen & MISSED) and not seen & DISABLE
        # Who waits to own it stays announced for as long as it is owned.
        if word.cas(seen, seen & ~MISSED if again else seen & DISABLE) == seen:
            break
    if again:
        __napi_schedule(queue, napi)
        return False
    if seen & WAITED:
        idle.wake_all(actor)
    return True


def napi_poll(
    actor: Actor, queue: TaskletQueue, napi: Napi, poll: Callable[[int], int], idle: WaitQueue, weight: int = WEIGHT
) -> None:
    """The tasklet: one poll. It returns how much of its budget it used; less than all means that it has completed."""
    assert napi.scheduled, f"{napi.name} is polled by nobody"
    work = poll(weight)
    assert work <= weight, f"{napi.name} did {work} of {weight}"
    if work < weight:
        return
    if napi.word.load() & DISABLE:
        napi_complete_done(actor, queue, napi, idle)
        return
    queue.schedule(napi.tasklet)


def napi(lock: str = "atomic: its word") -> Part[Napi]:
    """A `Napi` as a field of a record."""
    return Part(Napi, Napi.SIZE, lock)
