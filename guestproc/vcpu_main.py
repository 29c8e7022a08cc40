"""The process of one virtual processor: boots (CPU 0) or comes online, then takes interrupts and runs tasks.

`python -m guestproc vcpu CPU --machine NAME` starts one by hand; the launcher forks it from the zygote.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from emu import plugin
from emu.control import ActorKind, ActorState, Ready
from emu.errors import DeadlinePassed, MachineStopping, MissingPrerequisite, OutOfMemory, VmbusError
from emu.layout import ABI_MAJOR, ABI_MINOR, ExitOperation
from emu.machine import Machine
from emu.memory import PAGE_SIZE, GuestMemory, reserve_ram
from emu.task_board import ALL_PROGRAMS, TaskBoard, TaskRow
from emu.wire.versions import VERSION_WIN8_1
from guestproc.current import Current
from guestproc.drivers.echo_inbox import INBOXES
from guestproc.drivers.exhibits import add_exhibit_drivers
from guestproc.drivers.steering import take_what_was_left
from guestproc.drivers.subchannels import wait_for_subchannels
from guestproc.drivers.table import add_plugins
from guestproc.kernel.layout import KernelTables, boot_pages, compute
from guestproc.kernel.tasklet import TaskletQueue
from guestproc.kernel.tasklet_trace import RecordedTaskletQueue
from guestproc.kernel.wait import SECOND_NS
from guestproc.kernel.wait_trace import record_waits
from guestproc.protocol.era import ERAS
from guestproc.run_queue import Body, GuestTask, RunQueue, SharedVcpu
from guestproc.tasks import CALLERS, run_task
from guestproc.user import end_user_space
from guestproc.vcpu import CALL_FUNCTION_VECTOR, PATIENT_TIMEOUT_NS, Vcpu, raise_if_stopping
from guestproc.vmbus import isr as _isr  # noqa: F401 (registers vmbus_isr)
from guestproc.vmbus.bus import vmbus_bus_init, vmbus_exit, vmbus_start, vmbus_wait_for_offers
from guestproc.vmbus.cpu_hotplug import cpuhp_thread_fun, hv_synic_online
from guestproc.vmbus.device import vmbus_shutdown
from guestproc.vmbus.percpu import PerCpuContext
from guestproc.vmbus.ring_buffer import RingCache
from guestproc.vmbus.vector import Gate

IDLE_NS: Final = 10 * SECOND_NS
"""An idle processor is woken by whoever wants something of it; a round of its own is a watchdog's."""
CPUS_TIMEOUT_NS: Final = 30 * SECOND_NS
BOOT_CPU: Final = 0
EXIT_BOOT_FAILED: Final = 4

Report = Callable[..., None]


class BootFailed(VmbusError):
    """The guest could not come up; the text says at which step and why."""


class Processor(NamedTuple):
    """A processor that is to come online, as far as it can be made before there is its process."""

    vcpu: Vcpu
    current: Current
    gate: Gate


def make(machine: Machine, cpu: int, report: Report) -> Processor:
    """A processor, not the boot CPU, of a guest that has laid out its RAM."""
    vcpu = Vcpu(machine, cpu, report)
    current = _current(vcpu, KernelTables.attach(machine.ram.memory), report)
    assert current.tasklets is not None
    current.percpu = PerCpuContext(current, current.tasklets)
    # Which waits for it to come online.
    vcpu.peers.reach(BOOT_CPU)
    return Processor(vcpu, current, Gate(current, vcpu))


def run(machine: Machine, cpu: int, report: Report, made: Processor | None = None) -> int:
    """Boot or come online, then serve until the machine stops; the process's exit status.

    `made`: the processor, where somebody has made it before there was this process.
    """
    add_plugins(plugin.attach(machine.config))
    add_exhibit_drivers(machine)
    vcpu = made.vcpu if made else (SharedVcpu if machine.races else Vcpu)(machine, cpu, report)
    vcpu.begin()
    try:
        if made:
            current = made.current
            _synic_online(current, made.gate)
        else:
            current = _boot(vcpu, report) if cpu == BOOT_CPU else _come_online(vcpu, report)
        if isinstance(vcpu, SharedVcpu):
            _share(current, vcpu, report)
        _serve(current, vcpu)
    except MachineStopping:
        pass
    except BootFailed as failure:
        report("crashed", f"vcpu{cpu}", f"{failure}\n")
        return EXIT_BOOT_FAILED
    finally:
        vcpu.retire()
    return 0


def _serve(current: Current, vcpu: Vcpu) -> None:
    """Interrupts, what the harness orders, and nothing in between, until the machine stops."""
    control = current.machine.control
    queue = vcpu.run_queue if isinstance(vcpu, SharedVcpu) else None
    board = TaskBoard(control, ALL_PROGRAMS if queue is None else ALL_PROGRAMS - CALLERS)
    go_offline = cpuhp_thread_fun if queue is None else _unless_busy(queue)
    while not vcpu.stopping():
        vcpu.safe_point()
        if (row := board.take(vcpu.cpu)) is not None:
            run_task(current, vcpu, board, row)
        elif vcpu.cpu == BOOT_CPU and control.shutdown_requested and not control.shutdown_done:
            _shut_down(current)
        elif not go_offline(current, vcpu.play_dead):
            vcpu.idle(IDLE_NS)


def _share(current: Current, vcpu: SharedVcpu, report: Report) -> None:
    """From here on programs that only make calls get a task each, beside whatever else this processor does."""
    machine = vcpu.machine
    board = TaskBoard(machine.control, CALLERS)

    def body_of(task: GuestTask) -> Body:
        # Its own view of guest RAM, as every thread has one: what is recorded goes to whoever did it.
        tables = KernelTables.attach(machine.ram.memory)
        own = _kernel_thread(task, tables, report)

        def run_row(row: TaskRow) -> None:
            own.percpu, own.tasklets = current.percpu, current.tasklets
            run_task(own, vcpu, board, row)

        return run_row

    vcpu.run_queue = RunQueue(vcpu, board, body_of)


def _unless_busy(queue: RunQueue) -> Callable[[Current, Callable[[Callable[[], bool]], None]], bool]:
    """`cpuhp_thread_fun` of a processor with several tasks: it goes between two programs of theirs, too."""
    return lambda current, play_dead: not queue.busy and cpuhp_thread_fun(current, play_dead)


def _current(vcpu: Vcpu, tables: KernelTables, report: Report) -> Current:
    """This processor as the kernel code sees it; its tasklets and its vectors are in place afterwards."""
    current = _kernel_thread(vcpu, tables, report)
    idle = tables.connection.tasklet_idle
    if vcpu.trace:
        tasklets: TaskletQueue = RecordedTaskletQueue(current.actor, idle, current, vcpu.trace)
    else:
        tasklets = TaskletQueue(current.actor, idle, owner=current)
    vcpu.softirqs = tasklets.run
    vcpu.softirq_pending = tasklets.runnable
    vcpu.tasklets = tasklets.queue
    record = current.cpu_record()
    record.actor.store(current.actor.number)
    if vcpu.cpu == BOOT_CPU:
        # The connect CPU takes every reply, so it expects one while a request is pending.
        pending = tables.connection.chn_msg_list.words
        vcpu.expecting = lambda: pending[0] != 0

    def call_function() -> None:
        vcpu.entering_irq()
        record.call.run(current.actor, current)
        vcpu.lapic.eoi()
        vcpu.exiting_irq()

    vcpu.vectors[CALL_FUNCTION_VECTOR] = call_function
    current.tasklets = tasklets
    vcpu.rescheduled = lambda: take_what_was_left(current, INBOXES)
    return current


def _kernel_thread(hooks: Vcpu | GuestTask, tables: KernelTables, report: Report) -> Current:
    """A thread of this processor's as the kernel code sees it."""
    machine = hooks.machine
    if hooks.trace:
        record_waits(tables.ram)
    memory = GuestMemory(machine.ram.fd, machine.ram.memory, machine.ram.size, there=machine.ram_reserved)
    era = ERAS[machine.config["machine"]["era"]]
    return Current(hooks, tables, era, RingCache(memory, lambda: hooks.trace), memory, report)


# -- coming up --------------------------------------------------------------------------------------------


def _boot(vcpu: Vcpu, report: Report) -> Current:
    """The boot CPU: attach, format RAM, bring the bus up, connect, and see all offers through."""
    machine = vcpu.machine
    vcpu.exit(ExitOperation.ATTACH, vcpu.row.pid, ABI_MAJOR << 16 | ABI_MINOR)
    positions: list[int] = machine.config["cpu_positions"]
    vp_indices = [machine.vp_index(position) for position in positions]
    era = ERAS[machine.config["machine"]["era"]]
    try:
        layout = compute(machine.ram.size, machine.vp_count)
        # With the pages that are named to the hypervisor: what it cannot have for them is a #GP, where nobody asks why.
        own = layout.first_free_page * PAGE_SIZE, boot_pages(machine.vp_count) * PAGE_SIZE
        for gpa, nbytes in (*layout.looked_at(), own):
            machine.ram.reserve(gpa, nbytes)
        reserve = partial(reserve_ram, machine.ram.fd)
        tables = KernelTables.format(machine.ram.memory, machine.vp_count, era.number, vp_indices, reserve)
    except (OutOfMemory, OSError) as error:
        raise MissingPrerequisite(f"/dev/shm has no room for the guest's tables: {error}; free some of it") from None
    current = _current(vcpu, tables, report)
    _note_numa(machine, tables)
    _expect(vmbus_bus_init(current, machine.vp_count), "vmbus_bus_init")
    _release_others(machine, vcpu)
    _synic_online(current, Gate(current, vcpu))
    connection = tables.connection
    try:
        connection.state_wait.wait_until(
            current.actor,
            lambda: all(one.online.load() for one in tables.all_cpus()),
            PATIENT_TIMEOUT_NS if machine.config.get("by_hand") else CPUS_TIMEOUT_NS,
            "CPUs to come online",
        )
        _connect(current)
        _reached(machine, vcpu, report, Ready.CONNECTED)
        vmbus_wait_for_offers(current, lambda: machine.control.ready >= Ready.OFFERS_DELIVERED)
        wait_for_subchannels(current)
    except DeadlinePassed as error:
        raise BootFailed(str(error)) from None
    _reached(machine, vcpu, report, Ready.CHANNELS_OPEN)
    return current


def _expect(result: int, step: str) -> None:
    """Go on after a step of the boot that returned 0; BootFailed otherwise."""
    if result:
        raise BootFailed(f"{step}: {errno.errorcode.get(-result, result)}; the guest's log says why")


def _connect(current: Current) -> None:
    """`vmbus_start`; a host that does not want us leaves nothing of the bus behind."""
    result = vmbus_start(current)
    if result:
        vmbus_exit(current)
    _expect(result, "vmbus_connect")


def _reached(machine: Machine, vcpu: Vcpu, report: Report, stage: Ready) -> None:
    machine.control.reach(stage)
    report("stage", f"vcpu{vcpu.cpu}", int(stage))


def _release_others(machine: Machine, vcpu: Vcpu) -> None:
    """RAM is laid out: the other CPUs and the workqueue process may attach to it."""
    machine.control.set_guest_formatted()
    gate = machine.wakeup("actor.0")
    gate.post()  # for the workqueue process
    gate.post()  # for the zygote, which makes the other CPUs
    # Who is not there yet looks at the word above when he is.
    for row in machine.control.rows():
        if row.kind == ActorKind.VCPU and row.state == ActorState.ALIVE and row.cpu != vcpu.cpu:
            vcpu.kick_cpu(row.cpu)


def _note_numa(machine: Machine, tables: KernelTables) -> None:
    """Which CPU is on which node, dealt out in runs as the scenario says."""
    nodes: int = machine.config["machine"].get("numa", 1)
    tables.connection.nr_numa_nodes = nodes
    for cpu in range(machine.vp_count):
        tables.connection.numa_cpus[cpu * nodes // machine.vp_count] |= 1 << cpu


def _come_online(vcpu: Vcpu, report: Report) -> Current:
    """Another CPU: wait until the boot CPU has laid RAM out, then bring this SynIC up."""
    machine = vcpu.machine
    while not machine.control.guest_formatted:
        raise_if_stopping(vcpu)
        vcpu.idle(IDLE_NS)
    current = _current(vcpu, KernelTables.attach(machine.ram.memory), report)
    _synic_online(current, Gate(current, vcpu))
    return current


def _synic_online(current: Current, gate: Gate) -> None:
    """The gate first, which stays; then this CPU's SynIC."""
    gate.install()
    hv_synic_online(current)


# -- going down -------------------------------------------------------------------------------------------


def _shut_down(current: Current) -> None:
    """User space, drivers, bus, every CPU's SynIC; then say what could not be given back."""
    tables, machine = current.tables, current.machine
    unloads = current.connection.vmbus_proto_version >= VERSION_WIN8_1
    end_user_space(current)
    vmbus_shutdown(current)
    vmbus_exit(current)
    if not unloads:
        # There is no UNLOAD below 3.0: what the host hears of is that the power goes.
        current.exit(ExitOperation.DETACH)
    leaks = tables.leaks()
    for what, count in leaks.items():
        current.log(f"leaked: {count} of {what}")
    for line in tables.damage():
        current.log(f"damaged: {line}")
    current.counters.flush()
    machine.control.shutdown_complete(sum(leaks.values()))
