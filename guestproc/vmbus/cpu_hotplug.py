"""A processor goes offline and comes back: `cpu_down`, `cpu_up`, and what the processor itself does for it.

    who asks           cpu_hotplug_lock for writing; asks the processor; waits for its answer
    the processor      between two programs, as a task of its own that may sleep: `hv_synic_cleanup`
                       is nobody interrupted through it any more? its flags looked at? SynIC off, and asleep

`hv_synic_cleanup` is the bus driver's callback of the hotplug state `hyperv/vmbus:online` (reference 3.1): it refuses
while the processor is needed, and nothing has changed then. An offline processor takes no interrupt: what is
requested of it lies in its request words until it is back. Its process stays.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from emu.errors import DeadlinePassed, MachineStopping
from emu.tracing import E_CPU_OFFLINE
from emu.wire.versions import VERSION_WIN10_V4_1
from guestproc.kernel.cpus import cpus_write_lock
from guestproc.kernel.functions import IPI_FUNCTIONS
from guestproc.kernel.layout import ConnectionState, Cpu, Hotplug
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol.numbers import Ipis
from guestproc.protocol.placement import is_target
from guestproc.vmbus.connection import VMBUS_CONNECT_CPU, delay
from guestproc.vmbus.hv import hv_synic_disable_regs, hv_synic_init
from guestproc.vmbus.hyperv_timer import hv_stimer_legacy_cleanup
from guestproc.vmbus.percpu import PerCpuContext

if TYPE_CHECKING:
    from guestproc.current import Current

HV_MAX_TRIES: Final = 3
TRY_NS: Final = 10_000_000
ANSWER_TIMEOUT_NS: Final = 5 * SECOND_NS
"""How long a processor has to look up from what it does, and then to do what was asked."""
SOFTIRQ_TIMEOUT_NS: Final = 60 * SECOND_NS

_NOTHING, _DOWN, _UP, _TAKEN, _DONE = (int(state) for state in Hotplug)


# -- who asks -------------------------------------------------------------------------------------------


def cpu_down(current: Current, number: int) -> int:
    """Take a processor offline, from another one: 0, also when it is so already, or a negative errno.

    -EINVAL: there is none of this number; -EBUSY: it is needed, or it runs a program.
    """
    if number >= current.tables.layout.ncpus:
        return -errno.EINVAL
    if number == VMBUS_CONNECT_CPU:
        # It would refuse by itself; who asks may be this very processor.
        return -errno.EBUSY
    with cpus_write_lock(current.connection, current.actor):
        cpu = current.cpu_record(number)
        if not cpu.online.load():
            return 0
        cpu.hotplug.store(_DOWN)
        current.actor.kick_cpu(number)
        return _answer(current, cpu, _DOWN)


def cpu_up(current: Current, number: int) -> int:
    """Bring a processor back: 0, also when it is there already; -EINVAL: there is none; -EIO: it does not come."""
    if number >= current.tables.layout.ncpus:
        return -errno.EINVAL
    with cpus_write_lock(current.connection, current.actor):
        cpu = current.cpu_record(number)
        if cpu.online.load():
            return 0
        cpu.hotplug.store(_UP)
        # It takes no interrupt: the startup IPI of a machine is a token here.
        machine = current.machine
        machine.wakeup(f"vp.{machine.config['cpu_positions'][number]}").post()
        result = _answer(current, cpu, _UP)
        return -errno.EIO if result == -errno.EBUSY else result


def _answer(current: Current, cpu: Cpu, asked: int) -> int:
    """Wait until the processor has done what it was asked; -EBUSY when it does not even begin, and it shall not now."""
    wait, actor, state = current.connection.state_wait, current.actor, cpu.hotplug
    began = wait.wait_until_timeout(actor, lambda: state.load() != asked, ANSWER_TIMEOUT_NS)
    if not began and state.cas(asked, _NOTHING) == asked:
        return -errno.EBUSY
    wait.wait_until(actor, lambda: state.load() == _DONE, SOFTIRQ_TIMEOUT_NS, f"{cpu} to go or to come")
    result = -cpu.hotplug_error
    state.store(_NOTHING)
    return result


# -- the processor itself -------------------------------------------------------------------------------


def cpuhp_thread_fun(current: Current, play_dead: Callable[[Callable[[], bool]], None]) -> bool:
    """Between two programs: go offline if that is asked, and stay so until the opposite is (`Vcpu.play_dead`).

    True: something was done, in which time others may have left something to do.
    """
    cpu = current.cpu_record()
    if cpu.hotplug.load() != _DOWN or cpu.hotplug.cas(_DOWN, _TAKEN) != _DOWN:
        return False
    result = hv_synic_cleanup(current)
    if result == 0:
        _end_softirqs(current)
    _tell(current, cpu, result)
    if result:
        return True
    play_dead(lambda: cpu.hotplug.cas(_UP, _TAKEN) == _UP)
    hv_synic_online(current)
    _tell(current, cpu, 0)
    return True


def _tell(current: Current, cpu: Cpu, result: int) -> None:
    cpu.hotplug_error = -result
    cpu.hotplug.store(_DONE)
    current.connection.state_wait.wake_all(current.actor)


def _end_softirqs(current: Current) -> None:
    """Nothing schedules a tasklet here any more; those that are pending still run (the kernel moves them elsewhere)."""
    tasklets, actor = current.tasklets, current.actor
    assert tasklets is not None
    deadline_ns = actor.now() + SOFTIRQ_TIMEOUT_NS
    while tasklets.pending():
        if actor.stopping():
            raise MachineStopping(f"{actor} waited for its tasklets")
        # What ends a hindrance (it is disabled, or runs elsewhere) kicks this processor.
        if not actor.block(deadline_ns):
            raise DeadlinePassed(f"{tasklets.pending()} tasklets of CPU {current.cpu} to run", SOFTIRQ_TIMEOUT_NS)


def hv_synic_online(current: Current) -> None:
    """`hv_synic_init` on this processor, with its pages at hand before the first interrupt."""
    assert current.tasklets is not None
    if current.percpu is None:
        current.percpu = PerCpuContext(current, current.tasklets)
    hv_synic_init(current)
    current.connection.state_wait.wake_all(current.actor)


def hv_synic_cleanup(current: Current) -> int:
    """Take this processor's SynIC down: 0, or -EBUSY while the bus is connected and needs it; runs on it."""
    if current.connection.conn_state.load() == ConnectionState.CONNECTED and _is_needed(current):
        return -errno.EBUSY
    _always_cleanup(current)
    return 0


@IPI_FUNCTIONS.register(Ipis.HV_SYNIC_CLEANUP, "hv_synic_cleanup")
def _cleanup_of_last(current: Current, _cpu: int) -> None:
    """As an interrupt, when the bus goes: nothing is connected any more, so there is nothing to ask and to wait for."""
    result = hv_synic_cleanup(current)
    assert result == 0, f"CPU {current.cpu} is needed by a bus that goes"


def _is_needed(current: Current) -> bool:
    """Whether the host may have something for this processor: it connected, a channel's interrupts come here, or
    came here and one was not taken yet (races.md F4)."""
    connection, tables = current.connection, current.tables
    if current.cpu == VMBUS_CONNECT_CPU:
        return True
    with connection.channel_mutex.hold(current.actor):
        if is_target(tables, current.cpu):
            return True
    # Without that look (races.md F4) it is wrong. Before 4.1 no channel can have been moved away.
    scans = current.fix.scan_flags_before_offline
    return scans and connection.vmbus_proto_version >= VERSION_WIN10_V4_1 and hv_synic_event_pending(current)


def hv_synic_event_pending(current: Current) -> bool:
    """Whether an event flag stays set in this processor's page: its interrupt is given time, a bounded number of times.

    Flag 0 is no channel's. A move is acknowledged when the host sets no flag here any more; those that it had set
    before mean data that nobody else is told of.
    """
    hv_cpu = current.percpu
    assert hv_cpu is not None, f"CPU {current.cpu} has no SynIC"
    for tries in range(HV_MAX_TRIES + 1):
        if not _flag_is_set(current, hv_cpu):
            return False
        if tries < HV_MAX_TRIES:
            delay(current, TRY_NS)
    return True


def _flag_is_set(current: Current, hv_cpu: PerCpuContext) -> bool:
    gpa, words = hv_cpu.event_gpa, hv_cpu.event_words
    return int.from_bytes(current.tables.ram.buffer[gpa : gpa + 8 * len(words)], "little") & ~1 != 0


def _always_cleanup(current: Current) -> None:
    """SynIC off; the ISR finds no page from here on (events and messages have none to lie in)."""
    cpu = current.cpu_record()
    current.percpu = None
    hv_stimer_legacy_cleanup(current)
    hv_synic_disable_regs(current)
    cpu.online.store(0)
    cpu.call.offline(current.actor)
    current.record(E_CPU_OFFLINE, current.cpu, cpu.vp_index)
