"""Work queues: in order, exactly once, and a worker that sleeps is always woken."""

from __future__ import annotations

import pytest

from emu.errors import DeadlinePassed
from guestproc.kernel.actors import Actor
from guestproc.kernel.records import Ram, Table
from guestproc.kernel.work_records import MESSAGE_SIZE, Queue, WorkItem
from guestproc.kernel.workqueue import QueueNumber, WorkQueues
from tests.guestproc.kernel.fakes import FREE_GPA, SECOND_NS, Crowd, Lone

QUEUES_GPA = FREE_GPA
ITEMS_GPA = FREE_GPA + 0x1000
LOG_GPA = FREE_GPA + 0x80000
WORK = QueueNumber.WORK
SYSTEM = QueueNumber.SYSTEM


def open_queues(ram: Ram, items: int = 16) -> WorkQueues:
    """The queues of `ram` as one process sees them."""
    queues = Table(ram, "queues", Queue, QUEUES_GPA, 8)
    while queues.in_use < len(QueueNumber):
        assert queues.alloc() is not None
    return WorkQueues(queues, Table(ram, "work", WorkItem, ITEMS_GPA, items))


class World:
    """Queues with 16 work records, and one worker."""

    def __init__(self) -> None:
        self.lone = Lone()
        self.actor = self.lone.actor
        self.isr = self.lone.new_actor(2, is_vcpu=True)
        self.queues = open_queues(self.lone.ram)
        self.table = Table(self.lone.ram, "queues", Queue, QUEUES_GPA, 8)

    def new(self, function: int = 1, *arguments: int) -> WorkItem:
        item = self.queues.allocate(function, arguments)
        assert item is not None
        return item

    def queue(self, number: int, *functions: int) -> None:
        for function in functions:
            self.queues.queue_work(self.isr, number, self.new(function))

    def run_one(self, number: int = WORK, worker: int = 0) -> int:
        item = self.queues.try_take(self.actor, number, worker)
        assert item is not None
        function = item.function
        self.queues.finish(self.actor, item, worker)
        return function


def test_work_comes_out_in_the_order_of_queueing() -> None:
    """Each queue has an order of its own."""
    world = World()
    world.queue(WORK, 1, 2)
    world.queue(QueueNumber.RESCIND, 9)
    world.queue(WORK, 3)

    assert [world.run_one() for _ in range(3)] == [1, 2, 3]
    assert world.run_one(QueueNumber.RESCIND) == 9
    assert world.queues.try_take(world.actor, WORK) is None


def test_worker_that_waited_for_the_queue_of_another_who_took_all_leaves_it_free() -> None:
    """It saw work, and there is none when the lock is its own: it takes nothing, and the lock is free again."""
    world = World()
    taken: list[WorkItem | None] = []
    world.queue(WORK, 1)
    queue, other = world.table.at(WORK), world.lone.new_actor(3)

    def take_it() -> None:
        if not taken:
            queue.lock.release(world.isr)
            taken.append(world.queues.try_take(other, WORK, 1))

    queue.lock.acquire(world.isr)
    world.lone.hooks.on_yield = take_it

    assert world.queues.try_take(world.actor, WORK) is None
    assert taken[0] is not None and queue.lock.owner == 0


def test_a_work_record_carries_what_it_was_given() -> None:
    """Function, arguments, the whole message, its serial."""
    world = World()
    message = bytes(range(256))
    item = world.queues.allocate(7, (1, 1 << 63), message, serial=55)
    assert item is not None
    world.queues.queue_work(world.isr, WORK, item)

    taken = world.queues.take(world.actor, WORK)

    assert taken is not None
    assert (taken.function, taken.arguments.tolist(), taken.serial) == (7, [1, 1 << 63, 0, 0], 55)
    assert (taken.message, taken.message_size, taken.queue) == (message, MESSAGE_SIZE, WORK)


def test_the_pool_is_bounded() -> None:
    """The allocation that finds no record gives None, as kmalloc(GFP_ATOMIC) does."""
    world = World()
    items = [world.new() for _ in range(16)]

    assert world.queues.allocate(1) is None
    world.queues.discard(items[3])
    assert world.queues.allocate(1) is not None


def test_queueing_wakes_a_worker_only_if_it_announced_that_it_sleeps() -> None:
    """With the worker busy there is nobody to post."""
    world = World()
    world.queue(WORK, 1)
    assert world.lone.hooks.woken == []

    world.run_one()
    world.lone.hooks.meanwhile.append(lambda: world.queue(WORK, 2))
    item = world.queues.take(world.actor, WORK)

    assert item is not None and item.function == 2
    assert world.lone.hooks.woken == [world.actor.number]


def test_work_queued_between_look_and_sleep_is_found() -> None:
    """The worker looks again after it announced itself, so it does not sleep at all."""
    world = World()
    alloc = world.lone.waiters.alloc

    def alloc_and_queue() -> object:
        waiter = alloc()
        world.queue(WORK, 5)
        return waiter

    world.lone.waiters.alloc = alloc_and_queue  # type: ignore[method-assign, assignment]
    item = world.queues.take(world.actor, WORK)

    assert item is not None and item.function == 5
    assert world.lone.hooks.woken == []
    assert world.lone.waiters.in_use == 0


def test_an_idle_worker_leaves_when_the_machine_stops() -> None:
    """`take` gives None then, and only then."""
    world = World()
    world.lone.hooks.meanwhile.append(lambda: setattr(world.lone.hooks, "stop", True))

    assert world.queues.take(world.actor, WORK) is None
    assert world.lone.waiters.in_use == 0


def test_a_worker_finishes_before_it_takes_more() -> None:
    """What makes a queue ordered is that its one worker runs one piece at a time."""
    world = World()
    world.queue(WORK, 1, 2)
    first = world.queues.try_take(world.actor, WORK)
    assert first is not None

    with pytest.raises(AssertionError, match="takes work while it runs some"):
        world.queues.try_take(world.actor, WORK)


def test_the_system_queue_runs_two_at_once() -> None:
    """Its second worker takes the next while the first still runs."""
    world = World()
    world.queue(SYSTEM, 1, 2)
    first = world.queues.try_take(world.actor, SYSTEM, 0)
    second = world.queues.try_take(world.isr, SYSTEM, 1)

    assert first is not None and second is not None
    assert world.queues.length(SYSTEM) == 2
    world.queues.finish(world.isr, second, 1)
    world.queues.finish(world.actor, first, 0)
    assert world.queues.length(SYSTEM) == 0


def test_flushing_an_idle_queue_does_not_sleep() -> None:
    """Nothing queued, nothing to wait for."""
    world = World()

    world.queues.flush(world.actor, WORK, 1)
    world.queue(WORK, 1)
    world.run_one()
    world.queues.flush(world.actor, WORK, 1)


def test_flush_waits_for_what_was_queued_before_and_for_no_more() -> None:
    """Work that is queued during the flush does not hold it up."""
    world = World()
    world.queue(WORK, 1, 2)
    worker = world.lone.new_actor(3)

    def one_more_round() -> None:
        world.queue(WORK, 3)
        item = world.queues.try_take(worker, WORK)
        assert item is not None
        world.queues.finish(worker, item)

    world.lone.hooks.meanwhile.extend([one_more_round, one_more_round])
    world.queues.flush(world.actor, WORK)

    assert world.queues.length(WORK) == 2
    assert world.run_one() == 3


def test_flush_waits_for_the_older_of_two_that_run() -> None:
    """On the system queue the newer may finish first: the flush still waits for the older."""
    world = World()
    world.queue(SYSTEM, 1, 2)
    first = world.queues.try_take(world.actor, SYSTEM, 0)
    second = world.queues.try_take(world.isr, SYSTEM, 1)
    assert first is not None and second is not None
    world.queues.finish(world.isr, second, 1)

    flusher = world.lone.new_actor(3)
    with pytest.raises(DeadlinePassed, match="flush of SYSTEM"):
        world.queues.flush(flusher, SYSTEM, SECOND_NS)
    world.queues.finish(world.actor, first, 0)
    world.queues.flush(flusher, SYSTEM, SECOND_NS)


def test_a_worker_that_flushes_its_own_queue_is_noticed() -> None:
    """It would wait for itself."""
    world = World()
    world.queue(WORK, 1)
    assert world.queues.take(world.actor, WORK) is not None

    with pytest.raises(AssertionError, match="flushes the queue that it works for"):
        world.queues.flush(world.actor, WORK)


def run_in_order(rounds: int) -> None:
    """Two processes queue numbered work, a third runs it and writes down what it ran."""
    crowd = Crowd(3)
    open_queues(crowd.ram)
    log = crowd.ram.words64(LOG_GPA, 2 * rounds)

    def producer(actor: Actor) -> None:
        queues = open_queues(crowd.ram)
        for number in range(rounds):
            while (item := queues.allocate(actor.cpu + 1, (number,))) is None:
                actor.yield_processor()
            queues.queue_work(actor, WORK, item)
        queues.flush(actor, WORK, 30 * SECOND_NS)
        mine = [word >> 32 for word in log.tolist() if word & 0xFF == actor.cpu + 1]
        assert mine == list(range(rounds)), "after the flush all of it has run, in order"

    def worker(actor: Actor) -> None:
        queues = open_queues(crowd.ram)
        for position in range(2 * rounds):
            item = queues.take(actor, WORK)
            assert item is not None
            log[position] = item.arguments[0] << 32 | item.function
            queues.finish(actor, item)

    crowd.run(producer, producer, worker)
    table = Table(crowd.ram, "work", WorkItem, ITEMS_GPA, 16)
    assert (table.in_use, crowd.waiters.in_use, table.damage()) == (0, 0, [])


def test_work_of_two_processes_runs_once_and_in_their_order() -> None:
    """Nothing is lost, repeated or overtaken, and no worker sleeps on a full queue."""
    run_in_order(500)


@pytest.mark.soak
def test_work_of_two_processes_runs_once_and_in_their_order_for_long() -> None:
    """The same, long enough for the rare orders."""
    run_in_order(30_000)
