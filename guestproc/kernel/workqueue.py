"""Work queues: records that any actor may queue and one worker takes, in order, where it may sleep.

Work is a record of a bounded pool, because interrupt code in one process queues what a worker thread of
another runs: a function's number, four argument words, a copy of a message, and the message's serial. An
ordered queue has one worker, so its work runs strictly in the order of queueing; `system` has two.

    queue_work: link the record, give the lock back; then, if a worker announced that it sleeps, wake it
    worker:     look; announce; look again; sleep
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from emu.errors import MachineStopping
from guestproc.kernel.actors import Actor
from guestproc.kernel.records import Fields, Table, position_of
from guestproc.kernel.wait import DEFAULT_TIMEOUT_NS, SECOND_NS, assert_may_wait
from guestproc.kernel.work_records import Queue, WorkItem

RESERVED: Final = 16
"""Records of the pool that are kept for messages which would otherwise stay in their slots."""
IDLE_LOOK_NS: Final = 30 * SECOND_NS
"""Every wait has a deadline: an idle worker looks again this often."""


class QueueNumber(IntEnum):
    """The queues, by the kernel's names for their users."""

    WORK = 0  # hv_vmbus_con: offers and the other blocking messages
    RESCIND = 1  # hv_vmbus_rescind
    PRI_CHAN = 2  # hv_pri_chan: add_channel_work of primaries
    SUB_CHAN = 3  # hv_sub_chan: of sub-channels
    SYSTEM = 4  # schedule_work


WORKERS: Final = {
    QueueNumber.WORK: 1,
    QueueNumber.RESCIND: 1,
    QueueNumber.PRI_CHAN: 1,
    QueueNumber.SUB_CHAN: 1,
    QueueNumber.SYSTEM: 2,
}
"""Worker threads of each queue; 1 is what makes a queue ordered."""


# Queues are there as long as the machine: their plain words are read and written without a look at a generation.
_HEAD: Final = position_of(Queue, "head")
_TAIL: Final = position_of(Queue, "tail")
_QUEUED: Final = position_of(Queue, "queued")
_FINISHED: Final = position_of(Queue, "finished")
_NEXT: Final = position_of(WorkItem, "next")
_SEQUENCE: Final = position_of(WorkItem, "sequence")
_QUEUED_NS: Final = position_of(WorkItem, "queued_ns")
_ALLOCATED: Final = Fields(WorkItem, "queue", "function", "next", "message_size", "sequence", "serial")


class WorkQueues:
    """All queues and the pool of work records."""

    def __init__(self, queues: Table[Queue], items: Table[WorkItem]) -> None:
        self._queues: Final = queues
        self._items: Final = items
        self._unreserved: Final = items.capacity - min(RESERVED, items.capacity >> 6)

    def allocate(
        self,
        function: int,
        arguments: Sequence[int] = (),
        message: bytes = b"",
        serial: int = 0,
        *,
        reserved: bool = False,
    ) -> WorkItem | None:
        """A work record, not queued yet; None when the pool is used up (counted by its table).

        The last of them are for who asks for `reserved` ones: where nobody would try again later.
        """
        if not reserved and self._items.in_use >= self._unreserved:
            return None
        item = self._items.alloc()
        if item is None:
            return None
        _ALLOCATED.write(item, 0, function, 0, len(message), 0, serial)
        if arguments:
            words = item.arguments
            for position, value in enumerate(arguments):
                words[position] = value
        if message:
            item.message = message
        return item

    def discard(self, item: WorkItem) -> None:
        """Give back a record that was allocated and not queued."""
        self._items.free(item)

    def queue_work(self, actor: Actor, number: int, item: WorkItem) -> None:
        """Put it behind all that is on the queue; in any context, also with other spinlocks held."""
        queue = self._queues.at(number)
        item.queue = number
        position = item.index + 1
        now = actor.now()
        words, quads, quads_of_item, lock = queue.words, queue.quads, item.quads, queue.lock
        lock.acquire(actor)
        sequence = quads[_QUEUED] + 1
        quads[_QUEUED] = sequence
        quads_of_item[_SEQUENCE] = sequence
        quads_of_item[_QUEUED_NS] = now
        tail = words[_TAIL]
        if tail:
            self._items.at(tail - 1).words[_NEXT] = position
        else:
            words[_HEAD] = position
        words[_TAIL] = position
        lock.release(actor)
        # Behind the lock: a worker that looked before the record was linked has announced itself by now, or
        # will look again after it has.
        queue.workers.wake_all(actor)

    def take(self, actor: Actor, number: int, worker: int = 0) -> WorkItem | None:
        """The oldest work, for its `worker`-th worker; sleeps until there is some. None: the machine stops.

        `finish` must follow.
        """
        queue = self._queues.at(number)
        queue.worker_actors[worker] = actor.number
        if (item := self._pop(actor, queue, worker)) is not None:
            return item
        taken: list[WorkItem] = []

        def look() -> bool:
            item = self._pop(actor, queue, worker)
            if item is None:
                return False
            taken.append(item)
            return True

        while not taken:
            try:
                queue.workers.wait_until_timeout(actor, look, IDLE_LOOK_NS)
            except MachineStopping:
                return None
        return taken[0]

    def try_take(self, actor: Actor, number: int, worker: int = 0) -> WorkItem | None:
        """The oldest work if there is some now."""
        return self._pop(actor, self._queues.at(number), worker)

    def finish(self, actor: Actor, item: WorkItem, worker: int = 0) -> None:
        """Its function has returned: free the record, and wake who waits for the queue."""
        queue = self._queues.at(item.queue)
        running, lock = queue.running, queue.lock
        lock.acquire(actor)
        assert running[worker] == item.sequence, f"{item} is not what worker {worker} of {queue} runs"
        running[worker] = 0
        finished = queue.quads[_FINISHED] + 1
        queue.quads[_FINISHED] = finished
        lock.release(actor)
        self._items.free(item)
        # Only when the queue ran dry, or what the last flush waits for is done: a wake costs an interrupt.
        # (As many as it waits for must have finished at least: that spares nearly every look at all of them.)
        flushers = queue.flushers
        if flushers.announced() and finished >= queue.flush_target < self._oldest_unfinished(actor, queue):
            queue.flushers.wake_all(actor)

    def flush(self, actor: Actor, number: int, timeout_ns: int = DEFAULT_TIMEOUT_NS) -> None:
        """`flush_workqueue`: wait until all that is queued now has finished; raises DeadlinePassed."""
        queue = self._queues.at(number)
        assert_may_wait(actor, f"queue {number}")
        assert actor.number not in queue.worker_actors, f"{actor} flushes the queue that it works for"
        with queue.lock.hold(actor):
            last = queue.queued
            # The earliest target of all flushes under way; a later one looks again when it is woken.
            if not queue.flushers.announced() or last < queue.flush_target:
                queue.flush_target = last
        name = f"flush of {QueueNumber(number).name}"
        queue.flushers.wait_until(actor, lambda: self._oldest_unfinished(actor, queue) > last, timeout_ns, name)

    def worker_actors(self) -> set[int]:
        """Numbers of the actors that ever asked for work, as its queues' workers."""
        return {number for queue in self._queues.live() for number in queue.worker_actors if number}

    def length(self, number: int) -> int:
        """How many wait on the queue or run (a hint)."""
        queue = self._queues.at(number)
        return queue.queued - queue.finished

    def _pop(self, actor: Actor, queue: Queue, worker: int) -> WorkItem | None:
        """Take the oldest and write down that it runs, in one: a flush must not miss it in between."""
        words = queue.words
        if not words[_HEAD]:
            return None
        running, lock = queue.running, queue.lock
        lock.acquire(actor)
        head = words[_HEAD]
        if not head:
            lock.release(actor)
            return None
        item = self._items.at(head - 1)
        following = item.words[_NEXT]
        words[_HEAD] = following
        if not following:
            words[_TAIL] = 0
        assert not running[worker], f"worker {worker} of {queue} takes work while it runs some"
        running[worker] = item.quads[_SEQUENCE]
        lock.release(actor)
        return item

    def _oldest_unfinished(self, actor: Actor, queue: Queue) -> int:
        """Sequence of the oldest that waits or runs; one more than the newest if there is none."""
        with queue.lock.hold(actor):
            oldest = [sequence for sequence in queue.running if sequence]
            if queue.head:
                oldest.append(self._items.at(queue.head - 1).sequence)
            else:
                oldest.append(queue.queued + 1)
        return min(oldest)
