"""The control plane: the VMBus server's ports, the task that feeds it, and what it publishes to the mirror.

One task reads what the guest posted and hands it to the bus, 16 messages a turn, and only while nothing waits
to be sent: a guest that does not take its messages fills its own ports and is told INSUFFICIENT_BUFFERS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emu.control import Control
from emu.errors import ProtocolViolation
from emu.host_tables import SINTS, HostPartition, HostTables, HostTimer, HostVp
from emu.mirror import Left, Mirror
from emu.syncpoint import Point
from emu.tracing import E_MESSAGE_DONE, E_MESSAGE_TAKE, Recorder
from emu.wire.hypercalls import HvStatus
from emu.wire.message_relid import relid_of
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, VMBUS_MESSAGE_SINT
from hostproc.bus import Bus
from hostproc.event_ports import BindInterrupt, EventPort, HostEventPort
from hostproc.loop import AGAIN, WAIT, Loop, TaskBody
from hostproc.partition import Partition
from hostproc.points import NoPoints
from hostproc.ports import HostMessagePort, MessagePort
from hostproc.posted import PostedMessage
from hostproc.protocol.versions import message_connections
from hostproc.synthetic_timers import NEVER, SyntheticTimer

_ON_MESSAGE: Final = int(Point.HOST_ON_MESSAGE)
GUEST_PORT_ID: Final = 1
MESSAGES_A_TURN: Final = 16


class GuestEvent:
    """An event flag of the guest as a device signals it (`BoundEvent` of the bus)."""

    __slots__ = ("_plane", "_port", "signal")

    def __init__(self, plane: GuestPorts, port: EventPort) -> None:
        self._plane = plane
        self._port: EventPort | None = port
        self.signal: Callable[[], object] = port.signal
        """Sets the flag, and interrupts if it was clear; a channel has kept it, so the port itself is closed."""

    def retarget(self, vp_index: int) -> None:
        """Set it on another VP from now on."""
        if self._port is not None:
            self._port.position = self._plane.position(vp_index)

    def close(self) -> None:
        """Signal nobody any more."""
        if self._port is not None:
            self._port.close()
        self._port = None


class GuestPorts:
    """The partition as the bus uses it (`BusPartition`): messages and events to the guest, doorbells from it."""

    def __init__(self, partition: Partition, vp_indices: list[int], on_buffer_free: Callable[[], None]) -> None:
        self._partition = partition
        self._positions = {vp_index: position for position, vp_index in enumerate(vp_indices)}
        self.port = MessagePort(partition.queues, GUEST_PORT_ID, 0, VMBUS_MESSAGE_SINT)
        self.port.on_buffer_free = on_buffer_free
        self._serial = 0
        self.event_interrupt: Callable[[int, int], Callable[[int, int], None]] | None = None
        """Gives what requests the interrupts of an event (its SINT and flag), where that may be late."""
        self.bind_interrupt: BindInterrupt | None = None
        """A shorter way to the partition's `request_interrupt`, if there is one."""
        self.cause: Callable[[], int] = _no_cause
        """Serial of the guest's message that what is posted now answers; for the trace."""

    def position(self, vp_index: int) -> int:
        """Page position of a VP index that exists."""
        return self._positions[vp_index]

    def post_message(self, vp_index: int, sint: int, payload: bytes) -> bool:
        """Post a channel message, with the next serial beside it; False when all 16 buffers are taken."""
        self.port.retarget(self._positions[vp_index], sint)
        posted = self.port.post(HVMSG_CHANNEL_MESSAGE, payload, self._serial + 1, self.cause()) == HvStatus.SUCCESS
        self._serial += posted
        return posted

    def bind_event(self, vp_index: int, sint: int, flag: int) -> GuestEvent:
        """Make an event port for this flag."""
        partition, request = self._partition, self._partition.request_interrupt
        bind = self.bind_interrupt
        if self.event_interrupt is not None:
            request, bind = self.event_interrupt(sint, flag), None
        position = self._positions[vp_index]
        port = EventPort(partition.synics, request, position, sint, flag, trace=partition.trace, bind_interrupt=bind)
        return GuestEvent(self, port)

    def open_doorbell(self, connection_id: int, wake: Callable[[], None]) -> None:
        """Call `wake` for each signal on `connection_id`."""
        self._partition.connections.events[connection_id] = HostEventPort(wake)

    def close_doorbell(self, connection_id: int) -> None:
        """Undo `open_doorbell`."""
        self._partition.connections.events.pop(connection_id, None)


def _no_cause() -> int:
    return 0


class ControlPlane:
    """Feeds the bus and publishes what the host knows."""

    def __init__(
        self,
        partition: Partition,
        guest_ports: GuestPorts,
        bus: Bus,
        loop: Loop,
        control: Control,
        max_version: int,
        points: NoPoints | None = None,
    ) -> None:
        self._points = points or NoPoints()
        self._holding = False
        self._partition = partition
        self._guest_ports = guest_ports
        self._bus = bus
        self._control = control
        self._mirror = Mirror(control)
        self._published: tuple[dict[str, int], ...] = ({}, {}, {})
        self._tables = HostTables(control)
        self._shown_partition: tuple[int | tuple[int, ...], ...] = ()
        self._waited = False
        self._head: tuple[int, ...] = ()
        self._connects = 0
        self._seen = (0, 0, 0)
        """Version, and the most offers and open channels at a time, of the newest connection (`MirrorHead`)."""
        self.attached_pid = 0
        self.delivered = 0
        self._task = loop.task("control", self._run())
        self._ports = [HostMessagePort(number, self._task.wake) for number in message_connections(max_version)]
        for port in self._ports:
            partition.connections.messages[port.connection_id] = port

    @property
    def guest_port(self) -> MessagePort:
        """The port that all channel messages to the guest go through."""
        return self._guest_ports.port

    def wake(self) -> None:
        """A buffer towards the guest is free again."""
        self._task.wake()

    def forget_messages(self) -> None:
        """The guest is gone: what it had posted is nobody's."""
        for port in self._ports:
            port.queue.clear()

    def _run(self) -> TaskBody:
        bus = self._bus
        while True:
            for _ in range(MESSAGES_A_TURN):
                if not bus.ready:
                    bus.flush()
                message = self._next() if bus.ready and not self._holding else None
                if message is None:
                    yield WAIT
                    break
                if not self._points.armed[_ON_MESSAGE] or not self._hold(message):
                    self._deliver(message)
            else:
                yield AGAIN

    def _next(self) -> PostedMessage | None:
        for port in self._ports:
            if port.queue:
                return port.queue.popleft()
        return None

    def _hold(self, message: PostedMessage) -> bool:
        """Whether a message is held at its sync point; those behind it wait until it has been handled."""

        def rest() -> None:
            self._holding = False
            self._deliver(message)
            self._task.wake()

        self._holding = self._points.hold(_ON_MESSAGE, relid_of(message.payload), rest)
        return self._holding

    def _deliver(self, message: PostedMessage) -> None:
        self.delivered += 1
        if self._partition.trace is None:
            self._take(message)
        else:
            self._take_recorded(self._partition.trace, message)
        self._see()

    def _take(self, message: PostedMessage) -> None:
        if message.message_type == HVMSG_CHANNEL_MESSAGE:
            self._bus.deliver(message.payload, message.connection_id)
            return
        text = f"a message of type {message.message_type:#x} on connection {message.connection_id}"
        violation = ProtocolViolation(text, rule="message-type", field="message_type", value=message.message_type)
        self._bus.refusals.add_violation(violation, "post")

    def _see(self) -> None:
        """Note how far the connection has come, before a guest that is quick has taken it back."""
        if self._connects != self._bus.connects:
            self._connects = self._bus.connects
            self._seen = (0, 0, 0)
        version, offers, opened, _gpadls = self._bus.server.head()
        if version:
            self._seen = (version, max(offers, self._seen[1]), max(opened, self._seen[2]))

    def _take_recorded(self, trace: Recorder, message: PostedMessage) -> None:
        """Say what is taken, and who caused what is posted until it is done."""
        payload, msgtype = message.payload, int.from_bytes(message.payload[:4], "little")
        trace.record(E_MESSAGE_TAKE, msgtype, message.serial, len(payload), relid_of(payload))
        self._bus.cause = message.serial
        self._take(message)
        self._bus.cause = 0
        trace.record(E_MESSAGE_DONE, msgtype, message.serial)

    # -- the mirror ---------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write what changed since the last time into the mirror; cheap when nothing did."""
        server = self._bus.server
        for relid, channel in server.take_changed().items():
            if channel is None:
                self._mirror.clear_channel(relid, server.generation(relid))
            else:
                self._mirror.write_channel(channel)
            self._tables.write_gpadls(relid, server.gpadls_of(relid))
        self._see()
        waiting = self._partition.queues.total_waiting
        self._publish_partition(waits=waiting > 0)
        head = (
            *server.head(),
            waiting,
            self._bus.outgoing,
            sum(len(port.queue) for port in self._ports),
            self.attached_pid,
            self._bus.disconnects,
            *self._seen,
            self._bus.left,
        )
        if head != self._head:
            self._head = head
            self._mirror.write_head(
                version=head[0],
                offers=head[1],
                open_channels=head[2],
                gpadls=head[3],
                to_slots=head[4],
                outgoing=head[5],
                incoming=head[6],
                attached_pid=head[7],
                disconnects=head[8],
                seen=head[9:12],
                left=Left(head[12]),
            )
        self._publish_refusals()

    def publish_traffic(self) -> bool:
        """While somebody looks: what went through each channel; False when nobody does."""
        if not self._control.watched:
            return False
        for relid, traffic in self._bus.traffic():
            self._tables.write_traffic(relid, traffic)
        self._tables.stamp_traffic(self._control.clock.now())
        return True

    def _publish_refusals(self) -> None:
        refusals, partition = self._bus.refusals, self._partition
        counts = refusals.refused, refusals.ignored, partition.ignored
        # As plain dicts: a Counter's own comparison and sum are slow, and there is hardly ever anything new.
        if all(dict.__eq__(now, before) for now, before in zip(counts, self._published, strict=True)):
            return
        self._published = tuple(dict(now) for now in counts)
        self._control.store_refusals(dict(counts[0]), refusals.records(), dict(counts[1] + counts[2]))

    def _publish_partition(self, *, waits: bool) -> None:
        """Registers that were written, and every VP's queues while any message waits or has just waited."""
        partition, queues = self._partition, self._partition.queues
        changed, partition.changed_vps = partition.changed_vps, set()
        for position in range(len(partition.synics)) if waits or self._waited else changed:
            synic = partition.synics[position]
            waiting = tuple(queues.waiting(position, sint) for sint in range(SINTS))
            registers = synic.scontrol, synic.simp.register, synic.siefp.register
            timers = tuple(map(_shown_timer, partition.timers.of_vp(position)))
            self._tables.write_vp(position, HostVp(*registers, tuple(synic.sint), waiting, timers))
        self._waited = waits
        port = self._guest_ports.port
        words = partition.guest_os_id, partition.hypercall_register, port.position, port.sint, port.in_use
        unread = tuple(len(one.queue) for one in self._ports)
        if (*words, unread) != self._shown_partition:
            self._shown_partition = (*words, unread)
            ports = {one.connection_id: count for one, count in zip(self._ports, unread, strict=True)}
            self._tables.write_partition(HostPartition(*words, ports))


def _shown_timer(timer: SyntheticTimer) -> HostTimer:
    """A synthetic timer as the mirror has it."""
    expiration_time = 0 if timer.expiration_time == NEVER else timer.expiration_time % (1 << 64)
    return HostTimer(timer.config, timer.count, expiration_time)
