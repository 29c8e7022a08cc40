"""The bus of a host that is told what is to go wrong: replies late, lost or doubled, refusals, a device that stalls.

On the control path it looks at each message, which costs one load where nothing is on. What passes with packets
is left to `FaultyChannel`, which is made only where a machine may have faults there. A delay is a timer of the
host's loop, in machine time; what lasts until its fault is turned off is looked at when the plan changes, and
every 20 ms where nobody looks at the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final
from uuid import UUID

from emu.fault_plan import Faults, Hit
from emu.faults import FaultKind
from emu.wire.messages import OfferChannel, RescindChannelOffer
from hostproc.bus import Bus, _Device
from hostproc.devices.channel import HostChannel
from hostproc.devices.fault_channel import FaultyChannel
from hostproc.devices.table import DEVICES
from hostproc.fault_interrupts import CallLater
from hostproc.loop import WAIT, AnyBody, TaskBody
from hostproc.protocol.effects import MapGpadl, OpenDevice, SendMessage

MOST_HELD: Final = 256
"""So many messages may be held back; one more is sent at once."""
LOOK_AGAIN_NS: Final = 20_000_000
_SQUATTER: Final = UUID("00000000-0000-4000-8000-0000000000f1")
"""Instance of the device that is offered under a relid in use."""

Identity = Callable[[], tuple[str, UUID] | None]


class _Held:
    """A message that is held back: until when (None: until its fault is turned off)."""

    __slots__ = ("due_ns", "effect", "hit")

    def __init__(self, effect: SendMessage, hit: Hit, due_ns: int | None) -> None:
        self.effect = effect
        self.hit = hit
        self.due_ns = due_ns


class FaultyBus(Bus):
    """A bus with faults; `arm` says where they are looked up, before anything is offered."""

    def arm(self, faults: Faults, *, call_later: CallLater, now: Callable[[], int], packets: bool) -> None:
        """Look faults up in `faults`; `packets`: they may be those of packets, too."""
        self._faults = faults
        self._call_later = call_later
        self._now = now
        self._held: list[_Held] = []
        if packets:
            self._channel_class = FaultyChannel

    # -- messages to the guest ------------------------------------------------------------------------

    def _send(self, effect: SendMessage) -> None:
        if self._faults.quiet:
            super()._send(effect)
            return
        message = effect.message
        if self._strikes(FaultKind.REPLY_DROP, effect):
            return
        if len(self._held) < MOST_HELD and (hold := self._strikes(FaultKind.REPLY_HOLD, effect)):
            self._hold(effect, hold)
            return
        super()._send(effect)
        if self._strikes(FaultKind.REPLY_DUP, effect):
            super()._send(effect)
        if isinstance(message, RescindChannelOffer) and self._strikes(FaultKind.HOST_DUP_RESCIND, effect):
            super()._send(effect)
        if isinstance(message, OfferChannel) and self._strikes(FaultKind.HOST_DUP_RELID, effect):
            super()._send(replace(effect, message=replace(message, if_instance=_SQUATTER)))

    def _strikes(self, kind: FaultKind, effect: SendMessage) -> Hit | None:
        message = effect.message
        relid: int = getattr(message, "child_relid", 0)
        return self._faults.hit(kind, relid=relid, message=message.TYPE, identity=lambda: self._of_relid(relid))

    def _hold(self, effect: SendMessage, hold: Hit) -> None:
        due_ns = None if hold.fault.until_off else self._now() + hold.fault.number
        self._held.append(_Held(effect, hold, due_ns))
        self._call_later(LOOK_AGAIN_NS if due_ns is None else hold.fault.number, self._release)

    def _release(self) -> None:
        """Send what was held back long enough, in its order."""
        now, held = self._now(), self._held
        due = [one for one in held if one.hit.over or (one.due_ns is not None and now >= one.due_ns)]
        self._held = [one for one in held if one not in due]
        for one in due:
            super()._send(one.effect)
        if any(one.due_ns is None for one in self._held):
            self._call_later(LOOK_AGAIN_NS, self._release)

    @property
    def held(self) -> int:
        """How many messages are held back."""
        return len(self._held)

    def forget_outgoing(self) -> None:
        """Another guest is here: what was held back for the one before is dropped, too."""
        self._held.clear()
        super().forget_outgoing()

    def plan_changed(self) -> None:
        """Something was turned on or off: let go of what waited for that."""
        self._release()
        for device in self._devices.values():
            device.wake()

    # -- GPADLs and openings --------------------------------------------------------------------------

    def _map_gpadl(self, effect: MapGpadl) -> None:
        if hit := self._refuses("gpadl", effect.key, effect.relid):
            self._take(self.server.gpadl_refused(effect.key, effect.gpadl, hit.fault.status))
            return
        super()._map_gpadl(effect)

    def _open(self, effect: OpenDevice) -> None:
        if hit := self._refuses("open", effect.key, effect.relid):
            self._take(self.server.device_refused(effect.key, hit.fault.status))
            return
        super()._open(effect)

    def _refuses(self, what: str, key: int, relid: int) -> Hit | None:
        return self._faults.hit(FaultKind.HOST_REFUSE, what, relid=relid, identity=lambda: self._of_key(key))

    # -- devices --------------------------------------------------------------------------------------

    def _attach(self, device: _Device, effect: OpenDevice) -> HostChannel:
        channel = super()._attach(device, effect)
        if isinstance(channel, FaultyChannel):
            pfns = device.gpadls[effect.ring_gpadl].page_pfns()[effect.downstream_page_offset :]
            key = effect.key
            channel.arm(self._faults, self._memory, pfns, lambda: self._of_key(key))
            channel.send_early()
        return channel

    def faulty_channels(self) -> list[FaultyChannel]:
        """The open channels that may have faults."""
        channels = (device.channel for device in self._devices.values())
        return [channel for channel in channels if isinstance(channel, FaultyChannel)]

    def _run(self, name: str, channel: HostChannel, body: TaskBody) -> AnyBody:
        inner = super()._run(name, channel, body)
        # A plain channel pays nothing for it: its task is the plain one.
        return self._run_stalling(channel, inner) if isinstance(channel, FaultyChannel) else inner

    def _run_stalling(self, channel: FaultyChannel, inner: AnyBody) -> AnyBody:
        try:
            while True:
                if hit := channel.hit(FaultKind.VSP_STALL):
                    yield from self._stalled(channel.key, hit)
                try:
                    step = next(inner)
                except StopIteration:
                    return
                try:
                    yield step
                except TypeError as wrong:  # of what was yielded (`Task.step`): it is for who yielded it
                    with contextlib.suppress(StopIteration):
                        inner.throw(wrong)
        finally:
            inner.close()

    def _stalled(self, key: int, stall: Hit) -> TaskBody:
        """Do nothing, whoever rings, until it is over."""
        duration_ns = stall.fault.number
        due_ns = None if stall.fault.until_off else self._now() + duration_ns
        self._call_later(duration_ns or LOOK_AGAIN_NS, lambda: self._wake(key))
        while not stall.over and (due_ns is None or self._now() < due_ns):
            yield WAIT
            if due_ns is None:
                self._call_later(LOOK_AGAIN_NS, lambda: self._wake(key))

    def _wake(self, key: int) -> None:
        if key in self._devices:
            self._devices[key].wake()

    # -- who it is about ------------------------------------------------------------------------------

    def _of_relid(self, relid: int) -> tuple[str, UUID] | None:
        key = next((key for key in self._devices if relid and self.server.relid_of(key) == relid), None)
        return None if key is None else self._of_key(key)

    def _of_key(self, key: int) -> tuple[str, UUID] | None:
        device = self._devices.get(key)
        if device is None:
            return None
        parameters = device.parameters
        name = next((kind.name for kind in DEVICES.values() if kind.guid == parameters.if_type), "")
        return name, parameters.if_instance
