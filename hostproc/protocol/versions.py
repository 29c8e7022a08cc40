"""What each protocol version changes for a host, as one table, and how a first contact is judged.

Messages that a version adds are in `emu.wire.messages.MESSAGES`; here is the rest. A version has the changes
of every older one. Judging reads the request and this host's limits only: what to do with an existing
connection is the server's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from emu.values import valueclass
from emu.wire.messages import STATUS_UNSUCCESSFUL, ConnectionState, InitiateContact, VersionResponse
from emu.wire.versions import (
    KNOWN_VERSIONS,
    VERSION_COPPER,
    VERSION_WIN7,
    VERSION_WIN8,
    VERSION_WIN8_1,
    VERSION_WIN10,
    VERSION_WIN10_V4_1,
    VERSION_WIN10_V5,
    VERSION_WIN10_V5_1,
    VERSION_WIN10_V5_2,
    VERSION_WIN10_V5_3,
    VERSION_WS2008,
    FeatureFlags,
    version_text,
)
from hostproc.protocol.effects import Refused

VMBUS_SINT: Final = 2
LEGACY_CONNECTION_ID: Final = 1
"""The message connection of versions below 5.0; from 5.0 on, the one that an ordinary guest is sent to."""
MULTICLIENT_CONNECTION_ID: Final = 4
"""Where INITIATE_CONTACT of 5.0 and later goes."""
SHARED_DOORBELL_CONNECTION_ID: Final = 2
"""The one event connection of 0.13, for all channels."""

FAILED: Final = STATUS_UNSUCCESSFUL
_PAGE_MASK: Final = 0xFFF


@valueclass()
class Version:
    """A version: the Windows that brought it, and what a host does differently from some version on."""

    number: int
    windows: str
    dedicated_doorbell: bool = False
    """A doorbell for each channel, and offers with a monitor bit. Before: connection 2 for all."""
    event_flags: bool = False
    """A flag for each channel, on the VP it names. Before: bit in the interrupt page, then flag 0 of VP 0."""
    sub_channels: bool = False
    target_vcpu: bool = False
    """Messages go to the VP that the guest names. Before: VP 0."""
    message_connection: bool = False
    """The guest names the SINT; the host names the message connection."""
    target_vtl: bool = False
    silo_id: bool = False
    feature_flags: bool = False

    @property
    def text(self) -> str:
        """The version as people say it: "5.3"."""
        return version_text(self.number)


def _table() -> Mapping[int, Version]:
    rows: tuple[tuple[int, str, tuple[str, ...]], ...] = (
        (VERSION_WS2008, "Windows Server 2008", ()),
        (VERSION_WIN7, "Windows Server 2008 R2", ("dedicated_doorbell",)),
        (VERSION_WIN8, "Windows Server 2012", ("event_flags", "sub_channels")),
        (VERSION_WIN8_1, "Windows Server 2012 R2", ("target_vcpu",)),
        (VERSION_WIN10, "Windows Server 2016", ()),
        (VERSION_WIN10_V4_1, "Windows 10 RS3", ()),
        (VERSION_WIN10_V5, "Windows 10 RS3", ("message_connection",)),
        (VERSION_WIN10_V5_1, "Windows 10 RS4", ("target_vtl",)),
        (VERSION_WIN10_V5_2, "Windows Server 2019", ("silo_id",)),
        (VERSION_WIN10_V5_3, "Windows Server 2022", ()),
        (VERSION_COPPER, "Copper", ("feature_flags",)),
    )
    table = {}
    changes: dict[str, bool] = {}
    for number, windows, adds in rows:
        changes |= dict.fromkeys(adds, True)
        table[number] = Version(number, windows, **changes)
    assert tuple(table) == KNOWN_VERSIONS
    return MappingProxyType(table)


VERSIONS: Final = _table()
IMPLEMENTED_FEATURES: Final = (
    FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    | FeatureFlags.MODIFY_CONNECTION
    | FeatureFlags.CLIENT_ID
    | FeatureFlags.PAUSE_RESUME
)
"""The 6.0 features that the server carries out when its limits offer them."""


@valueclass()
class Limits:
    """What this host has and offers: its size, the versions it speaks, and where it draws its lines.

    `gpadl_pages` bounds the pages of all GPADLs together; None: as many as RAM has, since each page a guest
    honestly lends is a page of its RAM. The counts bound what a guest can make the host remember.
    """

    vp_count: int
    ram_bytes: int
    max_version: int = VERSION_WIN10_V5_3
    spoken: frozenset[int] = frozenset(KNOWN_VERSIONS)
    features: FeatureFlags = FeatureFlags(0)
    gpadl_pages: int | None = None
    gpadls: int = 16_384
    gpadls_per_channel: int = 64
    gpadls_in_progress: int = 256
    socket_requests: int = 16

    def speaks(self, version: int) -> bool:
        """Whether this host connects a guest that asks for `version`."""
        return version in self.spoken and version in VERSIONS and version <= self.max_version


def message_connections(max_version: int) -> tuple[int, ...]:
    """The ids on which a host up to `max_version` takes messages; on others a post finds no connection."""
    if max_version < VERSION_WIN10_V5:
        return (LEGACY_CONNECTION_ID,)
    return (LEGACY_CONNECTION_ID, MULTICLIENT_CONNECTION_ID)


@valueclass()
class Verdict:
    """How a first contact is answered: to whom, and why it was refused (None: connect it)."""

    response: VersionResponse
    vp_index: int
    sint: int
    refused: Refused | None = None


def elsewhere(contact: InitiateContact, connection_id: int, limits: Limits) -> Verdict | None:
    """Judge who a contact is meant for; None: this server. Otherwise a connection is left alone."""
    version = contact.vmbus_version_requested
    if connection_id == MULTICLIENT_CONNECTION_ID and version >= VERSION_WIN10_V5 and contact.msg_sint != VMBUS_SINT:
        sint = contact.msg_sint if contact.msg_sint < 16 else VMBUS_SINT
        return _decline(contact, limits, "contact-msg-sint", "msg_sint", contact.msg_sint, sint=sint)
    if version >= VERSION_WIN10_V5_1 and contact.msg_vtl != 0:
        return _decline(contact, limits, "contact-msg-vtl", "msg_vtl", contact.msg_vtl)
    return None


def judge(contact: InitiateContact, limits: Limits) -> Verdict:
    """Judge a contact that is meant for this server, when nobody is connected."""
    number = contact.vmbus_version_requested
    if not limits.speaks(number):
        return _decline(contact, limits, "contact-version", "vmbus_version_requested", number)
    version = VERSIONS[number]
    if version.target_vcpu and contact.target_vcpu >= limits.vp_count:
        return _decline(contact, limits, "contact-target-vcpu", "target_vcpu", contact.target_vcpu)
    wrong = _wrong_page(contact, version, limits)
    if wrong is not None:
        # Older guests look at version_supported only, later ones (it is said) at connection_state.
        if not version.event_flags:
            return _decline(contact, limits, *wrong)
        response = VersionResponse(1, ConnectionState.FAILED_UNKNOWN_FAILURE)
        return Verdict(response, target_vp(contact, limits), VMBUS_SINT, _refusal(*wrong))
    return Verdict(_accept(contact, version, limits), target_vp(contact, limits), VMBUS_SINT)


def target_vp(contact: InitiateContact, limits: Limits) -> int:
    """Return the VP that gets this guest's messages: its wish counts from 3.0 on, if there is such a VP."""
    honoured = contact.vmbus_version_requested >= VERSION_WIN8_1 and contact.target_vcpu < limits.vp_count
    return contact.target_vcpu if honoured else 0


def monitor_pages_fault(page1: int, page2: int, limits: Limits) -> tuple[str, str, int] | None:
    """Say what is wrong with monitor pages (rule, field, value): both in RAM and aligned, or both 0."""
    if (page1 == 0) != (page2 == 0):
        return "one-monitor-page", "monitor_page1" if page1 == 0 else "monitor_page2", 0
    for field, page in (("monitor_page1", page1), ("monitor_page2", page2)):
        if page & _PAGE_MASK or page >= limits.ram_bytes:
            return "monitor-page-outside-ram", field, page
    return None


def _wrong_page(contact: InitiateContact, version: Version, limits: Limits) -> tuple[str, str, int] | None:
    page = contact.interrupt_page
    if not version.event_flags and (page & _PAGE_MASK or page >= limits.ram_bytes):
        return "interrupt-page-outside-ram", "interrupt_page", page
    return monitor_pages_fault(contact.monitor_page1, contact.monitor_page2, limits)


def _accept(contact: InitiateContact, version: Version, limits: Limits) -> VersionResponse:
    features = None
    if version.feature_flags:
        features = int(granted_features(contact, limits))
    msg_conn_id = LEGACY_CONNECTION_ID if version.message_connection else version.number
    return VersionResponse(1, ConnectionState.SUCCESSFUL, msg_conn_id, features)


def granted_features(contact: InitiateContact, limits: Limits) -> FeatureFlags:
    """Return what the guest asked for and this host offers; bits that nobody knows are dropped."""
    if contact.vmbus_version_requested < VERSION_COPPER:
        return FeatureFlags(0)
    return FeatureFlags(contact.feature_flags & int(limits.features & IMPLEMENTED_FEATURES))


def _decline(
    contact: InitiateContact, limits: Limits, rule: str, field: str, value: int, sint: int = VMBUS_SINT
) -> Verdict:
    return Verdict(VersionResponse(0), target_vp(contact, limits), sint, _refusal(rule, field, value))


def _refusal(rule: str, field: str, value: int) -> Refused:
    return Refused(rule, f"INITIATE_CONTACT with {field} {value:#x}", field, value)
