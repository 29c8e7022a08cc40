"""A plugin with a back end that serves as it should, and raises when it is closed."""

from __future__ import annotations

from emu import plugin
from hostproc.devices.channel import HostChannel
from hostproc.devices.echo import Echo


@plugin.backend
class Slammed(Echo):
    """An echo device whose author made a mistake at its end."""

    name = "slammed"

    def close(self, channel: HostChannel) -> bool:
        """Raise."""
        raise RuntimeError("the door jams")
