"""`percpu_channel_enq` and `percpu_channel_deq`: era `seed`'s list of channels for each processor (reference 3.9).

A processor's list is changed by that processor only, in interrupt context, so that a change never meets its
ISR on the way along the list. Whoever puts a channel on it or takes it off has the target processor do it: by
a call that waits, or itself if it is that processor. A worker never is, whatever CPU number it carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.syncpoint import Point
from guestproc.kernel.functions import IPI_FUNCTIONS
from guestproc.kernel.layout import Channel
from guestproc.kernel.smp import ProcessorGone
from guestproc.protocol.numbers import Ipis

if TYPE_CHECKING:
    from guestproc.current import Current

_TURN: Final = int(Point.TURN)


@IPI_FUNCTIONS.register(Ipis.PERCPU_CHANNEL_ENQ)
def percpu_channel_enq(current: Current, handle: int) -> None:
    """Put a channel at the end of this processor's list; runs with interrupts off."""
    current.tables.chan_list(current.cpu_record()).append(current.channel(handle))


@IPI_FUNCTIONS.register(Ipis.PERCPU_CHANNEL_DEQ)
def percpu_channel_deq(current: Current, handle: int) -> None:
    """Take a channel off this processor's list, if it ever came there; runs with interrupts off."""
    channel = current.channel(handle)
    channels = current.tables.chan_list(current.cpu_record())
    if channels.contains(channel):
        channels.remove(channel)


def run_on_target_cpu(current: Current, channel: Channel, function: Ipis) -> None:
    """Have the channel's target processor run `function` on it: directly here, else by IPI, and wait.

    A processor that is gone takes no interrupts, so its list does not matter any more: that is logged. One that
    is there and does not answer is fatal (DeadlinePassed), as a lock that is not given back: the channel may be
    on its list or not.
    """
    cpu = channel.target_cpu.load()
    actor = current.actor
    if actor.is_vcpu and actor.cpu == cpu:
        # The kernel switches pre-emption off (get_cpu); our list is no RCU list, so interrupts are off as well.
        flags = actor.irq_save()
        try:
            IPI_FUNCTIONS.lookup(function)(current, channel.handle)
        finally:
            actor.irq_restore(flags)
        return
    try:
        smp_call_function_single(current, cpu, function, channel.handle)
    except ProcessorGone as error:
        current.log(f"relid {channel.relid}: {error}")


def smp_call_function_single(current: Current, cpu: int, function: Ipis, argument: int) -> None:
    """Run a function on another online processor and wait for its end; ProcessorGone, DeadlinePassed."""
    record = current.cpu_record(cpu)

    def online() -> bool:
        return bool(record.online.load()) and not current.actor.is_dead(record.actor.load())

    blocks = current.counters.blocks
    record.call.call(current.actor, cpu, function, argument, online)
    # Whether it had to sleep for that is chance: to a schedule it did (a sleep ends at this point by itself).
    if current.armed[_TURN] and current.counters.blocks == blocks:
        current.reach(_TURN)
