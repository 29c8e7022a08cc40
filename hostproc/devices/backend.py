"""What a device's author writes: a back end opens channels, each of which becomes a task, and closes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from emu.errors import VmbusError
from hostproc.devices.channel import HostChannel
from hostproc.loop import TaskBody
from hostproc.protocol.versions import FAILED


class DeviceRefused(VmbusError):
    """The device will not open this channel; the guest is told `status`, which is not 0."""

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        assert status != 0
        self.status = status


class Backend(ABC):
    """One device, with all its channels; every method runs in the host's one thread and must not block.

    The task that `open` returns yields WAIT when it has nothing to do until the guest signals (to be said
    after `wait_for_packets` or `wait_for_room` has looked: a signal is not remembered for a task that did not
    ask), or AGAIN after a bounded amount of work. It ends at the latest when it is closed at one of its
    yields. A ProtocolViolation out of it is the guest's fault: it is counted, and the channel does nothing
    more until the guest closes it. Any other exception is the author's: it is counted as `backend-error`, its
    traceback goes to the log, and the same happens to the channel; one out of `open` refuses it.
    """

    name: ClassVar[str]
    subchannels: int = 0
    """How many sub-channels a guest may be given, and `seed` what is random draws on; set by who makes the device."""
    seed: int = 0

    @abstractmethod
    def open(self, channel: HostChannel) -> TaskBody:
        """Begin to serve a channel, primary or sub-channel; DeviceRefused if that cannot be."""

    def unasked(self, channel: HostChannel, count: int, size: int) -> list[bytes]:
        """Packets of about `size` bytes that the device writes of its own accord, as its driver expects them."""
        del channel
        return [bytes(size)] * count

    def close(self, channel: HostChannel) -> bool:
        """End what serves the channel, whose task was closed. False: `channel.closed()` says when it has."""
        return True
