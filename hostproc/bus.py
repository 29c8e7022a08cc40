"""The bus: carries out what the VMBus server decides, and runs the devices.

Ports, slots and interrupts are the partition's, tasks are the loop's, memory is the guest's: the bus only
brings them together, in the order of the effects. It touches no guest page that was not checked and reserved
first, and what a guest does wrong, on the wire or in a ring, ends up in `refusals`.

While a message to the guest waits for a buffer, `ready` is false: whoever feeds `deliver` stops then, the
guest's posts fill up, and it is told INSUFFICIENT_BUFFERS. So the queue here is bounded by the answers to one
message and by what the host does of its own accord.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Final, Protocol, assert_never

from emu.errors import OutOfMemory, ProtocolViolation
from emu.faults import FaultKind
from emu.gpadl import Gpadl, MapBudget
from emu.host_tables import Traffic
from emu.memory import PAGE_SHIFT, GuestMemory, coalesce
from emu.mirror import Left
from emu.ring_memory import RingMemory, RingWords
from emu.switches import ALL_FIXED, Fix
from emu.syncpoint import Point
from emu.tracing import (
    E_FAULT_HIT,
    E_GPADL_ADD,
    E_GPADL_DROP,
    E_MAP,
    E_OFFER,
    E_RESCIND,
    E_TARGET_CHANGE,
    E_UNMAP,
    Recorder,
)
from emu.wire.gpa_range import GpaRange
from emu.wire.messages import Message, MessageType, OfferChannel, RescindChannelOffer
from hostproc.devices.backend import Backend, DeviceRefused
from hostproc.devices.channel import HostChannel
from hostproc.devices.unmapped import UnmappedRings
from hostproc.interrupt_page import InterruptPage, SharedEvent
from hostproc.loop import AnyBody, TaskBody
from hostproc.points import NoPoints
from hostproc.protocol.effects import (
    BindEvent,
    CloseDevice,
    CloseDoorbell,
    Connected,
    ConnectSocket,
    Disconnected,
    DropDevice,
    Effect,
    MapGpadl,
    MonitorPages,
    OpenDevice,
    OpenDoorbell,
    Refused,
    RetargetEvent,
    SendMessage,
    UnbindEvent,
    UnmapGpadl,
)
from hostproc.protocol.offers import OfferParameters
from hostproc.protocol.refusals import Refusals
from hostproc.protocol.server import Server
from hostproc.protocol.versions import SHARED_DOORBELL_CONNECTION_ID
from hostproc.refusal_trace import RecordedRefusals
from hostproc.throttle import Throttle
from hostproc.undelivered import left_in_rings

MOST_AHEAD: Final = 256 << 10
"""Bytes of guest pages that are reserved before anybody asks."""
ROOM_AHEAD: Final = 64 << 20
"""So much must be free for that: the last of a tmpfs belongs to who needs it."""
_MODIFYCHANNEL: Final = int(MessageType.MODIFYCHANNEL).to_bytes(4, "little")
_ON_MODIFY: Final = int(Point.HOST_ON_MODIFY)
_BEFORE_ANSWER: Final = int(Point.HOST_BEFORE_ANSWER)
_BEFORE_OPEN_RESULT: Final = int(Point.HOST_BEFORE_OPEN_RESULT)
_OPEN_DONE: Final = int(Point.HOST_OPEN_DONE)
_STREAM_CLOSED: Final = int(Point.HOST_STREAM_CLOSED)

Instrument = Callable[[int, str, RingMemory], RingWords]
"""Gives the words of a ring (relid, "incoming" or "outgoing", memory) that record what they do."""


class BoundEvent(Protocol):
    """An event flag of the guest's, as the host signals it."""

    def signal(self) -> object:
        """Set the flag, and interrupt if it was clear."""

    def retarget(self, vp_index: int) -> None:
        """Set it on another VP from now on."""

    def close(self) -> None:
        """Signal nobody any more."""


class BusPartition(Protocol):
    """What the bus needs of the partition. VPs are named by index; all of them exist."""

    def post_message(self, vp_index: int, sint: int, payload: bytes) -> bool:
        """Post a channel message; False: no buffer is free, try again when one is (`flush`)."""

    def bind_event(self, vp_index: int, sint: int, flag: int) -> BoundEvent:
        """Make an event port for this flag."""

    def open_doorbell(self, connection_id: int, wake: Callable[[], None]) -> None:
        """Call `wake` for each signal on `connection_id`."""

    def close_doorbell(self, connection_id: int) -> None:
        """Undo `open_doorbell`."""


class DeviceTask(Protocol):
    """A task of the loop."""

    def wake(self) -> None:
        """Resume it in the next round."""

    def close(self) -> None:
        """End it at its yield."""


class Tasks(Protocol):
    """What the bus needs of the loop."""

    def task(self, name: str, body: AnyBody) -> DeviceTask:
        """Add a task; it runs in the next round."""


class _Device:
    """One offered channel and what is open of it."""

    __slots__ = ("backend", "beside", "channel", "event", "gpadls", "parameters", "relid", "task")

    def __init__(self, parameters: OfferParameters, backend: Backend) -> None:
        self.parameters = parameters
        self.backend = backend
        self.relid = 0  # of the last GPADL
        self.gpadls: dict[int, Gpadl] = {}
        self.event: BoundEvent | None = None
        self.channel: HostChannel | None = None
        self.task: DeviceTask | None = None
        self.beside: DeviceTask | None = None

    def wake(self) -> None:
        """Ring: resume the task, if there is one, and what runs beside it."""
        if self.task is not None:
            self.task.wake()
        if self.beside is not None:
            self.beside.wake()


class Bus:
    """A partition's bus."""

    def __init__(
        self,
        server: Server,
        partition: BusPartition,
        tasks: Tasks,
        memory: GuestMemory,
        *,
        budget: MapBudget | None = None,
        trace: Recorder | None = None,
        instrument: Instrument | None = None,
        log: Callable[[str], object] | None = None,
        points: NoPoints | None = None,
        fix: Fix = ALL_FIXED,
        refusals: Refusals | None = None,
    ) -> None:
        self._points = points or NoPoints()
        self._fix = fix
        self.server = server
        self.refusals = refusals or (RecordedRefusals(trace) if trace is not None else Refusals())
        self.connects = 0
        self.disconnects = 0
        self.left = Left.NOBODY
        self._partition = partition
        self._tasks = tasks
        self._memory = memory
        self._budget = budget
        self._trace = trace
        self._instrument = instrument
        self._log = log
        self._devices: dict[int, _Device] = {}
        # By relid: the generation of it that whoever takes it back means, if he says so.
        self._meant: dict[int, int] = {}
        self._last_key = 0
        self._effects: deque[Effect] = deque()
        self._carrying_out = False
        self._late_doorbells: dict[int, int] = {}
        self._outgoing: deque[tuple[SendMessage, int]] = deque()
        self.likely = (0, 0)
        """Where the pages of the next GPADL are likely to lie (GPA, bytes); no bytes: that is not known."""
        self.tells_left_over = False
        """Whether packets that a closed channel's rings still hold are told of: of somebody else's guest."""
        self.throttle: Throttle | None = None
        """What counts signals without cause, where somebody does; to be set before a device is open."""
        self.cause = 0
        """Serial of the guest's message that is being handled (0: none), for the trace."""
        self._channel_class: type[HostChannel] = HostChannel
        # Below 2.4: the guest's page of bits, and (0.13) whose doorbell connection 2 is, by relid.
        self._interrupt_page: InterruptPage | None = None
        self._sharing: dict[int, int] = {}

    def traffic(self) -> Iterator[tuple[int, Traffic]]:
        """Every open channel's relid, and what went through it."""
        for device in self._devices.values():
            if device.channel is not None:
                yield device.channel.relid, device.channel.traffic()

    # -- from outside -------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a guest's next message may be delivered."""
        return not self._outgoing

    @property
    def outgoing(self) -> int:
        """How many messages wait for a buffer."""
        return len(self._outgoing)

    def deliver(self, payload: bytes, connection_id: int) -> None:
        """Take a message that the guest posted."""
        if self._points.armed[_ON_MODIFY] and payload[:4] == _MODIFYCHANNEL:
            relid = int.from_bytes(payload[8:12], "little")
            if self._points.hold(_ON_MODIFY, relid, partial(self._receive, payload, connection_id)):
                return
        self._receive(payload, connection_id)

    def _receive(self, payload: bytes, connection_id: int) -> None:
        self._take(self.server.receive(payload, connection_id=connection_id))

    def flush(self) -> None:
        """Post what waits, as far as there are buffers: to be called when one is free again."""
        outgoing, post = self._outgoing, self._partition.post_message
        while outgoing:
            first, self.cause = outgoing[0]
            posted = post(first.vp_index, first.sint, first.message.pack())
            self.cause = 0
            if not posted:
                return
            outgoing.popleft()

    def add(self, parameters: OfferParameters, backend: Backend) -> int:
        """Offer a device; returns its key. No device that is there may have the same identity (`offered`)."""
        assert not self.server.offered(parameters.identity), parameters
        self._last_key += 1
        key = self._last_key
        self._devices[key] = _Device(parameters, backend)
        self._take(self.server.offer(key, parameters))
        return key

    def remove(self, key: int) -> None:
        """Take a device away, at any moment, with its sub-channels; then its back end's requests end."""
        relid = self.server.relid_of(key)
        generation = self.server.generation(relid)
        self._take(self.server.revoke(key))
        held = self._points.armed[_STREAM_CLOSED] and self._points.hold(
            _STREAM_CLOSED, relid, lambda: self._stream_closed(relid, generation)
        )
        if not held:
            self._stream_closed(relid, generation)

    def _stream_closed(self, relid: int, generation: int) -> None:
        """The requests of a device's back end have ended: if it is offered still, take it back.

        That is how a device goes whose back end went first. Of one that was taken back before, this is old news, and a
        newcomer may have its relid: so the device is named by relid and generation. By the relid alone (races.md A8) is
        wrong on purpose.
        """
        if self._fix.revoke_seq and self.server.generation(relid) != generation:
            return
        key = self.server.key_of(relid)
        if key:
            self._meant[relid] = generation
            self._take(self.server.revoke(key))
            self._meant.pop(relid, None)

    def rescind_again(self, relid: int) -> None:
        """Say once more that a relid was taken back, as a host that repeats itself does (races.md A6)."""
        self._record(E_FAULT_HIT, FaultKind.HOST_DUP_RESCIND, relid, 0, 1)  # it was told to be wrong
        self._take(self.server.rescind_again(relid))

    def forget_outgoing(self) -> None:
        """Another guest is here: drop what was to be sent to the one before."""
        self._outgoing.clear()

    def guest_gone(self, how: Left = Left.DIED) -> None:
        """The guest is gone without UNLOAD: disconnect, and drop what was to be sent to it."""
        self.forget_outgoing()
        before = self.disconnects
        self._take(self.server.reset())
        if self.disconnects != before:  # otherwise it had unloaded, or never connected
            self.left = how

    def backends(self) -> dict[int, Backend]:
        """Return the devices that are there, by key."""
        return {key: device.backend for key, device in self._devices.items()}

    def offered(self) -> dict[int, OfferParameters]:
        """Return what each device that is there was offered as, by key."""
        return {key: device.parameters for key, device in self._devices.items()}

    def channel(self, key: int) -> HostChannel | None:
        """Return a device's open channel."""
        return self._devices[key].channel

    def run_beside(self, key: int, body: TaskBody) -> None:
        """Run `body` beside a device's task, on its open channel, until that is closed; instead of one before it."""
        device = self._devices[key]
        assert device.channel is not None
        if device.beside is not None:
            device.beside.close()
        name = f"{device.backend.name}.{device.channel.relid}.beside"
        device.beside = self._tasks.task(name, self._run(name, device.channel, body))

    def close(self) -> None:
        """The machine stops: end every task and give the rings' memory back."""
        for device in self._devices.values():
            self._stop(device)

    # -- effects ------------------------------------------------------------------------------------

    def _take(self, effects: Iterable[Effect]) -> None:
        """Carry out effects, and those that follow, in their order; while that goes on, only note them."""
        self._effects.extend(effects)
        if self._carrying_out:
            return
        self._carrying_out = True
        try:
            while self._effects:
                self._carry_out(self._effects.popleft())
        finally:
            self._carrying_out = False

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SendMessage():
                self._send(effect)
            case MapGpadl():
                self._map_gpadl(effect)
            case UnmapGpadl(key, gpadl):
                del self._devices[key].gpadls[gpadl]
                self._record(E_GPADL_DROP, self._devices[key].relid, gpadl)
                self._answer(key, partial(self.server.gpadl_torn_down, key, gpadl))
            case BindEvent():
                self._bind(effect)
            case UnbindEvent(key):
                self._unbind(self._devices[key])
            case RetargetEvent():
                self._retarget(effect)
            case OpenDoorbell(key, connection_id):
                if self._fix.port_before_notify:
                    self._open_doorbell(key, connection_id)
                else:
                    self._late_doorbells[key] = connection_id
            case CloseDoorbell(key, connection_id):
                self._close_doorbell(key, connection_id)
            case OpenDevice():
                self._open(effect)
            case CloseDevice(key):
                self._close(key)
            case DropDevice(key):
                self._stop(self._devices.pop(key))
            case ConnectSocket(endpoint_id, service_id):
                # Nobody listens: no device of ours serves sockets.
                self._take(self.server.connect_refused(endpoint_id, service_id))
            case Refused():
                self.refusals.add(effect)
            case Connected():
                self.connects += 1
                self._interrupt_page = self._shared_page(effect.interrupt_page)
            case Disconnected(replaced):
                if not replaced:
                    self.disconnects += 1
                    self.left = Left.UNLOADED
                self._interrupt_page = None
            case MonitorPages():
                pass  # no offer of ours asks for monitored notification
            case _:
                assert_never(effect)

    def _send(self, effect: SendMessage) -> None:
        """Post a message, behind those that wait."""
        if self._trace is not None:
            self._record_message(effect.message)
        if self._outgoing or not self._partition.post_message(effect.vp_index, effect.sint, effect.message.pack()):
            self._outgoing.append((effect, self.cause))

    def _map_gpadl(self, effect: MapGpadl) -> None:
        """Make sure that the guest's pages can be touched, now and later."""
        gpadl = Gpadl(effect.ranges)
        runs = list(_page_runs(effect.ranges))
        try:
            for gpa, length in runs:
                if not self._memory.is_there(gpa, length):
                    self._memory.reserve(gpa, length)
                    self.likely = (gpa + length, length)
        except (ProtocolViolation, OutOfMemory) as fault:
            self._refuse(fault, f"GPADL {effect.gpadl:#x} of channel {effect.relid}")
            self._answer(effect.key, partial(self.server.gpadl_refused, effect.key, effect.gpadl))
            return
        device = self._devices[effect.key]
        device.relid = effect.relid
        device.gpadls[effect.gpadl] = gpadl
        if self._trace is not None:
            pages = sum(len(one.pfns) for one in effect.ranges)
            self._trace.record(E_GPADL_ADD, effect.relid, effect.gpadl, pages, _first_pfn(runs))
        self._answer(effect.key, partial(self.server.gpadl_accepted, effect.key, effect.gpadl))

    def reserve_ahead(self) -> None:
        """Make the pages exist that the next GPADL is likely to have: for whoever has nothing else to do.

        A guest takes the rings of a device behind those of the one before, and waits while its pages are reserved:
        40 us for two rings of 64 KiB, next to nothing where they are there. As much again as the last run, if that was
        no more than `MOST_AHEAD`; nothing where less than `ROOM_AHEAD` is free.
        """
        (gpa, length), self.likely = self.likely, (0, 0)
        if length <= MOST_AHEAD and gpa + length <= self._memory.size and self._memory.room() >= ROOM_AHEAD:
            with suppress(OutOfMemory):
                self._memory.reserve(gpa, length)

    def _answer(self, key: int, tell: Callable[[], Iterable[Effect]]) -> None:
        """A device has done what the server asked of it, and says so; held meanwhile, it may be gone by then."""

        def answer() -> None:
            if key in self._devices:
                self._take(tell())

        if not self._points.armed[_BEFORE_ANSWER] or not self._points.hold(
            _BEFORE_ANSWER, self.server.relid_of(key), answer
        ):
            answer()

    def _retarget(self, effect: RetargetEvent) -> None:
        event = self._devices[effect.key].event
        assert event is not None
        event.retarget(effect.target_vp)
        self._record(E_TARGET_CHANGE, effect.relid, effect.target_vp)
        self._answer(effect.key, partial(self.server.event_retargeted, effect.key))

    # -- signals ------------------------------------------------------------------------------------

    def _bind(self, effect: BindEvent) -> None:
        event = self._partition.bind_event(effect.target_vp, effect.sint, effect.flag)
        if effect.shared:
            event = SharedEvent(event, self._interrupt_page, effect.relid)
        self._devices[effect.key].event = event

    def _open_doorbell(self, key: int, connection_id: int) -> None:
        """Run the device at each signal; on the doorbell of 0.13 a bit of the interrupt page says which device."""
        if connection_id != SHARED_DOORBELL_CONNECTION_ID:
            wake = self._devices[key].wake
            if self.throttle is not None:
                wake = partial(self._count_signal, self.throttle, key)
            self._partition.open_doorbell(connection_id, wake)
            return
        if not self._sharing:
            self._partition.open_doorbell(connection_id, self._shared_doorbell)
        self._sharing[self._devices[key].relid] = key

    def _count_signal(self, throttle: Throttle, key: int) -> None:
        """The doorbell of a device, in a machine that counts."""
        device = self._devices[key]
        if device.channel is not None:
            throttle.signalled(device.channel)
        device.wake()

    def _close_doorbell(self, key: int, connection_id: int) -> None:
        if connection_id == SHARED_DOORBELL_CONNECTION_ID:
            self._sharing = {relid: other for relid, other in self._sharing.items() if other != key}
            if self._sharing:
                return
        self._partition.close_doorbell(connection_id)

    def _shared_doorbell(self) -> None:
        """Wake the devices whose bits are set; all of them for a guest that gave no page to set bits in."""
        page = self._interrupt_page
        for relid in list(self._sharing) if page is None else page.take():
            # A bit may also come too late, behind a close, and a hostile guest sets what it likes.
            if relid in self._sharing:
                self._devices[self._sharing[relid]].wake()
            else:
                self.refusals.ignored["interrupt-page-bit"] += 1

    def _shared_page(self, gpa: int) -> InterruptPage | None:
        """The interrupt page of a guest below 2.4; None without one, or when there is no memory behind it."""
        if not gpa:
            return None
        try:
            return InterruptPage(self._memory, gpa)
        except OutOfMemory as fault:
            self._refuse(fault, f"interrupt page {gpa:#x}")
            return None

    # -- devices ------------------------------------------------------------------------------------

    def _open(self, effect: OpenDevice) -> None:
        """Map both rings, attach to them, start the device's task."""
        device = self._devices[effect.key]
        try:
            channel = self._attach(device, effect)
        except ProtocolViolation as fault:
            self._refuse(fault, f"OPENCHANNEL of {effect.relid}")
            self._take(self.server.device_refused(effect.key))
            return
        try:
            body = _a_task(device.backend.open(channel))
        except DeviceRefused as refused:
            channel.close()
            self._take(self.server.device_refused(effect.key, refused.status))
            return
        except Exception as error:
            channel.close()
            self.backend_error(device.backend.name, f"open of channel {effect.relid}", error)
            self._take(self.server.device_refused(effect.key))
            return
        device.channel = channel
        # It runs once without being rung for: what the guest wrote before is found then.
        name = device.backend.name
        device.task = self._tasks.task(f"{name}.{effect.relid}", self._run(name, channel, body))
        opened = partial(self._opened, effect.key)
        if not self._points.armed[_BEFORE_OPEN_RESULT] or not self._points.hold(
            _BEFORE_OPEN_RESULT, effect.relid, opened
        ):
            opened()

    def _opened(self, key: int) -> None:
        """The device is open: say so to the guest."""
        if key not in self._devices:
            return
        self._take(self.server.device_opened(key))
        listens = partial(self._listen_late, key)
        relid = self.server.relid_of(key)
        if not self._points.armed[_OPEN_DONE] or not self._points.hold(_OPEN_DONE, relid, listens):
            listens()

    def _listen_late(self, key: int) -> None:
        """Wrong on purpose (races.md C1): the guest may have rung before there is anything to ring."""
        connection_id = self._late_doorbells.pop(key, None)
        if connection_id is not None and key in self._devices:
            self._open_doorbell(key, connection_id)

    def _attach(self, device: _Device, effect: OpenDevice) -> HostChannel:
        """Check what the guest left in the rings' control pages; they are mapped when the first packet comes."""
        key, relid, event, instrument = effect.key, effect.relid, device.event, self._instrument
        rings = UnmappedRings(
            self._memory,
            device.gpadls[effect.ring_gpadl].page_pfns(),
            effect.downstream_page_offset,
            self._budget,
            None if instrument is None else lambda side, memory: instrument(relid, side, memory),
        )
        channel = self._channel_class(
            key=key,
            relid=relid,
            sub_channel_index=effect.sub_channel_index,
            userdata=effect.userdata,
            rings=rings,
            signal=_nobody if event is None else event.signal,
            violation=lambda violation: self.refusals.add_violation(violation, f"channel {relid}"),
            closed=lambda: self._closed(key),
            offer_subchannels=lambda indices: self.offer_subchannels(key, indices),
            subchannel_room=lambda: self.server.subchannel_room,
        )
        channel.attach()
        self._record(E_MAP, relid, effect.ring_gpadl, effect.ring_pages)
        return channel

    def offer_subchannels(self, key: int, indices: Iterable[int]) -> None:
        """Offer sub-channels of an open primary, with its back end, as far as there are relids for them.

        They go with the primary: the server revokes them when that is closed or revoked.
        """
        primary = self._devices[key]
        assert primary.channel is not None and not primary.parameters.sub_channel_index, primary.parameters
        for index in indices:
            parameters = replace(primary.parameters, sub_channel_index=index)
            if self.server.subchannel_room and not self.server.offered(parameters.identity):
                self.add(parameters, primary.backend)

    def _run(self, name: str, channel: HostChannel, body: TaskBody) -> AnyBody:
        """Run a device's task; a guest that breaks its rings, or an author's mistake, stops this channel's only."""
        try:
            yield from body
            # Closed it does not come here. It may be meant, but the guest has nobody who reads its packets now.
            text = f"{name}: its generator has ended; nobody serves channel {channel.relid} until the guest closes it"
            self.refusals.add(Refused("backend-ended", text, legal=True))
        except ProtocolViolation as violation:
            channel.violation(violation)
        except Exception as error:
            self.backend_error(name, f"channel {channel.relid}", error)

    def backend_error(self, name: str, where: str, error: BaseException) -> None:
        """Count what a back end let out, and say it: the first of them, the tenth, the hundredth, …"""
        self.refusals.add(Refused("backend-error", f"{name}: {where}: {type(error).__name__}: {error}"))
        count = self.refusals.refused["backend-error"]
        if self._log is not None and str(count).strip("0") == "1":
            often = f" ({count} back-end errors so far)" if count > 1 else ""
            self._log(f"back end {name}, {where}{often}:\n{''.join(traceback.format_exception(error)).rstrip()}")

    def _backend_close(self, device: _Device, channel: HostChannel) -> bool:
        """`Backend.close`; one that raises has closed."""
        try:
            close: Callable[[HostChannel], object] = device.backend.close  # an author's may say nothing
            return close(channel) is not False
        except Exception as error:
            self.backend_error(device.backend.name, f"close of channel {channel.relid}", error)
            return True

    def _close(self, key: int) -> None:
        """Stop a device's task, and its channel once the back end has ended."""
        device = self._devices[key]
        assert device.channel is not None and device.task is not None
        device.task.close()
        device.task = None
        if self._backend_close(device, device.channel):
            self._closed(key)

    def _closed(self, key: int) -> None:
        """The back end is done with a channel that was closed; for a device that is gone it is too late."""
        device = self._devices.get(key)
        if device is None or device.channel is None or device.task is not None:
            return
        if self.tells_left_over:
            self._tell_left_over(device.channel)
        self._give_back(device)
        self._answer(key, partial(self.server.device_closed, key))

    def tell_left_over(self) -> None:
        """The machine ends while a guest is there: tell of the packets in its rings."""
        for device in self._devices.values():
            if device.channel is not None:
                self._tell_left_over(device.channel)

    def _tell_left_over(self, channel: HostChannel) -> None:
        for refused in left_in_rings(channel.relid, *channel.left_over()):
            self.refusals.add(refused)

    def _stop(self, device: _Device) -> None:
        """A device is gone: whatever it was doing ends here."""
        if device.task is not None:
            device.task.close()
            device.task = None
            assert device.channel is not None
            self._backend_close(device, device.channel)
        self._unbind(device)
        self._give_back(device)
        device.gpadls.clear()

    def _give_back(self, device: _Device) -> None:
        if device.beside is not None:
            device.beside.close()
            device.beside = None
        if device.channel is not None:
            self._record(E_UNMAP, device.channel.relid)
            device.channel.close()
            device.channel = None

    def _unbind(self, device: _Device) -> None:
        if device.event is not None:
            device.event.close()
            device.event = None

    # -- the rest -----------------------------------------------------------------------------------

    def _refuse(self, fault: ProtocolViolation | OutOfMemory, where: str) -> None:
        if isinstance(fault, ProtocolViolation):
            self.refusals.add_violation(fault, where)
        else:
            self.refusals.add(Refused("out-of-memory", f"{where}: {fault}"))

    def _record(self, event: int, *arguments: int) -> None:
        if self._trace is not None:
            self._trace.record(event, *arguments)

    def _record_message(self, message: Message) -> None:
        if isinstance(message, OfferChannel):
            relid = message.child_relid
            generation = self.server.generation(relid)
            self._record(E_OFFER, relid, generation, message.connection_id, message.sub_channel_index)
        elif isinstance(message, RescindChannelOffer):
            relid = message.child_relid
            self._record(E_RESCIND, relid, self._meant.pop(relid, self.server.generation(relid)))


def _a_task(body: object) -> TaskBody:
    """What a back end's `open` returned, if that can be a task; TypeError in words for its author otherwise."""
    if not isinstance(body, Generator):
        raise TypeError(f"it returned {body!r}, which is no generator; `return` what serves the channel")
    return body


def _page_runs(ranges: tuple[GpaRange, ...]) -> Iterator[tuple[int, int]]:
    """The pages of these ranges as (gpa, length), neighbours in one; an honest guest's are all neighbours."""
    for one in ranges:
        first, count = one.pfns[0], len(one.pfns)
        if one.pfns == tuple(range(first, first + count)):
            yield first << PAGE_SHIFT, count << PAGE_SHIFT
        else:
            yield from coalesce([pfn << PAGE_SHIFT for pfn in one.pfns])


def _first_pfn(runs: list[tuple[int, int]]) -> int:
    """The first page of these (gpa, length) where all of them are neighbours, else 0."""
    neighbours = all(sum(run) == following[0] for run, following in pairwise(runs))
    return runs[0][0] >> PAGE_SHIFT if neighbours else 0


def _nobody() -> None:
    """The guest polls: there is nobody to signal."""
