"""The end of a channel: unmapped, unlinked, its relid given back, its record freed (reference 3.11).

Every offered relid ends in exactly one RELID_RELEASED, and here is where it is sent for a channel that was
entered; an offer that never became one sends it in `vmbus_onoffer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestproc.kernel.layout import Channel
from guestproc.kernel.rcu import synchronize
from guestproc.kernel.tasklet import tasklet_kill
from guestproc.protocol import offers
from guestproc.protocol.numbers import Ipis
from guestproc.protocol.uevents import Action
from guestproc.vmbus.chan_list import run_on_target_cpu
from guestproc.vmbus.connection import vmbus_release_relid
from guestproc.vmbus.uevents import channel_uevent

if TYPE_CHECKING:
    from guestproc.current import Current


def hv_process_channel_removal(current: Current, channel: Channel) -> None:
    """Remove a channel that is rescinded; under channel_mutex."""
    current.connection.channel_mutex.assert_held(current.actor)
    assert channel.rescind.load(), f"{channel} removed without a rescind"
    if current.percpu_lists:
        run_on_target_cpu(current, channel, Ipis.PERCPU_CHANNEL_DEQ)
    offers.leave_lists(current.tables, channel)
    vmbus_release_relid(current, channel.relid, channel.generation)
    free_channel(current, channel)
    # A closer may wait for this sub-channel to be decided on.
    current.connection.state_wait.wake_all(current.actor)


def free_channel(current: Current, channel: Channel) -> None:
    """Kill the tasklet, wait until no CPU is in an ISR that may have found the channel, free its record.

    Nobody finds it any more, and it has no callback: an ISR that found it before does not schedule it.
    """
    assert not channel.onchannel_callback, f"{channel} is freed with a callback"
    if channel.kobj_added:
        channel_uevent(current, channel, Action.REMOVE)
    tasklet_kill(current.actor, channel.callback_event, current.connection.tasklet_idle)
    sequences = [cpu.isr_sequence for cpu in current.tables.cpus.live()]
    synchronize(current.actor, sequences, current.connection.grace_wait)
    current.tables.channels.free(channel)
