"""Channel messages byte for byte: written, read back, cut, padded, and made of noise."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu.errors import ProtocolViolation
from emu.wire.gpa_range import GpaRange, pack_gpa_ranges, parse_gpa_ranges
from emu.wire.messages import (
    MAX_MESSAGE_SIZE,
    MESSAGES,
    AllOffersDelivered,
    ChannelFlags,
    CloseChannel,
    CloseReservedChannel,
    CloseReservedResponse,
    Direction,
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
    ModifyConnection,
    ModifyConnectionResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    OpenReservedChannel,
    Pause,
    PauseResponse,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Resume,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    UnloadResponse,
    VersionResponse,
    gpadl_messages,
    parse,
    split_gpadl,
)
from emu.wire.versions import VERSION_COPPER, VERSION_WIN10_V5, FeatureFlags, version_text

NIC = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
NIC_BYTES = "635161f8 3edf c546 913ff2d2f965ed0e"
INSTANCE = UUID("00112233-4455-6677-8899-aabbccddeeff")
INSTANCE_BYTES = "33221100 5544 7766 8899aabbccddeeff"
ENDPOINT = UUID("01020304-0506-0708-090a-0b0c0d0e0f10")
ENDPOINT_BYTES = "04030201 0605 0807 090a0b0c0d0e0f10"

# Every message, and every form of it: the value, and its bytes.
SPELLED_OUT: list[tuple[str, Message, str]] = [
    (
        "offer",
        OfferChannel(
            if_type=NIC,
            if_instance=INSTANCE,
            chn_flags=ChannelFlags.ENUMERATE_DEVICE_INTERFACE | ChannelFlags.NAMED_PIPE_MODE,
            mmio_megabytes=8,
            user_def=bytes(range(120)),
            sub_channel_index=3,
            mmio_megabytes_optional=9,
            child_relid=5,
            monitorid=0x21,
            monitor_allocated=True,
            is_dedicated_interrupt=True,
            connection_id=0x2005,
        ),
        f"01000000 00000000 {NIC_BYTES} {INSTANCE_BYTES} {bytes(16).hex()} 1100 0800"
        f"{bytes(range(120)).hex()} 0300 0900 05000000 21 01 0100 05200000",
    ),
    ("rescind", RescindChannelOffer(5), "02000000 00000000 05000000"),
    ("request-offers", RequestOffers(), "03000000 00000000"),
    ("all-offers-delivered", AllOffersDelivered(), "04000000 00000000"),
    (
        "open",
        OpenChannel(1, 1, 0xE1E10, 0, 4),
        f"05000000 00000000 01000000 01000000 101e0e00 00000000 04000000 {bytes(120).hex()}",
    ),
    (
        "open-156",
        OpenChannel(1, 2, 0xE1E10, 3, 4, b"\x77" * 120, connection_id=0x2001, event_flag=9, flags=1),
        f"05000000 00000000 01000000 02000000 101e0e00 03000000 04000000 {'77' * 120} 01200000 0900 0100",
    ),
    ("open-result", OpenChannelResult(1, 2, 0xC0000001), "06000000 00000000 01000000 02000000 010000c0"),
    ("close", CloseChannel(7), "07000000 00000000 07000000"),
    (
        "gpadl-header",
        GpadlHeader(1, 0xE1E10, 24, 1, bytes.fromhex("00200000 00000000 0001000000000000 0101000000000000")),
        "08000000 00000000 01000000 101e0e00 1800 0100 00200000 00000000 0001000000000000 0101000000000000",
    ),
    (
        "gpadl-body",
        GpadlBody(0, 0xE1E10, bytes.fromhex("0201000000000000")),
        "09000000 00000000 00000000 101e0e00 0201000000000000",
    ),
    ("gpadl-created", GpadlCreated(1, 0xE1E10, 0x8000FFFF), "0a000000 00000000 01000000 101e0e00 ffff0080"),
    ("gpadl-teardown", GpadlTeardown(1, 0xE1E10), "0b000000 00000000 01000000 101e0e00"),
    ("gpadl-torndown", GpadlTorndown(0xE1E10), "0c000000 00000000 101e0e00"),
    ("relid-released", RelidReleased(5), "0d000000 00000000 05000000"),
    (
        "contact-4.1",
        InitiateContact(
            vmbus_version_requested=0x40001,
            target_vcpu=2,
            interrupt_page=0x10000,
            monitor_page1=0x11000,
            monitor_page2=0x12000,
        ),
        "0e000000 00000000 01000400 02000000 00000100 00000000 00100100 00000000 00200100 00000000",
    ),
    (
        "contact-5.3",
        InitiateContact(vmbus_version_requested=0x50003, msg_sint=2, monitor_page1=0x11000, monitor_page2=0x12000),
        "0e000000 00000000 03000500 00000000 02000000 00000000 00100100 00000000 00200100 00000000",
    ),
    (
        "contact-6.0",
        InitiateContact(vmbus_version_requested=0x60000, msg_sint=2, msg_vtl=1, feature_flags=0x21),
        "0e000000 00000000 00000600 00000000 02010000 21000000 00000000 00000000 00000000 00000000",
    ),
    (
        "contact-6.0-client-id",
        InitiateContact(vmbus_version_requested=0x60000, msg_sint=2, feature_flags=8, client_id=INSTANCE),
        "0e000000 00000000 00000600 00000000 02000000 08000000 00000000 00000000 00000000 00000000" + INSTANCE_BYTES,
    ),
    ("version-ok", VersionResponse(1, 0, 1), "0f000000 00000000 01000000 01000000"),
    ("version-refused", VersionResponse(0), "0f000000 00000000 00000000 00000000"),
    ("version-failed", VersionResponse(1, 2, 0x50003), "0f000000 00000000 01020000 03000500"),
    (
        "version-20",
        VersionResponse(1, 0, 4, supported_features=0x21),
        "0f000000 00000000 01000000 04000000 21000000",
    ),
    (
        "version-40",
        VersionResponse(1, 0, 4, 0x40, 0x11000, 0x12000),
        "0f000000 00000000 01000000 04000000 40000000 00000000 00100100 00000000 00200100 00000000",
    ),
    ("unload", Unload(), "10000000 00000000"),
    ("unload-response", UnloadResponse(), "11000000 00000000"),
    (
        "open-reserved",
        OpenReservedChannel(3, 1, 2, 0xE1E10, 4),
        "12000000 00000000 03000000 01000000 02000000 101e0e00 04000000",
    ),
    ("close-reserved", CloseReservedChannel(3, 1, 2), "13000000 00000000 03000000 01000000 02000000"),
    ("close-reserved-response", CloseReservedResponse(3), "14000000 00000000 03000000"),
    (
        "tl-connect",
        TlConnectRequest(ENDPOINT, INSTANCE),
        f"15000000 00000000 {ENDPOINT_BYTES} {INSTANCE_BYTES}",
    ),
    (
        "tl-connect-56",
        TlConnectRequest(ENDPOINT, INSTANCE, NIC),
        f"15000000 00000000 {ENDPOINT_BYTES} {INSTANCE_BYTES} {NIC_BYTES}",
    ),
    ("modify-channel", ModifyChannel(5, 3), "16000000 00000000 05000000 03000000"),
    (
        "tl-connect-result",
        TlConnectResult(ENDPOINT, INSTANCE, 0xC0000236),
        f"17000000 00000000 {ENDPOINT_BYTES} {INSTANCE_BYTES} 360200c0",
    ),
    ("modify-channel-response", ModifyChannelResponse(5, 0), "18000000 00000000 05000000 00000000"),
    (
        "modify-connection",
        ModifyConnection(0x11000, 0x12000),
        "19000000 00000000 0010010000000000 0020010000000000",
    ),
    ("modify-connection-response", ModifyConnectionResponse(2), "1a000000 00000000 02"),
    ("pause", Pause(), "1b000000 00000000"),
    ("pause-response", PauseResponse(), "1c000000 00000000"),
    ("resume", Resume(), "1d000000 00000000"),
]

BYTES = [(message, bytes.fromhex(text)) for _name, message, text in SPELLED_OUT]
NAMES = [name for name, _message, _text in SPELLED_OUT]


def test_every_message_is_spelled_out() -> None:
    """The list above has each of the 29 types."""
    assert {message.TYPE for message, _data in BYTES} == set(MESSAGES) == set(MessageType) - {MessageType.INVALID}


@pytest.mark.parametrize(("message", "data"), BYTES, ids=NAMES)
def test_message_is_written_as_spelled_out(message: Message, data: bytes) -> None:
    """Packing gives these bytes and no others."""
    assert message.pack().hex() == data.hex()


@pytest.mark.parametrize(("message", "data"), BYTES, ids=NAMES)
def test_message_is_read_as_spelled_out(message: Message, data: bytes) -> None:
    """Parsing these bytes gives the value."""
    assert parse(data) == message


@pytest.mark.parametrize(("message", "data"), BYTES, ids=NAMES)
def test_message_cut_below_its_least_size_is_refused(message: Message, data: bytes) -> None:
    """At each length below the least one, the rule is `message-too-short` and the value is the length."""
    for size in range(MESSAGES[message.TYPE].least_size):
        with pytest.raises(ProtocolViolation) as refused:
            parse(data[:size])
        assert (refused.value.rule, refused.value.value) == ("message-too-short", size)


@pytest.mark.parametrize(("message", "data"), BYTES, ids=NAMES)
def test_message_cut_above_its_least_size_is_a_shorter_form_or_refused(message: Message, data: bytes) -> None:
    """A longer form or a list that is cut is read as far as it goes, or refused; nothing else happens."""
    for size in range(MESSAGES[message.TYPE].least_size, len(data)):
        try:
            shorter = parse(data[:size])
        except ProtocolViolation as refused:
            assert refused.rule == "message-too-short"
        else:
            assert type(shorter) is type(message) and shorter != message


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("contact-6.0-client-id", range(40, 56)),
        ("version-40", range(20, 40)),
    ],
)
def test_promised_fields_that_are_not_there_are_a_violation(name: str, sizes: range) -> None:
    """A flag says that a client id or monitor pages follow; then they must."""
    data = BYTES[NAMES.index(name)][1]

    for size in sizes:
        with pytest.raises(ProtocolViolation):
            parse(data[:size])


@pytest.mark.parametrize(("message", "data"), BYTES, ids=NAMES)
def test_message_padded_to_240_bytes_is_accepted(message: Message, data: bytes) -> None:
    """Firmware guests always post 240 bytes: the type and the fields of the short form are the same."""
    padded = parse(data.ljust(MAX_MESSAGE_SIZE, b"\0"))

    assert type(padded) is type(message)
    assert padded.pack()[: len(data)] == data


@pytest.mark.parametrize(("message", "data"), BYTES, ids=NAMES)
def test_message_of_more_than_240_bytes_is_refused(message: Message, data: bytes) -> None:
    """No SynIC message carries more than 240 bytes."""
    with pytest.raises(ProtocolViolation) as refused:
        parse(data.ljust(MAX_MESSAGE_SIZE + 1, b"\0"))

    assert refused.value.rule == "message-too-long"


@pytest.mark.parametrize("msgtype", [0, 30, 31, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_unknown_msgtype_is_refused(msgtype: int) -> None:
    """0 and everything from 30 on is no message, and the violation says which number it was."""
    with pytest.raises(ProtocolViolation) as refused:
        parse(msgtype.to_bytes(4, "little") + bytes(100))

    assert (refused.value.rule, refused.value.field, refused.value.value) == (
        "unknown-msgtype",
        "msgtype",
        msgtype,
    )


@given(st.binary(max_size=260) | st.builds(lambda n, b: bytes([n, 0, 0, 0]) + b, st.integers(0, 31), st.binary()))
@settings(deadline=None)
def test_noise_is_a_message_or_a_violation(payload: bytes) -> None:
    """No bytes make the parser raise anything but ProtocolViolation, and what it takes it can write again."""
    try:
        message = parse(payload)
    except ProtocolViolation:
        return
    assert parse(message.pack()) == message


U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
GUIDS = st.builds(UUID, int=st.integers(0, (1 << 128) - 1))
USER = st.binary(min_size=120, max_size=120)
PFN_BYTES = st.binary(max_size=220)

MESSAGE_VALUES: dict[type[Message], st.SearchStrategy[Any]] = {
    OfferChannel: st.builds(
        OfferChannel,
        if_type=GUIDS,
        if_instance=GUIDS,
        chn_flags=U16,
        mmio_megabytes=U16,
        user_def=USER,
        sub_channel_index=U16,
        mmio_megabytes_optional=U16,
        child_relid=U32,
        monitorid=U8,
        monitor_allocated=st.booleans(),
        is_dedicated_interrupt=st.booleans(),
        connection_id=U32,
    ),
    RescindChannelOffer: st.builds(RescindChannelOffer, U32),
    RequestOffers: st.builds(RequestOffers),
    AllOffersDelivered: st.builds(AllOffersDelivered),
    OpenChannel: st.builds(OpenChannel, U32, U32, U32, U32, U32, USER)
    | st.builds(OpenChannel, U32, U32, U32, U32, U32, USER, U32, U16, U16),
    OpenChannelResult: st.builds(OpenChannelResult, U32, U32, U32),
    CloseChannel: st.builds(CloseChannel, U32),
    GpadlHeader: st.builds(GpadlHeader, U32, U32, U16, U16, PFN_BYTES),
    GpadlBody: st.builds(GpadlBody, U32, U32, PFN_BYTES),
    GpadlCreated: st.builds(GpadlCreated, U32, U32, U32),
    GpadlTeardown: st.builds(GpadlTeardown, U32, U32),
    GpadlTorndown: st.builds(GpadlTorndown, U32),
    RelidReleased: st.builds(RelidReleased, U32),
    InitiateContact: st.builds(
        InitiateContact,
        vmbus_version_requested=st.integers(0, VERSION_WIN10_V5 - 1),
        target_vcpu=U32,
        interrupt_page=U64,
        monitor_page1=U64,
        monitor_page2=U64,
    )
    | st.builds(
        InitiateContact,
        vmbus_version_requested=st.integers(VERSION_WIN10_V5, VERSION_COPPER - 1),
        target_vcpu=U32,
        msg_sint=U8,
        msg_vtl=U8,
        feature_flags=U32,
        monitor_page1=U64,
        monitor_page2=U64,
    )
    | st.builds(
        InitiateContact,
        vmbus_version_requested=st.integers(VERSION_COPPER, 0xFFFFFFFF),
        msg_sint=U8,
        feature_flags=U32.map(lambda flags: flags | FeatureFlags.CLIENT_ID),
        client_id=GUIDS,
    ),
    VersionResponse: st.builds(VersionResponse, U8, U8, U32)
    | st.builds(VersionResponse, U8, U8, U32, U32.map(lambda flags: flags & ~0x40))
    | st.builds(VersionResponse, U8, U8, U32, U32.map(lambda flags: flags | 0x40), U64, U64),
    Unload: st.builds(Unload),
    UnloadResponse: st.builds(UnloadResponse),
    OpenReservedChannel: st.builds(OpenReservedChannel, U32, U32, U32, U32, U32),
    CloseReservedChannel: st.builds(CloseReservedChannel, U32, U32, U32),
    CloseReservedResponse: st.builds(CloseReservedResponse, U32),
    TlConnectRequest: st.builds(TlConnectRequest, GUIDS, GUIDS, st.none() | GUIDS),
    ModifyChannel: st.builds(ModifyChannel, U32, U32),
    TlConnectResult: st.builds(TlConnectResult, GUIDS, GUIDS, U32),
    ModifyChannelResponse: st.builds(ModifyChannelResponse, U32, U32),
    ModifyConnection: st.builds(ModifyConnection, U64, U64),
    ModifyConnectionResponse: st.builds(ModifyConnectionResponse, U8),
    Pause: st.builds(Pause),
    PauseResponse: st.builds(PauseResponse),
    Resume: st.builds(Resume),
}


@pytest.mark.parametrize("cls", MESSAGE_VALUES, ids=[cls.__name__ for cls in MESSAGE_VALUES])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_message_survives_a_round_trip(cls: type[Message], data: st.DataObject) -> None:
    """What was written is what is read, for any values of the fields."""
    message = data.draw(MESSAGE_VALUES[cls])

    assert parse(message.pack()) == message


def test_only_bit_0_of_the_offers_bit_fields_counts() -> None:
    """Reserved bits beside monitor_allocated and is_dedicated_interrupt are not read."""
    data = bytearray(BYTES[NAMES.index("offer")][1])
    data[189] = 0xFE
    data[190:192] = b"\xfe\xff"
    offer = parse(bytes(data))

    assert isinstance(offer, OfferChannel)
    assert (offer.monitor_allocated, offer.is_dedicated_interrupt) == (False, False)


def test_client_id_flag_means_nothing_before_6_0() -> None:
    """A 5.3 guest's reserved bytes may look like feature flags; no client id is asked for."""
    data = bytearray(BYTES[NAMES.index("contact-5.3")][1])
    data[20] = FeatureFlags.CLIENT_ID

    contact = parse(bytes(data))
    assert isinstance(contact, InitiateContact) and contact.client_id is None


# Number, direction, least version, least size, min_payload_len.
TABLE = """
 1 h->g 0.13 196 196      11 g->h 0.13  16   0      21 g->h 4.0  40   0
 2 h->g 0.13  12  12      12 h->g 0.13  12  12      22 g->h 4.1  16   0
 3 g->h 0.13   8   0      13 g->h 0.13  12   0      23 h->g 4.1  44   0
 4 h->g 0.13   8   0      14 g->h 0.0   40   0      24 h->g 5.3  16  16
 5 g->h 0.13 148   0      15 h->g 0.0   16  16      25 g->h 6.0  24   0
 6 h->g 0.13  20  20      16 g->h 0.13   8   0      26 h->g 6.0   9   0
 7 g->h 0.13  12   0      17 h->g 1.1    8   0      27 g->h 6.0   8   0
 8 g->h 0.13  20   0      18 g->h 4.0   28   0      28 h->g 6.0   8   0
 9 g->h 0.13  16   0      19 g->h 0.0   20   0      29 g->h 6.0   8   0
10 h->g 0.13  20  20      20 h->g 4.0   12   0
"""


def test_table_says_what_the_reference_says() -> None:
    """Direction, least version and both least sizes of each message."""
    words = TABLE.split()
    rows = {int(words[at]): words[at + 1 : at + 5] for at in range(0, len(words), 5)}

    for spec in MESSAGES.values():
        ours = [
            spec.direction.value,
            version_text(spec.least_version),
            str(spec.least_size),
            str(spec.min_payload_len),
        ]
        assert ours == rows.pop(spec.type), spec.type.name
        assert spec.cls.TYPE is spec.type
    assert rows == {}


def test_table_names_features_and_what_needs_no_connection() -> None:
    """25 and 26 need MODIFY_CONNECTION, 27 to 29 PAUSE_RESUME; 14, 15 and 19 need no version."""
    features = {spec.type.value: spec.feature for spec in MESSAGES.values() if spec.feature}

    modify, pause = FeatureFlags.MODIFY_CONNECTION, FeatureFlags.PAUSE_RESUME
    assert features == {25: modify, 26: modify, 27: pause, 28: pause, 29: pause}
    assert {spec.type.value for spec in MESSAGES.values() if spec.while_disconnected} == {14, 15, 19}
    assert MESSAGES[MessageType.OFFERCHANNEL].direction is Direction.HOST_TO_GUEST


@pytest.mark.parametrize(
    ("pages", "count", "sizes"),
    [
        (1, 1, [36]),
        (2, 1, [44]),
        (26, 1, [236]),
        (27, 2, [236, 24]),
        (32, 2, [236, 64]),
        (54, 2, [236, 240]),
        (55, 3, [236, 240, 24]),
        (4096, 147, [236, *[240] * 145, 96]),
        (7936, 284, [236, *[240] * 282, 128]),
        (8190, 293, [236, *[240] * 291, 144]),
    ],
)
def test_gpadl_messages_are_as_many_and_as_long_as_linux_posts(pages: int, count: int, sizes: list[int]) -> None:
    """26 PFNs in the header, 28 in each body, the last as long as needed; together they are the range."""
    pfns = [0x1_0000_0000 + 7 * number for number in range(pages)]
    written = [message.pack() for message in gpadl_messages(3, 0xE1E11, pfns)]
    header, *bodies = [parse(data) for data in written]

    assert [len(data) for data in written] == sizes and len(sizes) == count
    assert isinstance(header, GpadlHeader)
    assert (header.child_relid, header.gpadl, header.rangecount) == (3, 0xE1E11, 1)
    assert header.range_buflen == 8 + 8 * pages <= 0xFFFF
    joined = header.ranges
    for body in bodies:
        assert isinstance(body, GpadlBody) and body.gpadl == 0xE1E11 and body.msgnumber == 0
        joined += body.data
    assert parse_gpa_ranges(joined, 1) == ((GpaRange(4096 * pages, 0, tuple(pfns)),), len(joined))


def test_worked_gpadl_comes_out() -> None:
    """The reference's GPADL of two pages, byte for byte."""
    (message,) = gpadl_messages(1, 0xE1E10, [0x100, 0x101])

    assert message.pack() == BYTES[NAMES.index("gpadl-header")][1]


def test_gpadl_may_begin_and_end_inside_a_page() -> None:
    """A range of 5,000 bytes from byte 3,500 of its first page touches three pages."""
    (message,) = gpadl_messages(1, 0xE1E10, [1, 2, 3], byte_count=5000, byte_offset=3500)

    assert isinstance(message, GpadlHeader)
    assert parse_gpa_ranges(message.ranges, 1)[0] == (GpaRange(5000, 3500, (1, 2, 3)),)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pfns": []},
        {"pfns": [0] * 8191},
        {"pfns": [1], "byte_count": 4097},
        {"pfns": [1, 2], "byte_count": 4096},
        {"pfns": [1], "byte_count": 1, "byte_offset": 4096},
    ],
)
def test_gpadl_that_is_no_range_is_the_callers_fault(arguments: dict[str, Any]) -> None:
    """Too few or too many pages for the bytes is an assertion: no peer is to blame."""
    with pytest.raises(AssertionError):
        gpadl_messages(1, 0xE1E10, **arguments)


def test_several_ranges_are_one_stream_of_bytes() -> None:
    """Ranges follow each other without regard to where a message ends."""
    ranges = tuple(GpaRange(20 * 4096, 0, tuple(range(base, base + 20))) for base in (100, 200, 300))
    header, *bodies = split_gpadl(1, 0xE1E10, pack_gpa_ranges(ranges), rangecount=3)

    assert isinstance(header, GpadlHeader) and (header.rangecount, header.range_buflen) == (3, 3 * 168)
    joined = header.ranges + b"".join(body.data for body in bodies if isinstance(body, GpadlBody))
    assert parse_gpa_ranges(joined, 3) == (ranges, len(joined))
