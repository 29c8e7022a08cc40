"""How our drivers get sub-channels: ask the device, note the answer, open each as its offer comes.

The driver sets its callback before it asks (`vmbus_set_sc_create_callback`), since offers may come before the answer.
The callback runs on hv_sub_chan, beside a remove that closes; so who opens a sub-channel of a device that is being
removed meanwhile closes it again itself.

The probe waits neither for the answer nor for the offers. It runs on an ordered queue: a rescind that waits for a probe
behind this one would hold up the rescind that ends this one's wait (netvsc has a work item of its own for that reason).
So a host that does not answer, or does not offer what it granted, costs nothing: the device has the channels it has.

Driver state words: 4 what the device answered; 5 sub-channels that opened, 6 that did not; 7 callbacks that are
running (all atomic).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from emu.errors import ProtocolViolation
from emu.ring import Packet
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP
from emu.wire.subchannel_request import SubchannelStatus, pack_request, parse_completion
from guestproc.drivers.claims import CLAIMS, REMOVING, state_word
from guestproc.kernel.layout import Channel, Device
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import devices
from guestproc.vmbus.channel import vmbus_close_internal, vmbus_free_ring
from guestproc.vmbus.packets import vmbus_sendpacket

if TYPE_CHECKING:
    from guestproc.current import Current

ANSWER: Final = 4
OPENED: Final = 5
FAILED: Final = 6
RUNNING: Final = 7

PENDING: Final = 1 << 63
ANSWERED: Final = 1 << 62
GRANTED: Final = 0xFF
REQUEST_ID: Final = int.from_bytes(b"SUBCHANS", "little")
"""The transaction id of a request."""
TIMEOUT_NS: Final = 10 * SECOND_NS
"""For sub-channels to be there when a machine has booted."""
WIND_UP_TIMEOUT_NS: Final = 60 * SECOND_NS
"""For callbacks that run when their device is removed; each waits for the host at most once."""


def ask_for_subchannels(current: Current, device: Device, channel: Channel, count: int, name: str) -> None:
    """In the probe, the primary open: ask for `count`; nobody waits for them here."""
    answer = state_word(current, device, ANSWER)
    answer.store(PENDING)
    result = vmbus_sendpacket(current, channel, pack_request(count), REQUEST_ID, flags=COMPLETION_REQUESTED)
    if result:
        answer.store(0)
        current.log(f"{name}: sub-channels cannot be asked for ({result})")


def take_answer(current: Current, device: Device, packets: list[Packet]) -> None:
    """In the primary's callback: the packet that completes the request is taken out, and noted."""
    answer = state_word(current, device, ANSWER)
    if not answer.load() & PENDING:
        return
    for position, (packet_type, _flags, trans_id, payload) in enumerate(packets):
        if packet_type == VM_PKT_COMP and trans_id == REQUEST_ID:
            del packets[position]
            answer.store(ANSWERED | _judged(current, payload))
            current.connection.state_wait.wake_all(current.actor)
            return


def _judged(current: Current, payload: bytes) -> int:
    """How many are granted: none by what is no completion, nor by a refusal, which is logged."""
    try:
        status, count = parse_completion(payload)
    except ProtocolViolation as violation:
        current.refuse(violation)
        return 0
    if status == SubchannelStatus.SUCCESS:
        return count
    current.log(f"sub-channels refused with status {status}")
    return 0


def wait_for_subchannels(current: Current) -> None:
    """Until every device has the sub-channels that it was granted, or the deadline; what is missing then is logged.

    No driver waits for that. Whoever shows a machine does, behind `vmbus_wait_for_offers`.
    """
    with current.connection.channel_mutex.hold(current.actor):
        unsettled = [device.handle for device in current.tables.devices.live() if _missing(current, device)]

    def settled() -> bool:
        with current.connection.channel_mutex.hold(current.actor):
            found = [current.tables.devices.find(handle) for handle in unsettled]
            unsettled[:] = [device.handle for device in found if device is not None and _missing(current, device)]
        return not unsettled

    if unsettled and not current.connection.state_wait.wait_until_timeout(current.actor, settled, TIMEOUT_NS):
        who = "1 device has" if len(unsettled) == 1 else f"{len(unsettled)} devices have"
        current.log(f"{who} not got the sub-channels that were asked for")


def _missing(current: Current, device: Device) -> bool:
    """Under channel_mutex: whether an answer, or a sub-channel that was granted, is still to come."""
    answer = state_word(current, device, ANSWER).load()
    if not answer or not device.driver or state_word(current, device, CLAIMS).load() & REMOVING:
        return False
    came = state_word(current, device, OPENED).load() + state_word(current, device, FAILED).load()
    return bool(answer & PENDING) or came < answer & GRANTED


# -- in the sc_creation_callback --------------------------------------------------------------------------


class Opening(Protocol):
    """One try of a driver to open one of its channels."""

    def open(self, device: Device) -> int:
        """Open the channel; 0 or a negative errno."""

    def keep(self) -> None:
        """Under channel_mutex: the channel stays; from now on the driver's `remove` is to take it away."""

    def undo(self) -> None:
        """It did not open, or was closed again at once: give back what `open` took besides."""


def add_subchannel(current: Current, channel: Channel, opening: Opening) -> None:
    """Open a new sub-channel for its device."""
    device = _hold_device(current, channel)
    if device is None:
        return
    try:
        stays = opening.open(device) == 0 and _keep(current, channel, device, opening)
        if not stays:
            opening.undo()
        state_word(current, device, OPENED if stays else FAILED).fetch_add(1)
    finally:
        state_word(current, device, RUNNING).fetch_sub(1)
        with current.connection.channel_mutex.hold(current.actor):
            devices.put_device(current.tables, device)
        current.connection.state_wait.wake_all(current.actor)


def _hold_device(current: Current, channel: Channel) -> Device | None:
    """The sub-channel's device with a reference to it; None when it is gone, or on its way out."""
    with current.connection.channel_mutex.hold(current.actor):
        primary = current.tables.channels.find(channel.primary_channel)
        device = None if primary is None else current.tables.devices.find(primary.device_obj)
        if device is None or state_word(current, device, CLAIMS).load() & REMOVING:
            return None
        device.state.fetch_add(devices.REFERENCE)
        state_word(current, device, RUNNING).fetch_add(1)
        return device


def _keep(current: Current, channel: Channel, device: Device, opening: Opening) -> bool:
    """Leave an open sub-channel to its driver, or close it: whoever removes the device may have passed it by.

    The remover sets REMOVING and then looks for open channels under the same mutex: one of the two closes it.
    """
    with current.connection.channel_mutex.hold(current.actor):
        if not state_word(current, device, CLAIMS).load() & REMOVING:
            opening.keep()
            return True
        if vmbus_close_internal(current, channel) == 0:
            vmbus_free_ring(current, channel)
        return False


def wait_for_callbacks(current: Current, device: Device, channel: Channel, name: str) -> None:
    """In `remove`, the primary closed: until no callback of this life of the device runs any more.

    Not when the host took the primary back: its sub-channels' rescinds may be queued behind this one, and such a
    device is not probed again.
    """
    running = state_word(current, device, RUNNING)
    if channel.rescind.load() or current.connection.state_wait.wait_until_timeout(
        current.actor, lambda: not running.load() or channel.rescind.load() != 0, WIND_UP_TIMEOUT_NS, device.gpa
    ):
        return
    current.log(f"{name}: {running.load()} sub-channels are still being opened")
