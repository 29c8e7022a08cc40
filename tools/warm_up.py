"""Exercise what inner processes will run, before the zygote freezes its heap.

CPython 3.11 rewrites a function's bytecode in place while it gets warm. What is warm before the fork is
shared; what gets warm after it costs every child a private copy of the page. Nothing here touches a machine.
"""

from __future__ import annotations

import mmap
from typing import Final

from emu.gpadl import MapBudget
from emu.ring import RingConsumer, RingMemory, RingProducer
from emu.wire.messages import GpadlCreated, MessageType, OpenChannelResult, gpadl_messages, parse
from guestproc.kernel.actors import Actor, Context
from guestproc.kernel.layout import Era, KernelTables
from guestproc.kernel.tasklet import TaskletQueue
from guestproc.protocol import pending
from guestproc.protocol.era import CURRENT
from guestproc.protocol.triage import triage

ROUNDS = 12
"""A function is specialised after eight calls."""

_LEAST_BLOCK: Final = 48
_LARGEST_BLOCK: Final = 512
_BLOCK_STEP: Final = 16
_BYTES_HEAD: Final = 33
"""What a `bytes` object has beside its bytes. Blocks above 512 bytes are malloc's."""
_POOL_BYTES: Final = 16 << 10
_POOL_HEAD: Final = 48
"""Where the first block of a pool begins."""
_MOST_HOLES: Final = 2_000


class _Hooks:
    """An actor that is alone in its machine: it never waits, and nobody is woken."""

    def block(self, deadline_ns: int) -> bool:
        return False

    def wake(self, actor: int) -> None:
        return None

    def yield_processor(self) -> None:
        return None

    def now(self) -> int:
        return 1

    def is_dead(self, actor: int) -> bool:
        return False

    def stopping(self) -> bool:
        return False

    def irq_save(self) -> int:
        return 0

    def irq_restore(self, flags: int) -> None:
        return None

    def irqs_disabled(self) -> bool:
        return False

    def context(self) -> Context:
        return Context.TASK

    def kick_cpu(self, cpu: int) -> None:
        return None

    def send_ipi(self, cpu: int) -> None:
        return None


def warm_up() -> None:
    """Tables, locks, completions, messages and rings, a dozen times each (about 10 ms)."""
    MapBudget.of_system()
    for _ in range(ROUNDS):
        _messages()
        _rings()
    tables = KernelTables.format(mmap.mmap(-1, 64 << 20), 2, Era.CURRENT, [0, 1])
    actor = Actor(1 << 12, _Hooks(), tables.waiters, is_vcpu=True)
    tasklets = TaskletQueue(actor, tables.connection.tasklet_idle)
    for _ in range(ROUNDS):
        _kernel(tables, actor, tasklets)


def fill_holes() -> list[bytes]:
    """Use up the blocks that are free between other objects, just before a fork; they are free again with the list.

    A child's new objects would go there, and each would un-share a page for itself; now they lie together, on pages
    that nobody had. Of each size so many blocks are taken that the next one begins a pool (16 KiB that CPython cuts
    into blocks of one size): a child would also write to the head of a pool that is in use.
    """
    fillers = []
    for size in range(_LEAST_BLOCK, _LARGEST_BLOCK + 1, _BLOCK_STEP):
        # Bounded: another allocator than CPython's has no pools.
        for _ in range(_MOST_HOLES):
            block = bytes(size - _BYTES_HEAD)
            if id(block) % _POOL_BYTES == _POOL_HEAD:
                behind = bytes(size - _BYTES_HEAD)
                if id(behind) == id(block) + size:  # a new pool's blocks come in order; both are given back to it
                    break
                fillers.append(behind)
            fillers.append(block)
    return fillers


def _messages() -> None:
    for message in gpadl_messages(1, 0xE1E10, range(32)):
        parse(message.pack())
    for reply in (GpadlCreated(1, 0xE1E10, 0), OpenChannelResult(1, 1, 0)):
        triage(CURRENT, (1).to_bytes(4, "little") + bytes([20]) + bytes(11) + reply.pack().ljust(240, b"\0"))
        parse(reply.pack())


def _rings() -> None:
    memory = RingMemory.on(bytearray(3 * 4096))
    producer, consumer = RingProducer(memory, sole=False), RingConsumer(memory, sole=False)
    producer.write(b"warm")
    producer.write_many([b"up"] * 4, 1)
    consumer.begin_read()
    list(consumer.drain())
    for payloads in ([b"alike"] * 32, [b"all", b"kinds"] * 16):
        producer.write_many(payloads)
        consumer.read_many()
        producer.write_many(payloads, 1)
        consumer.read_runs()
    consumer.end_read()


def _kernel(tables: KernelTables, actor: Actor, tasklets: TaskletQueue) -> None:
    connection = tables.connection
    request = pending.new_request(tables, MessageType.GPADL_HEADER, child_relid=1, gpadl=1)
    assert request is not None
    with connection.channelmsg_lock.hold(actor):
        pending.enter(tables, request)
    request.waitevent.complete(actor)
    request.waitevent.wait(actor)
    with connection.channelmsg_lock.hold(actor):
        pending.leave(tables, request)
    tables.requests.free(request)
    with connection.channel_mutex.hold(actor):
        tables.relids.lookup(1)
    tables.pages.free(actor, tables.pages.alloc_pages_exact(actor, 4, 1))
    tasklets.runnable()
    tasklets.run()
