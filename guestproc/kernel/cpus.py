"""`cpus_read_lock` and `cpus_write_lock`: no processor comes or goes while somebody reads.

    a reader    counts itself in, under cpus_mutex, which it gives back at once
    a writer    keeps cpus_mutex, once there is no reader

Readers do not exclude each other: one that moves a channel waits for the host, and an offer must go on meanwhile,
since rescinds wait for offers, and may be what ends that wait. For the same reason a writer that waits holds up no
new reader (the kernel's does); it gives up when its time is over.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final

from emu.errors import DeadlinePassed
from guestproc.kernel.actors import Actor
from guestproc.kernel.layout import Connection
from guestproc.kernel.locks import Rank, Ranked
from guestproc.kernel.wait import SECOND_NS

WRITER_TIMEOUT_NS: Final = 60 * SECOND_NS


class CpusReadLock(Ranked):
    """`with cpus_read_lock(connection, actor):`; the processors stay as they are for the block."""

    __slots__ = ("_actor", "_connection")

    def __init__(self, connection: Connection, actor: Actor) -> None:
        super().__init__("cpu_hotplug_lock", Rank.CPUS)
        self._connection: Final = connection
        self._actor: Final = actor

    def __enter__(self) -> None:
        actor = self._actor
        with self._connection.cpus_mutex.hold(actor):
            self._connection.cpus_readers.fetch_add(1)
        # So that ranks are looked at inside as well.
        actor.held.append((self, 0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._actor.held.remove((self, 0))
        if self._connection.cpus_readers.fetch_sub(1) == 1:
            self._connection.cpus_wait.wake_all(self._actor)


class CpusWriteLock:
    """`with cpus_write_lock(connection, actor):`; this one alone may bring processors up and down."""

    __slots__ = ("_actor", "_connection")

    def __init__(self, connection: Connection, actor: Actor) -> None:
        self._connection: Final = connection
        self._actor: Final = actor

    def __enter__(self) -> None:
        connection, actor = self._connection, self._actor
        deadline_ns = actor.now() + WRITER_TIMEOUT_NS
        while True:
            connection.cpus_mutex.acquire(actor)
            if not connection.cpus_readers.load():
                return
            connection.cpus_mutex.release(actor)
            if not connection.cpus_wait.wait_until_timeout(
                actor, lambda: not connection.cpus_readers.load(), max(0, deadline_ns - actor.now())
            ):
                raise DeadlinePassed("the readers of cpu_hotplug_lock to end", WRITER_TIMEOUT_NS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.cpus_mutex.release(self._actor)


def cpus_read_lock(connection: Connection, actor: Actor) -> CpusReadLock:
    """For who chooses a processor, until everybody can see what he chose it for."""
    return CpusReadLock(connection, actor)


def cpus_write_lock(connection: Connection, actor: Actor) -> CpusWriteLock:
    """For who brings a processor up or down."""
    return CpusWriteLock(connection, actor)
