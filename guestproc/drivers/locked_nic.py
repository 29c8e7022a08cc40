"""`hv_locked_nic`: a driver of NICs that share one network lock, as netvsc's do (exhibit A3, with two of them).

Its probe opens the channel and asks for sub-channels under the lock. Work of its own then takes the lock and waits
until the sub-channels are open. So a probe may wait for another device's sub-channels, which must not be queued behind
it. It takes what `new_id` or `driver_override` gives to it, and is otherwise the echo driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emu.syncpoint import Point
from guestproc.drivers.claims import CLAIMS, REMOVING, state_word
from guestproc.drivers.echo import EchoDriver
from guestproc.drivers.subchannels import ANSWER, FAILED, GRANTED, OPENED, PENDING
from guestproc.kernel.functions import WORK_FUNCTIONS
from guestproc.kernel.layout import Device
from guestproc.kernel.wait import SECOND_NS
from guestproc.kernel.work_records import WorkItem
from guestproc.kernel.workqueue import QueueNumber
from guestproc.protocol import devices
from guestproc.protocol.numbers import Works

if TYPE_CHECKING:
    from guestproc.current import Current

SUBCHANNELS_TIMEOUT_NS: Final = 45 * SECOND_NS
_LOCK_WAIT: Final = int(Point.DRV_LOCK_WAIT)


class LockedNicDriver(EchoDriver):
    """`hv_driver` of whatever it is told to take."""

    number: int = 51
    name: str = "hv_locked_nic"
    id_table: frozenset[bytes] = frozenset()

    def probe(self, current: Current, device: Device) -> int:
        """`netvsc_probe`: under the network lock; the sub-channels are waited for by work (`subchan_work`)."""
        if current.armed[_LOCK_WAIT]:
            current.reach(_LOCK_WAIT, current.channel(device.channel).relid)
        with current.connection.rtnl_mutex.hold(current.actor):
            result = super().probe(current, device)
        if result == 0 and state_word(current, device, ANSWER).load():
            self._schedule_subchan_work(current, device)
        return result

    def _schedule_subchan_work(self, current: Current, device: Device) -> None:
        """The work holds the device; without a record for it nobody waits, and the sub-channels come anyway."""
        item = current.tables.work_queues.allocate(Works.NETVSC_SUBCHAN_WORK, [device.handle])
        if item is None:
            current.log(f"{self.name}: there is no work record to wait for sub-channels with")
            return
        with current.connection.channel_mutex.hold(current.actor):
            device.state.fetch_add(devices.REFERENCE)
        current.tables.work_queues.queue_work(current.actor, QueueNumber.SYSTEM, item)


@WORK_FUNCTIONS.register(Works.NETVSC_SUBCHAN_WORK)
def netvsc_subchan_work(current: Current, item: WorkItem) -> None:
    """`netvsc_subchan_work`: hold the network lock until all sub-channels are open."""
    connection, actor = current.connection, current.actor
    device: Device = current.tables.devices.from_handle(item.arguments[0])
    with connection.rtnl_mutex.hold(actor):
        there = connection.state_wait.wait_until_timeout(
            actor, lambda: _are_there(current, device), SUBCHANNELS_TIMEOUT_NS, device.gpa
        )
    if not there:
        current.log("hv_locked_nic: the sub-channels do not come")
    with connection.channel_mutex.hold(actor):
        devices.put_device(current.tables, device)


def _are_there(current: Current, device: Device) -> bool:
    """Whether nothing that was granted is still to come; of a device that goes nothing is."""
    if state_word(current, device, CLAIMS).load() & REMOVING:
        return True
    answer = state_word(current, device, ANSWER).load()
    came = state_word(current, device, OPENED).load() + state_word(current, device, FAILED).load()
    return not answer & PENDING and came >= answer & GRANTED
