"""An open channel over two rings in bytearrays, for tests of devices: the guest's ends, the host's, and a stepper."""

from __future__ import annotations

from emu.errors import ProtocolViolation
from emu.ring import Packet, RingConsumer, RingMemory, RingProducer
from hostproc.devices.backend import Backend
from hostproc.devices.channel import HostChannel
from hostproc.loop import WAIT

PAGE = 4096


class OpenChannel:
    """A device with one open channel; `step` resumes it as the loop would, `ring` as the guest's doorbell does."""

    def __init__(self, backend: Backend, *, to_host_pages: int = 2, to_guest_pages: int = 2) -> None:
        self.to_host = bytearray(to_host_pages * PAGE)
        self.to_guest = bytearray(to_guest_pages * PAGE)
        self.guest_out = RingProducer(RingMemory.on(self.to_host))
        self.guest_out.init()
        receive = RingMemory.on(self.to_guest)
        receive.init()
        self.guest_in = RingConsumer(receive)
        self.violations: list[ProtocolViolation] = []
        self.interrupts = 0
        self.channel = HostChannel(
            key=1,
            relid=1,
            sub_channel_index=0,
            userdata=bytes(120),
            rings=(RingConsumer(RingMemory.on(self.to_host)), RingProducer(RingMemory.on(self.to_guest))),
            signal=self._interrupt,
            violation=self.violations.append,
            closed=lambda: None,
        )
        self.channel.attach()
        self.body = backend.open(self.channel)
        self.rung = True

    def _interrupt(self) -> None:
        self.interrupts += 1

    def step(self) -> bool:
        """Resume the device once if it is to run; return whether it was."""
        if not self.rung:
            return False
        self.rung = next(self.body) is not WAIT
        return True

    def run(self) -> int:
        """Resume it until it waits; return how often."""
        steps = 0
        while self.step():
            steps += 1
        return steps

    def ring(self) -> None:
        """Signal the device, as the guest does when its ring says so."""
        self.rung = True

    def send(self, *payloads: bytes, trans_id: int = 0, flags: int = 0, packet_type: int = 6) -> None:
        """Write packets as a guest that obeys the signal rule; the caller knows that there is room."""
        for payload in payloads:
            if self.guest_out.write(payload, trans_id, flags, packet_type):
                self.ring()

    def received(self, limit: int | None = None) -> list[Packet]:
        """Read packets as a guest that obeys the room rule."""
        packets = list(self.guest_in.drain(limit))
        if self.guest_in.take_signal():
            self.ring()
        return packets
