"""The threads of the guest's user space, in the workqueue process: one takes letters, two run calls that may sleep.

The first blocks on its semaphore, runs at once what cannot sleep (so that a probe that hangs can be let go), and
hands the rest on, in the order in which it came. A call that sleeps ends with the machine as every wait does.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from emu.blocked import idle
from emu.control import slot_of
from emu.errors import MachineStopping, MissingPrerequisite
from emu.machine import USER_WAKEUP, Machine
from emu.orders import Order, OrderDesk, Recipient
from emu.tracing import Context as TraceContext
from guestproc.current import Current
from guestproc.user import CALLS, run_call
from guestproc.vcpu import WorkerThread

SHELLS: Final = 2
"""How many calls may sleep at once; further ones wait their turn."""
LOOK_NS: Final = 1_000_000_000

MakeCurrent = Callable[[WorkerThread], Current]
Report = Callable[..., None]
Orders = SimpleQueue[Order | None]


def start_user_space(machine: Machine, make_current: MakeCurrent, report: Report) -> list[threading.Thread]:
    """Start the threads; they end with the machine, a call that sleeps as every wait does."""
    orders: Orders = SimpleQueue()
    threads = []
    for number in range(SHELLS + 1):
        name = f"user/{number}" if number else "user"
        body = _run_calls if number else _take_letters
        thread = threading.Thread(
            target=_thread, args=(machine, name, number, make_current, report, body, orders), name=name, daemon=True
        )
        thread.start()
        threads.append(thread)
    return threads


def _thread(
    machine: Machine,
    name: str,
    number: int,
    make_current: MakeCurrent,
    report: Report,
    body: Callable[[Current, OrderDesk, Orders], None],
    orders: Orders,
) -> None:
    """One thread: its actor, its loop, its end; an exception ends the process, loudly."""
    try:
        hooks = WorkerThread(machine, name, USER_WAKEUP + number)
        if hooks.trace:
            hooks.trace.context = TraceContext.TASK
        try:
            body(make_current(hooks), OrderDesk(machine.control), orders)
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


def _take_letters(current: Current, desk: OrderDesk, orders: Orders) -> None:
    """Letters in, until the machine stops."""
    while not current.actor.stopping():
        letters = desk.take(Recipient.GUEST)
        for letter in letters:
            if letter.what in CALLS and CALLS[letter.what].sleeps:
                orders.put(letter)
            else:
                desk.answer(letter, run_call(current, letter.what, letter.arguments))
        if not letters:
            current.actor.block(current.actor.now() + LOOK_NS)
    for _ in range(SHELLS):
        orders.put(None)


def _run_calls(current: Current, desk: OrderDesk, orders: Orders) -> None:
    """Calls that may sleep, one after the other."""
    machine = current.machine
    next_call: Callable[[], Order | None] = orders.get
    if machine.races:
        next_call = idle(machine.control, slot_of(current.actor.number), orders.get)
    while (letter := next_call()) is not None:
        desk.answer(letter, run_call(current, letter.what, letter.arguments))
