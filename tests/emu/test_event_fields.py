"""The fields of events: written and read back, packed where six words are too few, printed as the kernel prints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.event_fields import EventSpec, parse_argument, places_of, text_value
from emu.tracing import EVENTS, HYPERV_EVENTS

ECHO = 0x2D2F6E1E9D9C4B5A8F3A1B2C3D4E5F60
KERNEL_FIELDS = """
vmbus_on_msg_dpc msgtype
vmbus_on_message msgtype
vmbus_onoffer child_relid monitorid is_ddc_int connection_id if_type if_instance chn_flags mmio_mb sub_idx
vmbus_onoffer_rescind child_relid
vmbus_onopen_result child_relid openid status
vmbus_ongpadl_created child_relid gpadl status
vmbus_onmodifychannel_response child_relid status
vmbus_ongpadl_torndown gpadl
vmbus_onversion_response ver
vmbus_request_offers ret
vmbus_open child_relid openid gpadlhandle target_vp offset ret
vmbus_close_internal child_relid ret
vmbus_establish_gpadl_header child_relid gpadl range_buflen rangecount ret
vmbus_establish_gpadl_body msgnumber gpadl ret
vmbus_teardown_gpadl child_relid gpadl ret
vmbus_negotiate_version ver target_vcpu ret int_page mon_page1 mon_page2
vmbus_release_relid child_relid ret
vmbus_send_tl_connect_request guest_id host_id ret
vmbus_send_modifychannel child_relid target_vp ret
vmbus_chan_sched relid
vmbus_setevent relid
vmbus_on_event relid
"""


def padded(words: tuple[int, ...]) -> list[int]:
    """The six words of a record."""
    return [*words, *[0] * (6 - len(words))]


def values_of(spec: EventSpec, number: int) -> tuple[int, ...]:
    """Values that fill every argument of an event in a way that shows where they went."""
    return tuple(
        -1 - number if field.signed else (number * (index + 3) * 0x9E3779B97F4A7C15) % (1 << field.bits)
        for index, field in enumerate(spec.fields)
    )


@given(st.sampled_from(list(EVENTS.values())), st.integers(0, 1 << 30))
def test_values_come_back_from_their_words(spec: EventSpec, number: int) -> None:
    """Whatever an event is given is what is read, packed or not."""
    values = values_of(spec, number)

    assert spec.unpack(padded(spec.pack(*values))) == values


def test_table_is_read_as_it_is_written() -> None:
    """The form in a recording's head makes the same arguments again."""
    for spec in EVENTS.values():
        assert tuple(parse_argument(field.written) for field in spec.fields) == spec.fields


@pytest.mark.parametrize("text", ["a:u7", "a:guid:X:y", ":u8", "a:u8/9", "a:str5", "a:str512", "a:hex4", "a:"])
def test_nonsense_is_no_argument(text: str) -> None:
    """A scribbled table is refused, not guessed at."""
    with pytest.raises(ValueError, match="no argument"):
        parse_argument(text)


def test_kernel_declares_these_fields_in_this_order() -> None:
    """The 22 tracepoints of `hyperv`, by name, each with its fields as declared."""
    assert [[spec.name, *spec.declared] for spec in HYPERV_EVENTS] == [
        line.split() for line in KERNEL_FIELDS.split("\n") if line
    ]
    for spec in HYPERV_EVENTS:
        assert sorted(spec.declared) == sorted(spec.arguments)


def test_offer_is_packed_into_six_words() -> None:
    """Nine arguments, two of them GUIDs: small ones share a word, in their order."""
    spec = EVENTS["vmbus_onoffer"]

    assert [(place.word, place.shift) for place in places_of(spec.fields)] == [
        (0, 0), (0, 32), (0, 40), (1, 0), (2, 0), (4, 0), (0, 41), (1, 32), (1, 48),
    ]  # fmt: skip
    assert spec.words == 6


def test_kernel_events_print_as_in_ftrace() -> None:
    """Status and version as signed numbers, GUIDs in lower case, pages in hex without a prefix."""
    offer = EVENTS["vmbus_onoffer"]
    assert offer.text((9, 0, 1, 0x2009, ECHO, 1, 0x10, 2, 3)) == (
        "child_relid 0x9, monitorid 0x0, is_dedicated 1, connection_id 0x2009, "
        "if_type 3d4e5f60-1b2c-8f3a-5a4b-9c9d1e6e2f2d, if_instance 00000001-0000-0000-0000-000000000000, "
        "chn_flags 0x10, mmio_megabytes 2, sub_channel_index 3"
    )
    assert EVENTS["vmbus_onopen_result"].text((9, 9, 0xC000000D)) == "child_relid 0x9, openid 9, status -1073741811"
    assert EVENTS["vmbus_negotiate_version"].text((0x50003, 1, 0, 0xA000, 0xB000, -11)) == (
        "sending vmbus_version_requested 327683, target_vcpu 0x1, pages 0:a000:b000, ret -11"
    )
    assert EVENTS["vmbus_on_msg_dpc"].text((1,)) == "msgtype=1"


def test_events_of_ours_print_by_name() -> None:
    """Numbers plain or in hex as their types say, texts as texts."""
    assert EVENTS["refused"].text((text_value("gpa-range", 40), 7)) == "rule=gpa-range value=7"
    assert EVENTS["isr_enter"].text((0xF3,)) == "vector=0xf3"


def test_bytes_are_shown_in_hex() -> None:
    """All of them, zeros at the end as well: they are no text."""
    field = parse_argument("data:hex8")

    assert field.show(int.from_bytes(b"\x0eVM\0", "little")) == "0e 56 4d 00 00 00 00 00"
    assert field.content(0x0E) == b"\x0e" + bytes(7)
