"""Device classes: what Linux, `lsvmbus` and a scenario call them."""

from __future__ import annotations

from uuid import UUID

import pytest

from emu.wire.device_classes import (
    BY_GUID,
    BY_NAME,
    CLASSES,
    ECHO,
    HV_SOCK,
    HV_UNKNOWN,
    SINGLETON_INSTANCES,
    class_of,
    device_number,
    hv_sock_guid,
    lsvmbus_text,
)
from emu.wire.messages import ChannelFlags, PipeMode

# Number, Linux's name, GUID, perf, isolated, lsvmbus text, KiB of ring.
LINUX = """
 0|HV_IDE|32412632-86cb-44a2-9b5c-50d1417354f5|yes|no|Synthetic IDE Controller|128
 1|HV_SCSI|ba6163d9-04a1-4d29-b605-72e2ffb1dc7f|yes|yes|Synthetic SCSI Controller|128
 2|HV_FC|2f9bcc4a-0069-4af3-b76b-6fd0be528cda|yes|no|Synthetic fiber channel adapter|128
 3|HV_NIC|f8615163-df3e-46c5-913f-f2d2f965ed0e|yes|yes|Synthetic network adapter|512
 4|HV_ND|8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501|yes|no|Synthetic RDMA adapter|-
 5|HV_PCIE|44c4f61d-4444-4400-9d52-802e27ede19f|no|yes|PCI Express pass-through|20
 6|HV_FB|da0a7802-e377-4aac-8e77-0558eb1073f8|no|no|Synthetic framebuffer adapter|256
 7|HV_KBD|f912ad6d-2b17-48ea-bd65-f927a61c7684|no|no|Synthetic keyboard|36
 8|HV_MOUSE|cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a|no|no|Synthetic mouse|36
 9|HV_KVP|a9a0f4e7-5a45-4d96-b827-8a841e8c03e6|no|no|[Data Exchange]|16
10|HV_TS|9527e630-d0ae-497b-adce-e80ab0175caf|no|yes|[Time Synchronization]|16
11|HV_HB|57164f39-9115-4e78-ab55-382f3bd5422d|no|yes|[Heartbeat]|16
12|HV_SHUTDOWN|0e0b6031-5213-4934-818b-38d90ced39db|no|yes|[Operating system shutdown]|16
13|HV_FCOPY|34d14be3-dee4-41c8-9ae7-6b174977c192|no|no|[Guest services]|20
14|HV_BACKUP|35fa2e29-ea23-4236-96ae-3a6ebacba440|no|no|[Backup (volume checkpoint)]|16
15|HV_DM|525074dc-8985-46e2-8057-a307dc18a502|no|no|[Dynamic Memory]|20
"""


def test_the_kernels_sixteen_types() -> None:
    """Types 0 to 15, in order, are the reference's rows word for word."""
    rows = [
        "|".join(
            (
                f"{one.number:2}",
                one.linux_name,
                str(one.guid),
                "yes" if one.perf else "no",
                "yes" if one.isolated else "no",
                one.lsvmbus_text,
                str(one.ring_bytes // 1024) if one.ring_bytes else "-",
            )
        )
        for one in CLASSES
        if one.number != HV_UNKNOWN
    ]

    assert rows == LINUX.strip("\n").split("\n")


@pytest.mark.parametrize(
    ("name", "guid", "text"),
    [
        ("avma1", "f8e65716-3cb3-4a06-9a60-1889c5cccab5", "[Reserved system device]"),
        ("avma2", "3375baf4-9e15-4b30-b765-67acb10d607b", "[Reserved system device]"),
        ("rdv", "276aacf4-ac15-426c-98dd-7521ad3f01fe", "[Reserved system device]"),
        ("imc", "c376c1c3-d276-48d2-90a9-c04748072c60", "Unknown"),
    ],
)
def test_what_linux_leaves_alone(name: str, guid: str, text: str) -> None:
    """Four GUIDs are unsupported without a word in the log."""
    one = BY_NAME[name]

    assert (one.number, one.supported, str(one.guid), one.lsvmbus_text) == (HV_UNKNOWN, False, guid, text)


def test_names_and_guids_are_distinct() -> None:
    """Each class is found by either, and is the same one."""
    assert len(BY_NAME) == len(BY_GUID) == len(CLASSES) == 24
    for one in CLASSES:
        assert BY_NAME[one.name] is BY_GUID[one.guid] is class_of(one.guid) is one


def test_echo_is_ours_and_nobody_knows_it() -> None:
    """Its GUID never changes, and begins with its name; `lsvmbus` says "Unknown"."""
    assert str(ECHO.guid) == "6563686f-766d-4275-9d2d-656d752d3031"
    assert ECHO.guid.bytes[:4] == b"echo"
    assert (lsvmbus_text(ECHO.guid), device_number(ECHO.guid)) == ("Unknown", HV_UNKNOWN)


def test_a_guid_that_nobody_knows() -> None:
    """No class, device type 16, "Unknown"."""
    guid = UUID("deadbeef-0000-4000-8000-000000000000")

    assert (class_of(guid), device_number(guid), lsvmbus_text(guid)) == (None, HV_UNKNOWN, "Unknown")


@pytest.mark.parametrize("port", [0, 1, 0x1234, 0xFFFFFFFF])
def test_hv_sock_is_known_by_its_tail(port: int) -> None:
    """Each AF_VSOCK port has a class GUID of its own; all are hv_sock."""
    guid = hv_sock_guid(port)

    assert str(guid) == f"{port:08x}-facb-11e6-bd58-64006a7986d3"
    assert class_of(guid) is HV_SOCK


def test_pipe_mode_and_pipe_flag_go_together() -> None:
    """An offer has a pipe mode just when it says that it is a pipe; the keyboard's is none."""
    for one in CLASSES:
        assert (one.pipe_mode is None) == (ChannelFlags.NAMED_PIPE_MODE not in one.chn_flags), one.name
    assert BY_NAME["kbd"].chn_flags == 0
    assert (BY_NAME["kvp"].chn_flags, BY_NAME["kvp"].pipe_mode) == (0x11, PipeMode.MESSAGE)
    assert (HV_SOCK.chn_flags, HV_SOCK.pipe_mode) == (0x2011, PipeMode.BYTE)


def test_singletons_are_classes() -> None:
    """Each fixed instance GUID belongs to a class there is."""
    assert set(SINGLETON_INSTANCES) <= set(BY_NAME)


def test_rings_are_whole_pages() -> None:
    """A control page and at least one page of data."""
    assert all(one.ring_bytes % 4096 == 0 and one.ring_bytes >= 8192 for one in CLASSES if one.ring_bytes is not None)
