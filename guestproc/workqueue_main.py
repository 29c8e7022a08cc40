"""The workqueue process: where the guest may sleep. A thread for each ordered queue, two for `system`.

Workers block, they do not poll. An exception in one ends the process, loudly. They carry CPU number 0, the
connect CPU, but are not that processor. The guest's user space has its threads here, too.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable

from emu import plugin
from emu.control import ActorKind
from emu.errors import MachineStopping, MissingPrerequisite
from emu.ipc.semaphores import Wakeup
from emu.limits import not_started
from emu.machine import Machine
from emu.memory import GuestMemory
from emu.tracing import E_WORK_DONE, E_WORK_RUN
from guestproc.current import Current
from guestproc.drivers.exhibits import add_exhibit_drivers
from guestproc.drivers.table import add_plugins
from guestproc.kernel.functions import WORK_FUNCTIONS
from guestproc.kernel.layout import KernelTables
from guestproc.kernel.wait_trace import record_waits
from guestproc.kernel.work_records import WorkItem
from guestproc.kernel.workqueue import WORKERS, QueueNumber
from guestproc.protocol.era import ERAS
from guestproc.user_threads import start_user_space
from guestproc.vcpu import WorkerThread
from guestproc.vmbus.message_dpc import look_at_slot_again
from guestproc.vmbus.ring_buffer import RingCache

Report = Callable[..., None]


def run(machine: Machine, report: Report) -> int:
    """Wait until RAM is laid out, then run every queue until the machine stops; the exit status.

    MissingPrerequisite when a thread cannot be started: the process has to end then, and with it those that were.
    """
    add_plugins(plugin.attach(machine.config))
    add_exhibit_drivers(machine)
    _row, counters = machine.enlist(ActorKind.WORKQUEUE, "workqueue")
    gate = machine.wakeup("actor.0")
    if not _wait_for_ram(machine, gate):
        return 0
    tables = KernelTables.attach(machine.ram.memory)
    if machine.control.recording:
        record_waits(tables.ram)
    threads = []
    semaphore = 1
    for queue in QueueNumber:
        for worker in range(WORKERS[queue]):
            name = f"kworker/{queue.name.lower()}" + (f"/{worker}" if WORKERS[queue] > 1 else "")
            thread = threading.Thread(
                target=_worker, args=(machine, tables, queue, worker, name, semaphore, report), name=name, daemon=True
            )
            threads.append(thread)
            semaphore += 1
    try:
        for thread in threads:
            thread.start()
        threads += start_user_space(machine, lambda hooks: _current(machine, tables, hooks, report), report)
    except RuntimeError as error:  # the system gives us no thread more
        raise not_started("a thread of the workqueue process", str(error)) from None
    for thread in threads:
        thread.join()
    counters.flush()
    return 0


def _wait_for_ram(machine: Machine, gate: Wakeup) -> bool:
    """Block until the boot CPU has laid RAM out; False when the machine stops before that."""
    while not machine.control.guest_formatted:
        if machine.stopping:
            return False
        gate.block(0.05)
    return True


def _worker(
    machine: Machine, tables: KernelTables, queue: QueueNumber, worker: int, name: str, semaphore: int, report: Report
) -> None:
    """One worker thread: take, run, finish, until the machine stops."""
    try:
        hooks = WorkerThread(machine, name, semaphore)
        current = _current(machine, tables, hooks, report)
        try:
            while (item := tables.work_queues.take(current.actor, queue, worker)) is not None:
                carry_out(current, queue, item, worker)
        finally:
            hooks.counters.flush()
            if hooks.trace:
                hooks.trace.stop(os.getpid(), name)
    except MachineStopping:
        return
    except MissingPrerequisite as lack:
        report("lacking", str(lack))
        os._exit(3)
    except BaseException:
        report("crashed", "workqueue", f"in {name}:\n{traceback.format_exc()}")
        os._exit(4)


def _current(machine: Machine, tables: KernelTables, hooks: WorkerThread, report: Report) -> Current:
    """A thread as the kernel code sees it."""
    memory = GuestMemory(machine.ram.fd, machine.ram.memory, machine.ram.size, there=machine.ram_reserved)
    era = ERAS[machine.config["machine"]["era"]]
    return Current(hooks, tables, era, RingCache(memory, lambda: hooks.trace), memory, report)


def carry_out(current: Current, queue: QueueNumber, item: WorkItem, worker: int) -> None:
    """Run one work, then give its record back, also to a message that found none."""
    _run(current, queue, item)
    current.tables.work_queues.finish(current.actor, item, worker)
    if current.connection.slot_waits.load():
        assert isinstance(current.hooks, WorkerThread)
        look_at_slot_again(current, current.hooks)


def _run(current: Current, queue: QueueNumber, item: WorkItem) -> None:
    current.counters.works += 1
    current.serial = item.serial
    current.record(E_WORK_RUN, queue, item.function, item.serial)
    # The record may be gone when its function returns.
    function, serial = item.function, item.serial
    WORK_FUNCTIONS.lookup(function)(current, item)
    current.record(E_WORK_DONE, queue, function, serial)
