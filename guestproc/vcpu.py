"""One virtual processor: takes interrupts, runs tasklets on their way out, and guest tasks in between.

One thread. Interrupts are taken at safe points (every call into the guest kernel is one), by the kick signal
between two bytecodes of a computing task, and when the processor halts. The truth is the request bit: every
change to a state in which the VP looks less often stores the new state first and looks for a bit then.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Sized
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn, Protocol

from emu.aside import Aside, Cores, leave_core
from emu.blocked import told
from emu.control import ActorKind, ActorState
from emu.counters import Counters
from emu.errors import MachineStopping
from emu.interrupt_trace import halt_of, requester_of
from emu.interrupts import (
    AWAKE,
    COMPUTING,
    IN_ISR,
    INTERRUPTS_OFF,
    OFFLINE,
    Halt,
    InterruptRequester,
    Lapic,
    PollPolicy,
)
from emu.layout import VP_RUN_STATE, MachineState, vp_page_offset
from emu.machine import KICK_SIGNAL, Machine, VpKick
from emu.switches import Fix
from emu.syncpoint import NOT_ARMED, Armed, Point, unreachable
from emu.tracing import E_ISR_ENTER, E_ISR_EXIT, E_VMEXIT, Bound, Recorder
from emu.tracing import Context as TraceContext
from emu.vmexit import ExitClient, HostBell
from guestproc.halt_points import pointed_halt_of
from guestproc.kernel.actors import ActorHooks, Context

CALL_FUNCTION_VECTOR: Final = 0xFB
RESCHEDULE_VECTOR: Final = 0xFD

STOPPING: Final = int(MachineState.STOPPING)
HOST: Final = ActorKind.HYPERVISOR
_TURN: Final = int(Point.TURN)
LONG_WATCHDOG_S: Final = 10.0
"""Who posts wakes; this is only for a poster that was killed, and then the launcher stops the machine anyway."""
LOOK_AGAIN_S: Final = 2.0
"""How long a token that was lost costs a processor. A wake-up for nothing costs 0.1 ms of cold caches."""

_IN_ISR_CONTEXT: Final = int(TraceContext.ISR)
_TASKLET_CONTEXT: Final = int(TraceContext.TASKLET)
PATIENT_TIMEOUT_NS: Final = 3_600_000_000_000
"""Where a process is started by hand, or stands in a debugger."""

HELD_NS: Final = 1_000_000_000
"""A turn of waiting at a sync point, whose end the director's interrupt tells."""

Report = Callable[..., None]


def aside_of(machine: Machine) -> Callable[[], None]:
    """What the calling thread is to call where the host seems to be in its way."""

    def host_pid() -> int:
        rows = machine.control.rows()
        return next((row.pid for row in rows if row.state == ActorState.ALIVE and row.kind == HOST), 0)

    return Aside(Cores(host_pid), leave_core).in_the_way


def exit_client(
    machine: Machine,
    position: int,
    claimer: int,
    stopping: Callable[[], bool],
    aside: Callable[[], object] | None = None,
) -> ExitClient:
    """VM exits of the actor `claimer` on a VP page, under the machine's deadline; `aside` as `ExitClient` has it.

    Where a process is started by hand the host may be the one that is still to come, or stand in a debugger.
    """
    config = machine.config
    deadline_ns = int(config["machine"]["exit_deadline_s"] * 1e9)
    return ExitClient(
        machine.vps.view,
        machine.vps_memory,
        machine.doorbells.view,
        position,
        HostBell(machine.doorbells.view, machine.wakeup("host")),
        machine.exit_wakeups(position),
        claimer=claimer,
        stopping=stopping,
        deadline_ns=PATIENT_TIMEOUT_NS if config.get("by_hand") else deadline_ns,
        aside=aside,
    )


class Peers:
    """Other processors and threads as one actor reaches them: interrupts to VPs, tokens to workers."""

    def __init__(self, machine: Machine, counters: Any, trace: Recorder | None = None) -> None:
        self._machine = machine
        self._trace = trace
        self._counters = counters
        self._positions: list[int] = machine.config["cpu_positions"]
        self._requesters: dict[int, InterruptRequester] = {}
        self._wakes: dict[int, Callable[[], None]] = {}

    def request(self, cpu: int, vector: int) -> None:
        """Request an interrupt of another guest CPU."""
        requester = self._requesters.get(cpu)
        if requester is None:
            requester = self.reach(cpu)
        requester.request(vector)

    def reach(self, cpu: int) -> InterruptRequester:
        """What requests interrupts of another guest CPU, and its semaphore, before the first one or at it."""
        position = self._positions[cpu]
        kick = VpKick(self._machine, position, cpu)
        requester = requester_of(self._trace, self._machine.vps.view, position, kick, self._counters)
        self._machine.wakeup(f"vp.{position}")
        self._requesters[cpu] = requester
        return requester

    def wake(self, actor: int) -> None:
        """Wake an actor from its block: a worker by its semaphore, a processor by the reschedule interrupt."""
        wake = self._wakes.get(actor)
        if wake is None:
            wake = self._wakes[actor] = self._resolve(actor)
        wake()

    def _resolve(self, actor: int) -> Callable[[], None]:
        row = self._machine.control.row(actor & 0xFFF)
        if row.kind in (ActorKind.VCPU, ActorKind.TASK):
            return lambda: self.request(row.cpu, RESCHEDULE_VECTOR)
        return self._machine.wakeup(f"actor.{row.cpu}").post


class Vcpu:
    """The processor of guest CPU `cpu`; also the `ActorHooks` of its thread."""

    is_vcpu: Final = True

    def __init__(self, machine: Machine, cpu: int, report: Report) -> None:
        self.machine = machine
        self.cpu = cpu
        self.position: int = machine.config["cpu_positions"][cpu]
        self.row = machine.control.claim(ActorKind.VCPU, f"vcpu{cpu}", cpu=cpu)
        self.counters = machine.control.counters(self.row.slot)
        vps = machine.vps.view
        self.vp_index = machine.vp_index(self.position)
        self.trace = machine.recorder(self.row, vp=self.vp_index, context=TraceContext.TASK)
        self._bound: dict[int, tuple[Bound, Bound]] = {}
        """By vector: the records around its handler."""
        self.lapic = Lapic(vps, self.position)
        self.vectors: dict[int, Callable[[], None]] = {
            RESCHEDULE_VECTOR: self._reschedule,
        }
        self.softirqs: Callable[[], object] = _no_softirqs
        self.softirq_pending: Callable[[], bool] = _never
        self.tasklets: Sized = ()
        """Those that are pending here, whether they may run or not: nearly always none."""
        self.rescheduled: Callable[[], object] = _no_softirqs
        """Run in each reschedule interrupt (`scheduler_ipi`)."""
        self.expecting: Callable[[], bool] = _never
        """Whether an answer of the host's is due on this processor: then polling for it pays."""
        self.peers = Peers(machine, self.counters, self.trace)
        state = vps.cell_u32(vp_page_offset(self.position) + VP_RUN_STATE)
        self._set_state = state.store
        self._report = report
        self._irqs_off = False
        self._hardirq = 0
        self._softirq = False
        self._computing = False
        self._stopping = machine.control.state_word.load
        self._wakeup = machine.wakeup(f"vp.{self.position}")
        self.armed: Armed = NOT_ARMED
        self.reach: Callable[..., None] = unreachable
        """This processor's sync points, once its kernel thread has any."""
        halt: Callable[..., Halt] = partial(halt_of, self.trace)
        if machine.races and self.trace:
            halt = partial(pointed_halt_of, self, Fix.of(machine.config), self.trace)
        self._halt = halt(
            vps,
            vp_page_offset(self.position) + VP_RUN_STATE,
            self._wakeup,
            self._look,
            PollPolicy(machine.config["machine"]["poll"], lambda: self.expecting()),
            self.counters,
            glance=self.lapic.glance,
            # Nothing runs for a look that finds nothing. Where a race is shown nobody mends it by chance.
            look_again_s=LONG_WATCHDOG_S if machine.races else LOOK_AGAIN_S,
            longest_s=LONG_WATCHDOG_S,
            aside=aside_of(machine),
        )
        self.now = machine.clock.now
        self.exits = exit_client(machine, self.position, self.row.number, self.stopping)

    def begin(self) -> None:
        """The calling process is this processor from now on, whoever has made it."""
        self.row = self.machine.control.arrive(self.row, os.getpid())
        if self.trace:
            self.trace.start(self.row.pid, self.row.kind, self.row.cpu, self.row.name)
        signal.signal(KICK_SIGNAL, self._on_kick)

    # -- interrupts ---------------------------------------------------------------------------------

    def take_interrupts(self) -> None:
        """Dispatch everything deliverable; returns with interrupts on (or as they were, inside an ISR)."""
        try:
            while vector := self.lapic.take():
                self._dispatch(vector)
        except MachineStopping:
            raise  # every wait ends so, an exit in an ISR as well
        except BaseException:
            self._die_of_isr()

    def _dispatch(self, vector: int) -> None:
        """Run the handler of one vector; a vector without one is counted and ended."""
        counters = self.counters
        counters.interrupts += 1
        trace = self.trace
        if trace:
            before, trace.context = trace.context, _IN_ISR_CONTEXT
            enter, leave = self._bound.get(vector) or self._bind(trace, vector)
            enter()
        handler = self.vectors.get(vector)
        if handler is None:
            counters.spurious += 1
            self.lapic.eoi()
        else:
            handler()
        if trace:
            leave()
            trace.context = before

    def _bind(self, trace: Recorder, vector: int) -> tuple[Bound, Bound]:
        bound = self._bound[vector] = trace.bind(E_ISR_ENTER, vector), trace.bind(E_ISR_EXIT, vector)
        return bound

    def entering_irq(self) -> None:
        """Enter hard-interrupt context: interrupts are off until `exiting_irq`."""
        self._hardirq += 1
        self._set_state(IN_ISR)

    def exiting_irq(self) -> None:
        """Leave it; from the outermost one pending tasklets run, with interrupts on again."""
        self._hardirq -= 1
        if self._hardirq:
            return
        # The state before the look (lost-wakeup rule); the caller's loop in `take_interrupts` looks.
        self._set_state(AWAKE)
        # Whether one of them may run is seen by who runs it: those that are pending nearly always may.
        if self.tasklets and not self._softirq:
            self.run_softirqs()

    def run_softirqs(self) -> None:
        """Run scheduled tasklets with interrupts on; a nested ISR only schedules."""
        self._softirq = True
        trace = self.trace
        if trace:
            before, trace.context = trace.context, _TASKLET_CONTEXT
        left: object = False
        try:
            left = self.softirqs()
        except MachineStopping:
            raise
        except BaseException:
            self._die_of_isr()
        finally:
            self._softirq = False
            if trace:
                trace.context = before
        if left:
            # What comes back again and again goes on, but not before whoever else wants this core (`ksoftirqd`): a poll
            # that waits for room in a ring would starve the host that makes it.
            self.yield_processor()

    def _reschedule(self) -> None:
        """The reschedule interrupt has done its work by arriving, but for what others left to this processor."""
        self.counters.reschedules += 1
        self.rescheduled()
        self.lapic.eoi()

    def _on_kick(self, _number: int, _frame: FrameType | None) -> None:
        """The kick signal: an interrupt between two bytecodes of a computing task."""
        if not self._computing:
            return  # whoever runs now looks by itself
        self._computing = False
        self.counters.preemptions += 1
        try:
            while True:
                self._set_state(IN_ISR)
                self.take_interrupts()
                if self.softirq_pending():
                    self.run_softirqs()
                # Announce, then look: a requester that saw IN_ISR sent no signal.
                self._computing = True
                self._set_state(COMPUTING)
                if not (self.lapic.deliverable() or self.softirq_pending()):
                    return
                self._computing = False
                raise_if_stopping(self)
        except MachineStopping:
            self._leave_computing()
        except BaseException:
            self._die_of_isr()

    def _leave_computing(self) -> NoReturn:
        """The machine stops while a task computes: the process ends here, as nothing may unwind into the task."""
        self.counters.flush()
        os._exit(0)

    def _die_of_isr(self) -> NoReturn:
        """An exception out of an ISR ends the process; it never unwinds into the task it interrupted."""
        self._report("crashed", f"vcpu{self.cpu}", traceback.format_exc())
        self.counters.flush()
        os._exit(4)

    # -- safe points, waiting -----------------------------------------------------------------------

    def retire(self) -> None:
        """Before the process ends: a kick that comes late must not find a half-finished interpreter."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        if self.trace:
            self.trace.stop(os.getpid(), self.row.name)
        self.counters.flush()

    def safe_point(self) -> None:
        """Take what is due; does nothing with interrupts off or inside an ISR."""
        if not (self._irqs_off or self._hardirq):
            if self.lapic.deliverable():
                self.take_interrupts()
            if self.tasklets and not self._softirq and self.softirq_pending():
                self.run_softirqs()

    def compute(self, task: Callable[[], None]) -> None:
        """Run a pre-emptible piece of a task: interrupts come by signal while it computes.

        The task only computes: a call into the guest kernel would switch interrupts off under the handler.
        """
        assert not (self._irqs_off or self._hardirq or self._softirq or self._computing)
        self._computing = True
        # Announce, then look: a request that came while we were AWAKE was not kicked.
        self._set_state(COMPUTING)
        if self.lapic.deliverable() or self.softirq_pending():
            self._on_kick(0, None)
        try:
            task()
        finally:
            self._computing = False
            self._set_state(AWAKE)
        self.safe_point()

    def idle(self, timeout_ns: int) -> None:
        """Halt until an interrupt, a tasklet, a token or the timeout; then take what came."""
        assert not (self._irqs_off or self._hardirq or self._softirq), "a halt that no interrupt ends"
        self._halt.halt(timeout_ns)
        # A safe point, with less to ask: an interrupt is nearly always why the halt has ended.
        self.take_interrupts()
        if self.tasklets and self.softirq_pending():
            self.run_softirqs()

    def wait_interruptible(self, over: Callable[[], bool]) -> None:
        """Stand here until `over`, at a sync point with interrupts on: they are taken, their tasklets only scheduled
        if one is what stands here. MachineStopping ends it."""
        halt = halt_of(
            self.trace,
            self.machine.vps.view,
            vp_page_offset(self.position) + VP_RUN_STATE,
            self.machine.wakeup(f"vp.{self.position}"),
            lambda: self.lapic.deliverable() or over() or self.stopping() or self.others_wait(),
            PollPolicy("off"),
            self.counters,
            longest_s=LONG_WATCHDOG_S,
        )
        while not over():
            raise_if_stopping(self)
            halt.halt(HELD_NS)
            if self.lapic.deliverable():
                self.take_interrupts()
            self.let_others_run()

    def others_wait(self) -> bool:
        """Whether another task of this processor may have something to do: it has none (see `run_queue`)."""
        return False

    def let_others_run(self) -> None:
        """What it does where its task is held at a sync point and others are not."""

    def play_dead(self, start: Callable[[], bool]) -> None:
        """Offline: take no interrupt until `start()`, which a token to this VP's semaphore is the hint for.

        What is requested meanwhile stays in the request words, and is taken at the next safe point. MachineStopping.
        """
        self._set_state(OFFLINE)
        self.counters.flush()
        while not start():
            raise_if_stopping(self)
            self._wakeup.block(LONG_WATCHDOG_S)
        self._set_state(AWAKE)

    def _look(self) -> object:
        return self.lapic.deliverable() or (self.tasklets and self.softirq_pending()) or self._stopping() == STOPPING

    # -- ActorHooks ---------------------------------------------------------------------------------

    def block(self, deadline_ns: int) -> bool:
        """Wait like a blocked kernel task: halted, with interrupts taken meanwhile."""
        left = deadline_ns - self.now()
        if left <= 0:
            return False
        self.idle(left)
        return True

    def wake(self, actor: int) -> None:
        """Wake another actor, or this one (nothing to do: it is running)."""
        if actor != self.row.number:
            self.peers.wake(actor)

    def yield_processor(self) -> None:
        """Give this computer's core away."""
        os.sched_yield()

    def is_dead(self, actor: int) -> bool:
        """Whether the launcher wrote this actor off."""
        return self.machine.control.is_dead(actor)

    def stopping(self) -> bool:
        """Whether the machine's state word says STOPPING."""
        return self._stopping() == STOPPING

    def irq_save(self) -> int:
        """Interrupts off; the former state."""
        if self._irqs_off:
            return 1
        assert not self._computing, "a task that computes called the guest kernel"
        self._irqs_off = True
        if not self._hardirq:
            self._set_state(INTERRUPTS_OFF)
        return 0

    def irq_restore(self, flags: int) -> None:
        """Interrupts as they were; when on again, what came meanwhile is taken here."""
        if flags:
            return
        self._irqs_off = False
        if self._hardirq:
            return
        # Store, then look: requests that came with interrupts off were not kicked.
        self._set_state(AWAKE)
        if self.lapic.deliverable():
            self.take_interrupts()

    def irqs_disabled(self) -> bool:
        """Whether interrupts are off now."""
        return self._irqs_off or self._hardirq > 0

    def context(self) -> Context:
        """TASK, SOFTIRQ or HARDIRQ."""
        if self._hardirq:
            return Context.HARDIRQ
        return Context.SOFTIRQ if self._softirq else Context.TASK

    def kick_cpu(self, cpu: int) -> None:
        """Let a processor look at its tasklets again; this one will anyway."""
        if cpu != self.cpu:
            self.peers.request(cpu, RESCHEDULE_VECTOR)

    def send_ipi(self, cpu: int) -> None:
        """Request the call-function interrupt on another CPU."""
        self.peers.request(cpu, CALL_FUNCTION_VECTOR)

    def exit(self, operation: int, a0: int = 0, a1: int = 0, a2: int = 0) -> tuple[int, int]:
        """A VM exit: one instruction to the guest, so with interrupts off."""
        return exit_of(self, operation, a0, a1, a2)


class Exiting(Protocol):
    """A thread of a processor's, as its exits need it."""

    @property
    def exits(self) -> ExitClient: ...

    @property
    def counters(self) -> Counters: ...

    @property
    def trace(self) -> Recorder | None: ...

    def irq_save(self) -> int: ...

    def irq_restore(self, flags: int) -> None: ...


def exit_of(thread: Exiting, operation: int, a0: int, a1: int, a2: int) -> tuple[int, int]:
    """A VM exit of a processor's thread, with interrupts off meanwhile; raises as `ExitClient.exit`."""
    flags = thread.irq_save()
    try:
        thread.counters.exits += 1
        if thread.trace:
            return recorded_exit(thread.trace, thread.exits, operation, a0, a1, a2)
        return thread.exits.exit(operation, a0, a1, a2)
    finally:
        thread.irq_restore(flags)


class WorkerThread:
    """`ActorHooks` of one thread of the workqueue process: blocks on its own semaphore, never polls.

    It carries a CPU number for `smp_processor_id()` and for its exits, but is not that processor.
    """

    is_vcpu: Final = False

    def __init__(self, machine: Machine, name: str, semaphore: int, *, cpu: int = 0) -> None:
        self.machine = machine
        self.cpu = cpu
        self.row, self.counters = machine.enlist(ActorKind.WORKER, name, cpu=semaphore)
        position: int = machine.config["cpu_positions"][cpu]
        self.position = position
        self.vp_index = machine.vp_index(position)
        self.trace = machine.recorder(self.row, vp=self.vp_index, context=TraceContext.QUEUE)
        if self.trace:
            self.trace.start(self.row.pid, self.row.kind, self.row.cpu, self.row.name)
        self.peers = Peers(machine, self.counters, self.trace)
        sleep = machine.wakeup(f"actor.{semaphore}").block
        self._sleep = told(machine.control, self.row.slot, sleep) if machine.races else sleep
        self.now = machine.clock.now
        self.wake = self.peers.wake
        self.exits = exit_client(machine, position, self.row.number, self.stopping, aside_of(machine))

    def stop_at_turns(self, armed: Armed, reach: Callable[[int], None]) -> None:
        """In a machine that runs schedules: each sleep ends at a sync point, so that who was woken can be held."""
        sleep = self._sleep

        def sleep_then_stop(timeout_s: float) -> bool:
            woken = sleep(timeout_s)
            if armed[_TURN]:
                reach(_TURN)
            return woken

        self._sleep = sleep_then_stop

    def block(self, deadline_ns: int) -> bool:
        """Sleep on this thread's semaphore until a token, for at most a watchdog period; False: deadline."""
        left = deadline_ns - self.now()
        if left <= 0:
            return False
        self.counters.blocks += 1
        self.counters.flush()
        self._sleep(min(left / 1e9, LONG_WATCHDOG_S))
        return True

    def yield_processor(self) -> None:
        """Let another thread have the interpreter, or another process the core."""
        # os.sched_yield keeps the interpreter lock in Python 3.11; sleeping for no time gives it away.
        time.sleep(0)

    def is_dead(self, actor: int) -> bool:
        """Whether the launcher wrote this actor off."""
        return self.machine.control.is_dead(actor)

    def stopping(self) -> bool:
        """Whether the machine's state word says STOPPING."""
        return self.machine.stopping

    def irq_save(self) -> int:
        """A worker is no processor: it has no interrupts to switch off."""
        return 0

    def irq_restore(self, flags: int) -> None:
        """Nothing was switched off."""

    def irqs_disabled(self) -> bool:
        """Never."""
        return False

    def context(self) -> Context:
        """A worker is always a task."""
        return Context.TASK

    def kick_cpu(self, cpu: int) -> None:
        """Let a processor look at its tasklets again."""
        self.peers.request(cpu, RESCHEDULE_VECTOR)

    def send_ipi(self, cpu: int) -> None:
        """Request the call-function interrupt on a CPU."""
        self.peers.request(cpu, CALL_FUNCTION_VECTOR)

    def exit(self, operation: int, a0: int = 0, a1: int = 0, a2: int = 0) -> tuple[int, int]:
        """A VM exit through the page of the CPU this thread carries."""
        self.counters.exits += 1
        if self.trace:
            return recorded_exit(self.trace, self.exits, operation, a0, a1, a2)
        return self.exits.exit(operation, a0, a1, a2)


def recorded_exit(trace: Recorder, exits: ExitClient, operation: int, a0: int, a1: int, a2: int) -> tuple[int, int]:
    """One exit with a record of its outcome and of how long it took; a fault is recorded by the host."""
    before = time.monotonic_ns()
    low, high = exits.exit(operation, a0, a1, a2)
    trace.record(E_VMEXIT, operation, a0, a1, low, 0, time.monotonic_ns() - before)
    return low, high


def _no_softirqs() -> None:
    """No tasklets yet."""


def _never() -> bool:
    return False


def raise_if_stopping(hooks: ActorHooks) -> None:
    """MachineStopping once the state word says so."""
    if hooks.stopping():
        raise MachineStopping("the machine is stopping")
