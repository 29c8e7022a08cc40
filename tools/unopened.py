"""Why a device that was offered will not be open: what host and guest have decided, looked at from outside.

Only what is decided counts, and a machine that ends decides it for all. An offer that is on its way, a probe that
hangs, a driver that has the device and has not opened it yet: all that may still come to something, and of somebody
else's guest only the host's side is known.
"""

from __future__ import annotations

import errno
from typing import Final

from emu.machine import Machine
from emu.mirror import Mirror
from guestproc.kernel.layout import KernelTables
from hostproc.protocol.states import ChannelState


class Unopened:
    """One life of a relid, watched for the reasons why nobody will open it."""

    def __init__(self, machine: Machine, relid: int, generation: int) -> None:
        self._machine: Final = machine
        self._relid: Final = relid
        self._generation: Final = generation
        self._mirror: Final = Mirror(machine.control)
        self._tables: KernelTables | None = None

    def why(self) -> str:
        """The reason; "" while there is none, or none that is known."""
        found = self._said_by_host() or self._said_by_guest()
        # Looked at behind them: what a guest does at its end, drivers going first, says nothing of this device.
        ending = self._machine.stopping or self._machine.control.shutdown_requested
        return "the machine was stopped" if ending else found

    def _said_by_host(self) -> str:
        if self._mirror.is_over(self._relid, self._generation):
            return "the guest has given the relid back; it could make no device of it, or the device was taken back"
        channel = self._mirror.channel(self._relid)
        if channel is None or channel.generation != self._generation or channel.state != ChannelState.REVOKED:
            return ""
        return "the device was taken back"

    def _said_by_guest(self) -> str:
        machine = self._machine
        # The RAM of somebody else's guest is not ours to read.
        if machine.config["no_guest"] or not machine.control.guest_formatted:
            return ""
        if self._tables is None:
            self._tables = KernelTables.attach(machine.ram.apart)
        try:
            return self._verdict(self._tables)
        except AssertionError:  # a record went while we looked at it
            return ""

    def _verdict(self, tables: KernelTables) -> str:
        # The host gives a relid again once the guest has let go of it: what has it here is of this life or a later one.
        channel = tables.relids.lookup(self._relid)
        if channel is None or not channel.probe_done.load():
            return ""
        device = tables.devices.find(channel.device_obj)
        # Who holds the lock may be a driver that was registered meanwhile, and takes it yet.
        if device is None or device.driver or device.device_lock.owner:
            return ""
        if device.probe_error:
            name = errno.errorcode.get(device.probe_error, str(device.probe_error))
            return f"its probe failed with -{name}; `vmbus-emu inspect log` says more"
        return "no driver has taken it; `vmbus-emu ctl drivers` lists them"
