"""The host of a `World`: it answers as a plain host would, unless the test says otherwise.

It knows nothing of the host's own server: it packs and parses messages, keeps the list of what the guest
posted, maps the rings that the guest opens, and echoes packets. `hold(type)` keeps the answers to one type of
message back until `release(type)`; `answer[type]` replaces what is answered.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from emu.doorbells import DoorbellServer
from emu.errors import ProtocolViolation
from emu.gpadl import map_ring
from emu.machine import Machine
from emu.ring import Packet, RingConsumer, RingProducer
from emu.wire.device_classes import ECHO
from emu.wire.gpa_range import GpaRange, parse_gpa_ranges
from emu.wire.hypercalls import HvStatus
from emu.wire.messages import (
    AllOffersDelivered,
    CloseChannel,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    InitiateContact,
    Message,
    MessageType,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Unload,
    UnloadResponse,
    VersionResponse,
    parse,
)
from emu.wire.packets import COMPLETION_REQUESTED, VM_PKT_COMP, VM_PKT_DATA_INBAND
from emu.wire.synic import HVMSG_CHANNEL_MESSAGE, VMBUS_MESSAGE_SINT
from emu.wire.versions import VERSION_WIN8, VERSION_WIN8_1, VERSION_WIN10_V5, VERSION_WIN10_V5_3
from hostproc.event_ports import EventPort
from hostproc.partition import Partition
from hostproc.ports import HostMessagePort, MessagePort

EVENT_CONNECTION = 0x2000
MSG_CONN_ID = 4
Answer = Callable[[Message], list[Message]]
PacketAnswer = Callable[[Packet], list[Packet]]
"""What comes back for a packet, as (type, flags, trans_id, payload)."""


@dataclass
class HostChannel:
    """An offered channel as the host knows it."""

    offer: OfferChannel
    revoked: bool = False
    released: int = 0
    opened: OpenChannel | None = None
    consumer: RingConsumer | None = None
    producer: RingProducer | None = None
    event: EventPort | None = None
    echo: bool = True
    opens: int = 0


@dataclass
class Assembly:
    """A GPADL on its way in, then the pages of it."""

    child_relid: int
    wanted: int
    data: bytes
    ranges: list[GpaRange] = field(default_factory=list)

    def complete(self) -> bool:
        if len(self.data) < self.wanted:
            return False
        self.ranges = list(parse_gpa_ranges(self.data[: self.wanted], 1)[0])
        return True


class ScriptPort(HostMessagePort):
    """A message port whose next statuses a test may set."""

    def __init__(self, connection_id: int, host: ScriptedHost) -> None:
        super().__init__(connection_id, lambda: None)
        self._host = host

    def post(self, message_type: int, payload: bytes, serial: int = 0) -> HvStatus:
        if self._host.statuses:
            status = self._host.statuses.popleft()
            if status != HvStatus.SUCCESS:
                return status
        if self._host.always is not None:
            return self._host.always
        self._host.inbox.append((self.connection_id, payload))
        return HvStatus.SUCCESS


class ScriptedHost:
    """See the module's docstring. `posted` is every message of the guest's, `released` the relids of 13."""

    def __init__(self, partition: Partition, machine: Machine) -> None:
        self.partition = partition
        self.machine = machine
        self.memory = partition.memory
        self.doorbells = DoorbellServer(machine.doorbells.view)
        self.inbox: deque[tuple[int, bytes]] = deque()
        self.outbox: deque[tuple[int, bytes]] = deque()
        self.port = MessagePort(partition.queues, 1, 0, VMBUS_MESSAGE_SINT)
        self.posted: list[Message] = []
        self.connections: list[int] = []
        self.statuses: deque[HvStatus] = deque()
        self.always: HvStatus | None = None
        self.versions: set[int] = {VERSION_WIN10_V5_3}
        self.msg_conn_id = MSG_CONN_ID
        self.channels: dict[int, HostChannel] = {}
        self.offered: list[OfferChannel] = []
        self.gpadls: dict[int, Assembly] = {}
        self.target_position = 0
        self.contact: InitiateContact | None = None
        self.unloaded = False
        self.on_packet: dict[int, PacketAnswer] = {}
        self.answer: dict[MessageType, Answer] = {}
        self._held: dict[MessageType, list[Message]] = {}
        self._serial = 0
        for connection_id in (1, MSG_CONN_ID):
            partition.connections.messages[connection_id] = ScriptPort(connection_id, self)

    # -- what a test says -----------------------------------------------------------------------------------

    def hold(self, *types: MessageType) -> None:
        """Keep messages of these types unanswered until `release`."""
        for msgtype in types:
            self._held.setdefault(msgtype, [])

    def release(self, msgtype: MessageType) -> None:
        """Answer what was held, and what comes from now on."""
        for message in self._held.pop(msgtype):
            self._answer(message)

    def device(
        self,
        relid: int,
        instance: int | None = None,
        *,
        index: int = 0,
        class_id: UUID = ECHO.guid,
        early: bool = False,
    ) -> OfferChannel:
        """A device, or a sub-channel of one; `early`: it is offered when the guest asks, else now."""
        offer = OfferChannel(
            if_type=class_id,
            if_instance=UUID(int=relid if instance is None else instance),
            sub_channel_index=index,
            child_relid=relid,
            connection_id=EVENT_CONNECTION | relid & 0x7FF,
        )
        if early:
            self.offered.append(offer)
        else:
            self.offer(offer)
        return offer

    def offer(self, offer: OfferChannel) -> None:
        """Send an offer."""
        self.channels.setdefault(offer.child_relid, HostChannel(offer))
        self.send(offer)

    def rescind(self, relid: int) -> None:
        """Take a channel back: from now on OPEN and CLOSE for it are ignored."""
        if relid in self.channels:
            self.channels[relid].revoked = True
        self.send(RescindChannelOffer(relid))

    def send(self, message: Message | bytes, *, position: int | None = None) -> None:
        """Put a message on its way to the guest's slot."""
        payload = message if isinstance(message, bytes) else message.pack()
        self.outbox.append((self.target_position if position is None else position, payload))

    def signal(self, relid: int) -> None:
        """Set the channel's event flag; below 2.4 its bit in the interrupt page, then flag 0."""
        event = self.channels[relid].event
        assert event is not None
        if event.base_flag == 0:
            self.set_page_bit(relid)
        event.signal()

    def set_page_bit(self, relid: int) -> None:
        """Set a bit in the host's half of the interrupt page."""
        assert self.contact is not None
        word = self.contact.interrupt_page + 8 * (relid >> 6)
        self.memory.atomics.cell_u64(word).fetch_or(1 << (relid & 63))

    def take_page_bits(self) -> list[int]:
        """Relids whose bits the guest has set in its half of the interrupt page; they are cleared."""
        assert self.contact is not None
        half = self.contact.interrupt_page + 2048
        bits = int.from_bytes(self.memory.read(half, 2048), "little")
        self.memory.write(half, bytes(2048))
        return [relid for relid in range(2048) if bits >> relid & 1]

    def write(self, relid: int, *payloads: bytes, trans_id: int = 0, signal: bool = True) -> None:
        """Write packets into the guest's inbound ring."""
        producer = self.channels[relid].producer
        assert producer is not None
        written, must = producer.write_many(list(payloads), trans_id)
        assert written == len(payloads)
        if must and signal:
            self.signal(relid)

    def types(self) -> list[MessageType]:
        """Types of all that the guest posted, in order."""
        return [message.TYPE for message in self.posted]

    @property
    def released(self) -> list[int]:
        """Relids of every RELID_RELEASED, in order."""
        return [message.child_relid for message in self.posted if isinstance(message, RelidReleased)]

    # -- what it does by itself -----------------------------------------------------------------------------

    def step(self) -> bool:
        """Take a message, send one, look at the doorbells; whether there was anything to do."""
        moved = False
        if self.inbox:
            connection_id, payload = self.inbox.popleft()
            message = parse(payload)
            self.connections.append(connection_id)
            self.posted.append(message)
            if message.TYPE in self._held:
                self._held[message.TYPE].append(message)
            else:
                self._answer(message)
            moved = True
        while self.outbox:
            position, payload = self.outbox[0]
            self.port.retarget(position, VMBUS_MESSAGE_SINT)
            self._serial += 1
            if self.port.post(HVMSG_CHANNEL_MESSAGE, payload, self._serial):
                break
            self.outbox.popleft()
            moved = True
        for connection_id in self.doorbells.take():
            moved = True
            for relid in self.take_page_bits() if connection_id == 2 else [connection_id & 0x7FF]:
                self._serve(relid)
        return moved

    def _answer(self, message: Message) -> None:
        replaced = self.answer.get(message.TYPE)
        for reply in replaced(message) if replaced else self._default(message):
            self.send(reply)

    def _default(self, message: Message) -> list[Message]:
        match message:
            case InitiateContact():
                return self._contact(message)
            case RequestOffers():
                for offer in self.offered:
                    self.channels[offer.child_relid] = HostChannel(offer)
                return [*self.offered, AllOffersDelivered()]
            case GpadlHeader():
                self.gpadls[message.gpadl] = Assembly(message.child_relid, message.range_buflen, message.ranges)
                return self._assembled(message.gpadl)
            case GpadlBody():
                self.gpadls[message.gpadl].data += message.data
                return self._assembled(message.gpadl)
            case GpadlTeardown():
                del self.gpadls[message.gpadl]
                return [GpadlTorndown(message.gpadl)]
            case OpenChannel():
                return self._open(message)
            case CloseChannel():
                self._close(self.channels[message.child_relid])
            case ModifyChannel():
                return self._modify(message)
            case RelidReleased():
                self._released(message.child_relid)
            case Unload():
                for channel in self.channels.values():
                    self._close(channel)
                self.unloaded = True
                return [UnloadResponse()]
        return []

    def _contact(self, message: InitiateContact) -> list[Message]:
        vps = [self.machine.vp_index(position) for position in range(self.machine.vp_count)]
        # Before 3.0 messages go to VP 0, where this world has one.
        asked = message.target_vcpu if message.vmbus_version_requested >= VERSION_WIN8_1 or 0 not in vps else 0
        self.target_position = vps.index(asked) if asked in vps else 0
        if message.vmbus_version_requested not in self.versions:
            return [VersionResponse(0)]
        self.contact = message
        new = message.vmbus_version_requested >= VERSION_WIN10_V5
        return [VersionResponse(1, msg_conn_id=self.msg_conn_id if new else message.vmbus_version_requested)]

    def _assembled(self, gpadl: int) -> list[Message]:
        assembly = self.gpadls[gpadl]
        return [GpadlCreated(assembly.child_relid, gpadl, 0)] if assembly.complete() else []

    def _open(self, message: OpenChannel) -> list[Message]:
        channel = self.channels[message.child_relid]
        if channel.revoked:
            return []  # silently ignored, no reply ever (reference 2.6)
        channel.opens += 1
        pfns = self.gpadls[message.ringbuffer_gpadlhandle].ranges[0].pfns
        split = message.downstream_ringbuffer_pageoffset
        channel.opened = message
        channel.consumer = RingConsumer(map_ring(self.memory, pfns, 0, split))
        channel.producer = RingProducer(map_ring(self.memory, pfns, split, len(pfns) - split))
        channel.producer.announce()
        assert self.contact is not None
        shared = self.contact.vmbus_version_requested < VERSION_WIN8
        channel.event = EventPort(
            self.partition.synics,
            self.partition.request_interrupt,
            self.target_position if shared else self.machine.position_of_vp(message.target_vp),
            VMBUS_MESSAGE_SINT,
            0 if shared else message.child_relid,
        )
        return [OpenChannelResult(message.child_relid, message.openid, 0)]

    def _modify(self, message: ModifyChannel) -> list[Message]:
        channel = self.channels[message.child_relid]
        if channel.revoked or channel.event is None or channel.opened is None:
            return []  # silently ignored, as of any channel that is not open
        channel.event.position = self.machine.position_of_vp(message.target_vp)
        assert self.contact is not None
        acknowledges = self.contact.vmbus_version_requested >= VERSION_WIN10_V5_3
        return [ModifyChannelResponse(message.child_relid, 0)] if acknowledges else []

    def _close(self, channel: HostChannel) -> None:
        if channel.opened is not None:
            for ring in (channel.consumer, channel.producer):
                assert ring is not None
                ring.memory.close()
            channel.opened = channel.consumer = channel.producer = None

    def _released(self, relid: int) -> None:
        if relid in self.channels:
            channel = self.channels[relid]
            channel.released += 1
            self._close(channel)
            for gpadl in [gpadl for gpadl, one in self.gpadls.items() if one.child_relid == relid]:
                del self.gpadls[gpadl]

    def _serve(self, relid: int) -> None:
        """A doorbell: echo what is there, or answer it as `on_packet` of that relid says, as far as there is room."""
        channel = self.channels.get(relid)
        if channel is None or not channel.echo or channel.consumer is None or channel.producer is None:
            return
        signal = False
        try:
            for packet in channel.consumer.drain():
                for kind, back_flags, trans_id, payload in self.on_packet.get(relid, _echo)(packet):
                    signal |= channel.producer.write(payload, trans_id, back_flags, kind)
        except ProtocolViolation:
            return
        if channel.consumer.take_signal() or signal:
            self.signal(relid)


def _echo(packet: Packet) -> list[Packet]:
    _packet_type, flags, trans_id, payload = packet
    completes = flags & COMPLETION_REQUESTED and trans_id
    return [(VM_PKT_COMP if completes else VM_PKT_DATA_INBAND, 0, trans_id, payload)]


def counted(messages: list[Message]) -> dict[MessageType, int]:
    """How many of each type."""
    count: defaultdict[MessageType, int] = defaultdict(int)
    for message in messages:
        count[message.TYPE] += 1
    return dict(count)
