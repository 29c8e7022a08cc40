"""The records of work queues in guest RAM: a piece of work, and a queue. What is done with them is in `workqueue`.

Apart from that module, as a compiled build cannot compile a record class: it makes its own fields.
"""

from __future__ import annotations

from typing import Final

from guestproc.kernel.locks import Rank, spinlock
from guestproc.kernel.records import Blob, Record, Word, Words64
from guestproc.kernel.wait import wait_queue

ARGUMENTS: Final = 4
MESSAGE_SIZE: Final = 256
MAX_WORKERS: Final = 4


class WorkItem(Record):
    """One piece of work: its allocator's until queued, the queue's until taken, then its worker's."""

    queue = Word(4, "handed on: a QueueNumber")
    function = Word(4, "handed on: number in WORK_FUNCTIONS")
    next = Word(4, "queue lock: index + 1 of the record behind")
    message_size = Word(4, "handed on: bytes of the message that were given")
    sequence = Word(8, "queue lock: its place among all that was ever queued there, from 1")
    serial = Word(8, "handed on: serial of the message that it came from (0: none)")
    queued_ns = Word(8, "queue lock: machine time of queueing")
    arguments = Words64(ARGUMENTS, "handed on")
    message = Blob(MESSAGE_SIZE, "handed on: the private copy of an hv_message")


class Queue(Record, permanent=True):
    """One work queue."""

    lock = spinlock(Rank.QUEUE)
    head = Word(4, "lock: index + 1 of the oldest")
    tail = Word(4, "lock: index + 1 of the newest")
    queued = Word(8, "lock: sequence of the newest that was ever queued")
    finished = Word(8, "lock: how many were finished")
    flush_target = Word(8, "lock: sequence that the earliest waiting flush waits for")
    running = Words64(MAX_WORKERS, "lock: sequence that each worker runs, 0: idle")
    worker_actors = Words64(MAX_WORKERS, "each worker's own: its number")
    workers = wait_queue()
    flushers = wait_queue()
