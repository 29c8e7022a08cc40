"""The VMBus channel messages, 1 to 29: a frozen value for each, one table, one parser.

A channel message is the payload of a SynIC message: a header of 8 bytes (msgtype, padding), then the body;
240 bytes at most. Fields have the kernel's names (include/linux/hyperv.h); messages that Linux does not know
have OpenVMM's. Reserved bytes are written as zero and not read.

A payload may be longer than its message: firmware guests always post 240 bytes. Where a message has a longer
form, its fields are read when the bytes are there, and `None` says that they are not; what they mean is up to
the negotiated version.

Checks that need state (relids, GPADL ranges, versions) are the server's and the client's, not the parser's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum, IntFlag
from operator import attrgetter
from struct import Struct
from types import MappingProxyType
from typing import ClassVar, Final, Self
from uuid import UUID

from emu.errors import ProtocolViolation
from emu.values import valueclass
from emu.wire.gpa_range import GPA_RANGE, PAGE_SIZE, GpaRange, pfn_count
from emu.wire.guids import GUID_SIZE, guid_from_wire, guid_to_wire
from emu.wire.versions import (
    VERSION_COPPER,
    VERSION_WIN7,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_3,
    VERSION_WS2008,
    FeatureFlags,
)

HEADER: Final = Struct("<II")
"""`vmbus_channel_message_header`: msgtype, padding."""

MAX_MESSAGE_SIZE: Final = 240
MAX_USER_DEFINED_BYTES: Final = 120
MAX_PIPE_USER_DEFINED_BYTES: Final = 116

GPADL_HEADER_PFNS: Final = 26
GPADL_BODY_PFNS: Final = 28
GPADL_MAX_PFNS: Final = 8190
"""In one range: `range_buflen` is a u16 and counts 8 bytes for the gpa_range."""
FIRST_GPADL_HANDLE: Final = 0xE1E10

NO_MONITOR: Final = 0xFF
VP_INDEX_DISABLE_INTERRUPT: Final = 0xFFFF_FFFF
"""`OpenChannel.target_vp` of a guest that polls."""

STATUS_SUCCESS: Final = 0
STATUS_UNSUCCESSFUL: Final = 0x8000_FFFF
STATUS_CONNECTION_REFUSED: Final = 0xC000_0236


class MessageType(IntEnum):
    """`vmbus_channel_message_type`, and OpenVMM's names where Linux has only a number."""

    INVALID = 0
    OFFERCHANNEL = 1
    RESCIND_CHANNELOFFER = 2
    REQUESTOFFERS = 3
    ALLOFFERS_DELIVERED = 4
    OPENCHANNEL = 5
    OPENCHANNEL_RESULT = 6
    CLOSECHANNEL = 7
    GPADL_HEADER = 8
    GPADL_BODY = 9
    GPADL_CREATED = 10
    GPADL_TEARDOWN = 11
    GPADL_TORNDOWN = 12
    RELID_RELEASED = 13
    INITIATE_CONTACT = 14
    VERSION_RESPONSE = 15
    UNLOAD = 16
    UNLOAD_RESPONSE = 17
    OPEN_RESERVED_CHANNEL = 18
    CLOSE_RESERVED_CHANNEL = 19
    CLOSE_RESERVED_RESPONSE = 20
    TL_CONNECT_REQUEST = 21
    MODIFYCHANNEL = 22
    TL_CONNECT_RESULT = 23
    MODIFYCHANNEL_RESPONSE = 24
    MODIFY_CONNECTION = 25
    MODIFY_CONNECTION_RESPONSE = 26
    PAUSE = 27
    PAUSE_RESPONSE = 28
    RESUME = 29


class Direction(Enum):
    """Who sends a message."""

    GUEST_TO_HOST = "g->h"
    HOST_TO_GUEST = "h->g"


class ChannelFlags(IntFlag):
    """`chn_flags` of an offer; in 6.0, 0x2 and 0x4 mean a confidential ring and confidential memory."""

    ENUMERATE_DEVICE_INTERFACE = 0x0001
    SERVER_SUPPORTS_TRANSFER_PAGES = 0x0002
    SERVER_SUPPORTS_GPADLS = 0x0004
    REQUIRE_PINNED_EXTERNAL_MEMORY = 0x0008
    NAMED_PIPE_MODE = 0x0010
    LOOPBACK_OFFER = 0x0100
    PARENT_OFFER = 0x0200
    REQUEST_MONITORED_NOTIFICATION = 0x0400
    TLNPI_PROVIDER_OFFER = 0x2000


class ConnectionState(IntEnum):
    """`connection_state` of VERSION_RESPONSE and MODIFY_CONNECTION_RESPONSE."""

    SUCCESSFUL = 0
    FAILED_LOW_RESOURCES = 1
    FAILED_UNKNOWN_FAILURE = 2


class PipeMode(IntEnum):
    """`u.pipe.pipe_mode` of an offer with NAMED_PIPE_MODE: the first u32 of `user_def`."""

    BYTE = 0
    MESSAGE = 4


class OpenFlags(IntFlag):
    """`OpenChannel.flags`, of the 156-byte form only."""

    REDIRECT_INTERRUPT = 0x1


class Message:
    """One channel message; LAYOUT is its body, the bytes behind the header."""

    __slots__: ClassVar[tuple[str, ...]] = ()

    TYPE: ClassVar[MessageType]
    LAYOUT: ClassVar[Struct] = Struct("<")

    def pack(self) -> bytes:
        """Write the message as it is posted, header included."""
        write, values = _PACKERS.get(type(self)) or _packer(type(self))
        return write(self.TYPE, 0, *values(self))

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read a payload that `parse` found to be of this type and no shorter than its least size."""
        return cls(*cls.LAYOUT.unpack_from(payload, HEADER.size))


_PACKERS: Final[dict[type[Message], tuple[Callable[..., bytes], Callable[[Message], Sequence[int | bytes]]]]] = {}
"""For each class: what writes header and body in one go, and what gets the fields."""


def _packer(cls: type[Message]) -> tuple[Callable[..., bytes], Callable[[Message], Sequence[int | bytes]]]:
    """Made at the first message of a class: a getter of several attributes takes half the time of a list of them."""
    names = cls.__slots__
    write = Struct(HEADER.format + cls.LAYOUT.format.removeprefix("<")).pack
    several = attrgetter(*names) if len(names) > 1 else None
    packer = _PACKERS[cls] = write, several or (lambda message: [getattr(message, name) for name in names])
    return packer


@valueclass(kw_only=True)
class OfferChannel(Message):
    """Host to guest: a channel of the device `if_instance` can be opened."""

    TYPE = MessageType.OFFERCHANNEL
    LAYOUT = Struct("<16s16s16xHH120sHHIBBHI")

    if_type: UUID
    if_instance: UUID
    chn_flags: int = 0
    mmio_megabytes: int = 0
    user_def: bytes = bytes(MAX_USER_DEFINED_BYTES)
    sub_channel_index: int = 0
    mmio_megabytes_optional: int = 0  # the kernel's reserved3
    child_relid: int
    monitorid: int = NO_MONITOR
    monitor_allocated: bool = False
    is_dedicated_interrupt: bool = True
    connection_id: int

    def pack(self) -> bytes:
        """Write 196 bytes; `user_def` is filled up with zeros."""
        assert len(self.user_def) <= MAX_USER_DEFINED_BYTES
        return HEADER.pack(self.TYPE, 0) + self.LAYOUT.pack(
            guid_to_wire(self.if_type),
            guid_to_wire(self.if_instance),
            self.chn_flags,
            self.mmio_megabytes,
            self.user_def,
            self.sub_channel_index,
            self.mmio_megabytes_optional,
            self.child_relid,
            self.monitorid,
            self.monitor_allocated,
            self.is_dedicated_interrupt,
            self.connection_id,
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read 196 bytes; only bit 0 of the two bit fields counts."""
        (
            if_type,
            if_instance,
            chn_flags,
            mmio_megabytes,
            user_def,
            sub_channel_index,
            mmio_megabytes_optional,
            child_relid,
            monitorid,
            monitor_bits,
            interrupt_bits,
            connection_id,
        ) = cls.LAYOUT.unpack_from(payload, HEADER.size)
        return cls(
            if_type=guid_from_wire(if_type),
            if_instance=guid_from_wire(if_instance),
            chn_flags=chn_flags,
            mmio_megabytes=mmio_megabytes,
            user_def=user_def,
            sub_channel_index=sub_channel_index,
            mmio_megabytes_optional=mmio_megabytes_optional,
            child_relid=child_relid,
            monitorid=monitorid,
            monitor_allocated=bool(monitor_bits & 1),
            is_dedicated_interrupt=bool(interrupt_bits & 1),
            connection_id=connection_id,
        )


@valueclass()
class RescindChannelOffer(Message):
    """Host to guest: the channel is gone; its relid stays taken until RELID_RELEASED."""

    TYPE = MessageType.RESCIND_CHANNELOFFER
    LAYOUT = Struct("<I")

    child_relid: int


@valueclass()
class RequestOffers(Message):
    """Guest to host, once a connection: send what there is."""

    TYPE = MessageType.REQUESTOFFERS


@valueclass()
class AllOffersDelivered(Message):
    """Host to guest: what there was when REQUESTOFFERS came has been offered."""

    TYPE = MessageType.ALLOFFERS_DELIVERED


@valueclass()
class OpenChannel(Message):
    """Guest to host: use the rings in this GPADL. 148 bytes, or 156 with the last three fields (6.0)."""

    TYPE = MessageType.OPENCHANNEL
    LAYOUT = Struct("<IIIII120s")
    SIGNAL_PARAMETERS: ClassVar[Struct] = Struct("<IHH")

    child_relid: int
    openid: int
    ringbuffer_gpadlhandle: int
    target_vp: int
    downstream_ringbuffer_pageoffset: int
    userdata: bytes = bytes(MAX_USER_DEFINED_BYTES)
    connection_id: int | None = None
    event_flag: int = 0
    flags: int = 0

    def pack(self) -> bytes:
        """Write 148 bytes, or 156 if there is a `connection_id`; `userdata` is filled up with zeros."""
        assert len(self.userdata) <= MAX_USER_DEFINED_BYTES
        data = HEADER.pack(self.TYPE, 0) + self.LAYOUT.pack(
            self.child_relid,
            self.openid,
            self.ringbuffer_gpadlhandle,
            self.target_vp,
            self.downstream_ringbuffer_pageoffset,
            self.userdata,
        )
        if self.connection_id is None:
            return data
        return data + self.SIGNAL_PARAMETERS.pack(self.connection_id, self.event_flag, self.flags)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read either form, by the size; padding may make the short form look long."""
        fields = cls.LAYOUT.unpack_from(payload, HEADER.size)
        end = HEADER.size + cls.LAYOUT.size
        if len(payload) < end + cls.SIGNAL_PARAMETERS.size:
            return cls(*fields)
        return cls(*fields, *cls.SIGNAL_PARAMETERS.unpack_from(payload, end))


@valueclass()
class OpenChannelResult(Message):
    """Host to guest: the channel `child_relid` is open if `status` is 0."""

    TYPE = MessageType.OPENCHANNEL_RESULT
    LAYOUT = Struct("<III")

    child_relid: int
    openid: int
    status: int


@valueclass()
class CloseChannel(Message):
    """Guest to host: stop using the rings. There is no reply."""

    TYPE = MessageType.CLOSECHANNEL
    LAYOUT = Struct("<I")

    child_relid: int


@valueclass()
class GpadlHeader(Message):
    """Guest to host: the first bytes of a page list.

    `ranges` is the beginning of `rangecount` times (gpa_range, PFNs), in all `range_buflen` bytes. It
    reaches to the end of the payload, so padding is in it; it begins at byte 20, so its PFNs are
    aligned to 4 bytes only.
    """

    TYPE = MessageType.GPADL_HEADER
    LAYOUT = Struct("<IIHH")

    child_relid: int
    gpadl: int
    range_buflen: int
    rangecount: int
    ranges: bytes = b""

    def pack(self) -> bytes:
        """Write 20 bytes and the ranges."""
        fixed = self.LAYOUT.pack(self.child_relid, self.gpadl, self.range_buflen, self.rangecount)
        return HEADER.pack(self.TYPE, 0) + fixed + self.ranges

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read the fixed part, and the rest as the ranges."""
        child_relid, gpadl, range_buflen, rangecount = cls.LAYOUT.unpack_from(payload, HEADER.size)
        ranges = payload[HEADER.size + cls.LAYOUT.size :]
        return cls(child_relid, gpadl, range_buflen, rangecount, ranges)


@valueclass()
class GpadlBody(Message):
    """Guest to host: `data` goes on where `GpadlHeader.ranges` ended; hosts ignore `msgnumber`."""

    TYPE = MessageType.GPADL_BODY
    LAYOUT = Struct("<II")

    msgnumber: int
    gpadl: int
    data: bytes = b""

    def pack(self) -> bytes:
        """Write 16 bytes and the data."""
        return HEADER.pack(self.TYPE, 0) + self.LAYOUT.pack(self.msgnumber, self.gpadl) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read the fixed part, and the rest as the data."""
        msgnumber, gpadl = cls.LAYOUT.unpack_from(payload, HEADER.size)
        return cls(msgnumber, gpadl, payload[HEADER.size + cls.LAYOUT.size :])


@valueclass()
class GpadlCreated(Message):
    """Host to guest: every page of `gpadl` is mapped, or why it is not."""

    TYPE = MessageType.GPADL_CREATED
    LAYOUT = Struct("<III")

    child_relid: int
    gpadl: int
    creation_status: int


@valueclass()
class GpadlTeardown(Message):
    """Guest to host: the guest wants these pages back."""

    TYPE = MessageType.GPADL_TEARDOWN
    LAYOUT = Struct("<II")

    child_relid: int
    gpadl: int


@valueclass()
class GpadlTorndown(Message):
    """Host to guest: the pages are the guest's again. It names no relid."""

    TYPE = MessageType.GPADL_TORNDOWN
    LAYOUT = Struct("<I")

    gpadl: int


@valueclass()
class RelidReleased(Message):
    """Guest to host: the guest has forgotten `child_relid`, the host may use it again."""

    TYPE = MessageType.RELID_RELEASED
    LAYOUT = Struct("<I")

    child_relid: int


@valueclass(kw_only=True)
class InitiateContact(Message):
    """Guest to host: connect, in this version, with these monitor pages.

    Bytes 16 to 23 are a union that the version decides: below 5.0 `interrupt_page`, from 5.0 on `msg_sint`,
    `msg_vtl` and `feature_flags` (which mean something from 6.0 on). The fields of the other half are 0.
    40 bytes; 56 with a `client_id`, which is there from 6.0 on if FeatureFlags.CLIENT_ID is set.
    """

    TYPE = MessageType.INITIATE_CONTACT
    LAYOUT = Struct("<II8sQQ")
    INTERRUPT_PAGE: ClassVar[Struct] = Struct("<Q")
    TARGET_INFO: ClassVar[Struct] = Struct("<BBxxI")

    vmbus_version_requested: int
    target_vcpu: int = 0
    interrupt_page: int = 0
    msg_sint: int = 0
    msg_vtl: int = 0
    feature_flags: int = 0
    monitor_page1: int = 0
    monitor_page2: int = 0
    client_id: UUID | None = None

    def pack(self) -> bytes:
        """Write 40 bytes, or 56 with a `client_id`."""
        if self.vmbus_version_requested < VERSION_WIN10_V5:
            union = self.INTERRUPT_PAGE.pack(self.interrupt_page)
        else:
            union = self.TARGET_INFO.pack(self.msg_sint, self.msg_vtl, self.feature_flags)
        data = HEADER.pack(self.TYPE, 0) + self.LAYOUT.pack(
            self.vmbus_version_requested, self.target_vcpu, union, self.monitor_page1, self.monitor_page2
        )
        return data if self.client_id is None else data + guid_to_wire(self.client_id)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read either form; a flag that promises a `client_id` which is not there is a violation."""
        version, target_vcpu, union, page1, page2 = cls.LAYOUT.unpack_from(payload, HEADER.size)
        if version < VERSION_WIN10_V5:
            return cls(
                vmbus_version_requested=version,
                target_vcpu=target_vcpu,
                interrupt_page=cls.INTERRUPT_PAGE.unpack(union)[0],
                monitor_page1=page1,
                monitor_page2=page2,
            )
        msg_sint, msg_vtl, feature_flags = cls.TARGET_INFO.unpack(union)
        client_id = None
        if version >= VERSION_COPPER and feature_flags & FeatureFlags.CLIENT_ID:
            end = HEADER.size + cls.LAYOUT.size
            _need(payload, end + GUID_SIZE, cls.TYPE)
            client_id = guid_from_wire(payload[end : end + GUID_SIZE])
        return cls(
            vmbus_version_requested=version,
            target_vcpu=target_vcpu,
            msg_sint=msg_sint,
            msg_vtl=msg_vtl,
            feature_flags=feature_flags,
            monitor_page1=page1,
            monitor_page2=page2,
            client_id=client_id,
        )


@valueclass()
class VersionResponse(Message):
    """Host to guest: yes or no, and from 5.0 on the connection id to post on.

    16 bytes; 20 with `supported_features` (6.0); 40 with the monitor pages of a host that brings its
    own, there if FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES is among those features.
    """

    TYPE = MessageType.VERSION_RESPONSE
    LAYOUT = Struct("<BBxxI")
    FEATURES: ClassVar[Struct] = Struct("<I")
    MONITOR_PAGES: ClassVar[Struct] = Struct("<xxxxQQ")

    version_supported: int
    connection_state: int = ConnectionState.SUCCESSFUL
    msg_conn_id: int = 0
    supported_features: int | None = None
    parent_to_child_monitor_page_gpa: int = 0
    child_to_parent_monitor_page_gpa: int = 0

    def pack(self) -> bytes:
        """Write 16, 20 or 40 bytes."""
        data = HEADER.pack(self.TYPE, 0) + self.LAYOUT.pack(
            self.version_supported, self.connection_state, self.msg_conn_id
        )
        if self.supported_features is None:
            return data
        data += self.FEATURES.pack(self.supported_features)
        if not self.supported_features & FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES:
            return data
        return data + self.MONITOR_PAGES.pack(
            self.parent_to_child_monitor_page_gpa, self.child_to_parent_monitor_page_gpa
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read any of the three forms; a flag that promises pages which are not there is a violation."""
        supported, state, msg_conn_id = cls.LAYOUT.unpack_from(payload, HEADER.size)
        end = HEADER.size + cls.LAYOUT.size
        if len(payload) < end + cls.FEATURES.size:
            return cls(supported, state, msg_conn_id)
        features: int = cls.FEATURES.unpack_from(payload, end)[0]
        if not features & FeatureFlags.SERVER_SPECIFIED_MONITOR_PAGES:
            return cls(supported, state, msg_conn_id, features)
        end += cls.FEATURES.size
        _need(payload, end + cls.MONITOR_PAGES.size, cls.TYPE)
        to_child, to_parent = cls.MONITOR_PAGES.unpack_from(payload, end)
        return cls(supported, state, msg_conn_id, features, to_child, to_parent)


@valueclass()
class Unload(Message):
    """Guest to host: close everything and forget this guest."""

    TYPE = MessageType.UNLOAD


@valueclass()
class UnloadResponse(Message):
    """Host to guest: every channel is closed, every GPADL torn down."""

    TYPE = MessageType.UNLOAD_RESPONSE


@valueclass()
class OpenReservedChannel(Message):
    """Guest to host: open with interrupts off; OPENCHANNEL_RESULT goes to (`target_vp`, `target_sint`)."""

    TYPE = MessageType.OPEN_RESERVED_CHANNEL
    LAYOUT = Struct("<IIIII")

    child_relid: int
    target_vp: int
    target_sint: int
    ringbuffer_gpadlhandle: int
    downstream_ringbuffer_pageoffset: int


@valueclass()
class CloseReservedChannel(Message):
    """Guest to host: close it; the response goes to (`target_vp`, `target_sint`)."""

    TYPE = MessageType.CLOSE_RESERVED_CHANNEL
    LAYOUT = Struct("<III")

    child_relid: int
    target_vp: int
    target_sint: int


@valueclass()
class CloseReservedResponse(Message):
    """Host to guest: the reserved channel is closed."""

    TYPE = MessageType.CLOSE_RESERVED_RESPONSE
    LAYOUT = Struct("<I")

    child_relid: int


@valueclass()
class TlConnectRequest(Message):
    """Guest to host: hv_sock wants a channel to this service. 40 bytes, or 56 with a `silo_id` (5.2)."""

    TYPE = MessageType.TL_CONNECT_REQUEST
    LAYOUT = Struct("<16s16s")

    guest_endpoint_id: UUID
    host_service_id: UUID
    silo_id: UUID | None = None

    def pack(self) -> bytes:
        """Write 40 bytes, or 56 with a `silo_id`."""
        ids = self.LAYOUT.pack(guid_to_wire(self.guest_endpoint_id), guid_to_wire(self.host_service_id))
        silo = b"" if self.silo_id is None else guid_to_wire(self.silo_id)
        return HEADER.pack(self.TYPE, 0) + ids + silo

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read either form, by the size; padding may make the short form look long."""
        endpoint, service = cls.LAYOUT.unpack_from(payload, HEADER.size)
        silo = payload[HEADER.size + cls.LAYOUT.size :][:GUID_SIZE]
        return cls(
            guid_from_wire(endpoint),
            guid_from_wire(service),
            guid_from_wire(silo) if len(silo) == GUID_SIZE else None,
        )


@valueclass()
class ModifyChannel(Message):
    """Guest to host: interrupt that VP from now on (4.1)."""

    TYPE = MessageType.MODIFYCHANNEL
    LAYOUT = Struct("<II")

    child_relid: int
    target_vp: int


@valueclass()
class TlConnectResult(Message):
    """Host to guest: why TL_CONNECT_REQUEST brings no channel (4.1); success is an offer instead."""

    TYPE = MessageType.TL_CONNECT_RESULT
    LAYOUT = Struct("<16s16sI")

    guest_endpoint_id: UUID
    host_service_id: UUID
    status: int

    def pack(self) -> bytes:
        """Write 44 bytes."""
        return HEADER.pack(self.TYPE, 0) + self.LAYOUT.pack(
            guid_to_wire(self.guest_endpoint_id), guid_to_wire(self.host_service_id), self.status
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Read 44 bytes."""
        endpoint, service, status = cls.LAYOUT.unpack_from(payload, HEADER.size)
        return cls(guid_from_wire(endpoint), guid_from_wire(service), status)


@valueclass()
class ModifyChannelResponse(Message):
    """Host to guest: no interrupt comes to the old VP any more, if `status` is 0 (5.3)."""

    TYPE = MessageType.MODIFYCHANNEL_RESPONSE
    LAYOUT = Struct("<II")

    child_relid: int
    status: int


@valueclass()
class ModifyConnection(Message):
    """Guest to host: use these monitor pages from now on, or none (6.0)."""

    TYPE = MessageType.MODIFY_CONNECTION
    LAYOUT = Struct("<QQ")

    parent_to_child_monitor_page_gpa: int
    child_to_parent_monitor_page_gpa: int


@valueclass()
class ModifyConnectionResponse(Message):
    """Host to guest: whether MODIFY_CONNECTION went well (6.0)."""

    TYPE = MessageType.MODIFY_CONNECTION_RESPONSE
    LAYOUT = Struct("<B")

    connection_state: int


@valueclass()
class Pause(Message):
    """Guest to host: send nothing more after PAUSE_RESPONSE, until RESUME (6.0)."""

    TYPE = MessageType.PAUSE


@valueclass()
class PauseResponse(Message):
    """Host to guest: the last message until RESUME (6.0)."""

    TYPE = MessageType.PAUSE_RESPONSE


@valueclass()
class Resume(Message):
    """Guest to host: send again (6.0)."""

    TYPE = MessageType.RESUME


@valueclass()
class MessageSpec:
    """What is known of a message without looking into it.

    `least_version` is the lowest at which a host takes or sends it (0: any); `feature` the 6.0 feature
    that it needs besides; `while_disconnected` says that it is legal before a version is agreed.
    `least_size` is what the parser wants, header included; `min_payload_len` what Linux 6.12 wants
    before it calls its handler (0: it does not look). `struct_name` is the struct's own name: the
    kernel's with the header, or OpenVMM's without.
    """

    cls: type[Message]
    type: MessageType
    direction: Direction
    least_version: int
    least_size: int
    min_payload_len: int
    struct_name: str
    feature: FeatureFlags = FeatureFlags(0)
    while_disconnected: bool = False


def _table() -> Mapping[MessageType, MessageSpec]:
    """Lay out the one table of messages, in the order of their numbers."""
    t = MessageType
    to_host, to_guest = Direction.GUEST_TO_HOST, Direction.HOST_TO_GUEST
    ws2008, win7, win10, v4_1 = VERSION_WS2008, VERSION_WIN7, VERSION_WIN10, VERSION_WIN10_V4_1
    v5_3, v6_0 = VERSION_WIN10_V5_3, VERSION_COPPER
    modify, pause = FeatureFlags.MODIFY_CONNECTION, FeatureFlags.PAUSE_RESUME
    header = "vmbus_channel_message_header"
    spec = MessageSpec
    # fmt: off
    rows = (
        spec(OfferChannel, t.OFFERCHANNEL, to_guest, ws2008, 196, 196, "vmbus_channel_offer_channel"),
        spec(RescindChannelOffer, t.RESCIND_CHANNELOFFER, to_guest, ws2008, 12, 12,
             "vmbus_channel_rescind_offer"),
        spec(RequestOffers, t.REQUESTOFFERS, to_host, ws2008, 8, 0, header),
        spec(AllOffersDelivered, t.ALLOFFERS_DELIVERED, to_guest, ws2008, 8, 0, header),
        spec(OpenChannel, t.OPENCHANNEL, to_host, ws2008, 148, 0, "vmbus_channel_open_channel"),
        spec(OpenChannelResult, t.OPENCHANNEL_RESULT, to_guest, ws2008, 20, 20, "vmbus_channel_open_result"),
        spec(CloseChannel, t.CLOSECHANNEL, to_host, ws2008, 12, 0, "vmbus_channel_close_channel"),
        spec(GpadlHeader, t.GPADL_HEADER, to_host, ws2008, 20, 0, "vmbus_channel_gpadl_header"),
        spec(GpadlBody, t.GPADL_BODY, to_host, ws2008, 16, 0, "vmbus_channel_gpadl_body"),
        spec(GpadlCreated, t.GPADL_CREATED, to_guest, ws2008, 20, 20, "vmbus_channel_gpadl_created"),
        spec(GpadlTeardown, t.GPADL_TEARDOWN, to_host, ws2008, 16, 0, "vmbus_channel_gpadl_teardown"),
        spec(GpadlTorndown, t.GPADL_TORNDOWN, to_guest, ws2008, 12, 12, "vmbus_channel_gpadl_torndown"),
        spec(RelidReleased, t.RELID_RELEASED, to_host, ws2008, 12, 0, "vmbus_channel_relid_released"),
        spec(InitiateContact, t.INITIATE_CONTACT, to_host, 0, 40, 0, "vmbus_channel_initiate_contact",
             while_disconnected=True),
        spec(VersionResponse, t.VERSION_RESPONSE, to_guest, 0, 16, 16, "vmbus_channel_version_response",
             while_disconnected=True),
        spec(Unload, t.UNLOAD, to_host, ws2008, 8, 0, header),
        spec(UnloadResponse, t.UNLOAD_RESPONSE, to_guest, win7, 8, 0, header),
        spec(OpenReservedChannel, t.OPEN_RESERVED_CHANNEL, to_host, win10, 28, 0,
             "openvmm::proto::OpenReservedChannel"),
        spec(CloseReservedChannel, t.CLOSE_RESERVED_CHANNEL, to_host, 0, 20, 0,
             "openvmm::proto::CloseReservedChannel", while_disconnected=True),
        spec(CloseReservedResponse, t.CLOSE_RESERVED_RESPONSE, to_guest, win10, 12, 0,
             "openvmm::proto::CloseReservedChannelResponse"),
        spec(TlConnectRequest, t.TL_CONNECT_REQUEST, to_host, win10, 40, 0,
             "vmbus_channel_tl_connect_request"),
        spec(ModifyChannel, t.MODIFYCHANNEL, to_host, v4_1, 16, 0, "vmbus_channel_modifychannel"),
        spec(TlConnectResult, t.TL_CONNECT_RESULT, to_guest, v4_1, 44, 0, "openvmm::proto::TlConnectResult"),
        spec(ModifyChannelResponse, t.MODIFYCHANNEL_RESPONSE, to_guest, v5_3, 16, 16,
             "vmbus_channel_modifychannel_response"),
        spec(ModifyConnection, t.MODIFY_CONNECTION, to_host, v6_0, 24, 0,
             "openvmm::proto::ModifyConnection", modify),
        spec(ModifyConnectionResponse, t.MODIFY_CONNECTION_RESPONSE, to_guest, v6_0, 9, 0,
             "openvmm::proto::ModifyConnectionResponse", modify),
        spec(Pause, t.PAUSE, to_host, v6_0, 8, 0, header, pause),
        spec(PauseResponse, t.PAUSE_RESPONSE, to_guest, v6_0, 8, 0, header, pause),
        spec(Resume, t.RESUME, to_host, v6_0, 8, 0, header, pause),
    )
    # fmt: on
    return MappingProxyType({row.type: row for row in rows})


MESSAGES: Final[Mapping[MessageType, MessageSpec]] = _table()
"""Every message there is. INVALID (0) is none."""

_BY_NUMBER: Final[tuple[MessageSpec | None, ...]] = tuple(MESSAGES.get(t) for t in MessageType)


def parse(payload: bytes) -> Message:
    """Read one message; the bytes are the peer's, so nothing is taken on trust.

    Raises ProtocolViolation with the rule `message-too-short`, `message-too-long` or `unknown-msgtype`.
    """
    size = len(payload)
    if size < HEADER.size:
        raise ProtocolViolation(
            f"a message of {size} bytes has no header",
            rule="message-too-short",
            field="payload_size",
            value=size,
        )
    msgtype: int = HEADER.unpack_from(payload)[0]
    spec = _BY_NUMBER[msgtype] if msgtype < len(_BY_NUMBER) else None
    if spec is None:
        raise ProtocolViolation(
            f"no message has msgtype {msgtype}", rule="unknown-msgtype", field="msgtype", value=msgtype
        )
    if size < spec.least_size:
        _need(payload, spec.least_size, spec.type)
    if size > MAX_MESSAGE_SIZE:
        raise ProtocolViolation(
            f"{spec.type.name} of {size} bytes: a message has {MAX_MESSAGE_SIZE} at most",
            rule="message-too-long",
            field="payload_size",
            value=size,
        )
    return spec.cls.unpack(payload)


def _need(payload: bytes, size: int, msgtype: MessageType) -> None:
    """Refuse a payload of fewer than `size` bytes."""
    if len(payload) < size:
        raise ProtocolViolation(
            f"{msgtype.name} needs {size} bytes, got {len(payload)}",
            rule="message-too-short",
            field="payload_size",
            value=len(payload),
        )


_HEADER_BYTES: Final = GPA_RANGE.size + 8 * GPADL_HEADER_PFNS
_BODY_BYTES: Final = 8 * GPADL_BODY_PFNS


def gpadl_messages(
    child_relid: int, gpadl: int, pfns: Sequence[int], byte_count: int | None = None, byte_offset: int = 0
) -> list[Message]:
    """Write the messages that establish a GPADL of one range: a header, then bodies.

    `byte_count` defaults to all the pages after `byte_offset`. 1 to 8,190 PFNs, as many as the bytes touch.
    """
    if byte_count is None:
        byte_count = len(pfns) * PAGE_SIZE - byte_offset
    assert 1 <= len(pfns) <= GPADL_MAX_PFNS, len(pfns)
    assert 0 <= byte_offset < PAGE_SIZE and len(pfns) == pfn_count(byte_count, byte_offset), byte_count
    ranges = GpaRange(byte_count, byte_offset, tuple(pfns)).pack()
    return split_gpadl(child_relid, gpadl, ranges, rangecount=1)


def split_gpadl(child_relid: int, gpadl: int, ranges: bytes, rangecount: int) -> list[Message]:
    """Cut the bytes of any number of ranges into a header message and bodies, as full as they can be."""
    messages: list[Message] = [GpadlHeader(child_relid, gpadl, len(ranges), rangecount, ranges[:_HEADER_BYTES])]
    for start in range(_HEADER_BYTES, len(ranges), _BODY_BYTES):
        messages.append(GpadlBody(0, gpadl, ranges[start : start + _BODY_BYTES]))
    return messages
