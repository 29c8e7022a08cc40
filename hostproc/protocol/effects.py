"""What the VMBus server decides, as values: the bus carries each of them out, in their order.

`key` is the number under which the device was offered; it names this life of the device and is never used
again, so an answer that comes too late names nobody.

    the bus is told    and answers the server with
    MapGpadl           gpadl_accepted or gpadl_refused
    UnmapGpadl         gpadl_torn_down
    OpenDevice         device_opened or device_refused
    CloseDevice        device_closed
    RetargetEvent      event_retargeted
    ConnectSocket      offer of the channel, or connect_refused
"""

from __future__ import annotations

from uuid import UUID

from emu.values import valueclass
from emu.wire.gpa_range import GpaRange
from emu.wire.messages import Message
from emu.wire.versions import FeatureFlags


@valueclass()
class SendMessage:
    """Post `message` to this SINT of this VP, behind everything posted there before."""

    message: Message
    vp_index: int
    sint: int


@valueclass()
class Connected:
    """A guest is connected; the pages are GPAs, 0 where it gave none (or the version has none)."""

    version: int
    features: FeatureFlags
    vp_index: int
    interrupt_page: int
    monitor_page1: int
    monitor_page2: int


@valueclass()
class MonitorPages:
    """The connected guest put its monitor pages elsewhere (6.0); 0 and 0 for none."""

    monitor_page1: int
    monitor_page2: int


@valueclass()
class Disconnected:
    """Nobody is connected any more, and nothing of the guest's is in use.

    `replaced`: by an INITIATE_CONTACT, which is judged next. A guest that sends one (a crash kernel) has not left.
    """

    replaced: bool = False


@valueclass()
class MapGpadl:
    """Look whether these pages can be used, and keep them under (key, gpadl)."""

    key: int
    relid: int
    gpadl: int
    ranges: tuple[GpaRange, ...]


@valueclass()
class UnmapGpadl:
    """Give these pages up; the answer tells the guest that they are its own again."""

    key: int
    gpadl: int


@valueclass()
class OpenDevice:
    """Map both rings, let the device begin, and answer.

    The guest-to-host ring begins at page 0 of GPADL `ring_gpadl`, the other at `downstream_page_offset`; the
    GPADL was accepted, is one range of whole pages, and both rings have at least one page of data.
    """

    key: int
    relid: int
    sub_channel_index: int
    ring_gpadl: int
    ring_pages: int
    downstream_page_offset: int
    target_vp: int
    event_flag: int
    userdata: bytes


@valueclass()
class CloseDevice:
    """Let the device stop using the rings, and answer."""

    key: int


@valueclass()
class DropDevice:
    """The device is gone: stop it now, forget all its GPADLs. There is no answer to this."""

    key: int


@valueclass()
class BindEvent:
    """The device's signal sets `flag` of this SINT of this VP.

    `shared` (versions below 2.4): flag 0 of VP 0, after bit `relid` of the interrupt page.
    """

    key: int
    relid: int
    target_vp: int
    sint: int
    flag: int
    shared: bool


@valueclass()
class RetargetEvent:
    """Move the event to this VP; once answered, the old VP gets no interrupt of it any more."""

    key: int
    relid: int
    target_vp: int


@valueclass()
class UnbindEvent:
    """The device's signal reaches nobody any more."""

    key: int


@valueclass()
class OpenDoorbell:
    """A signal on `connection_id` runs the device."""

    key: int
    connection_id: int


@valueclass()
class CloseDoorbell:
    """`connection_id` is no connection any more."""

    key: int
    connection_id: int


@valueclass()
class ConnectSocket:
    """A guest's socket asks for this service (`silo_id` from 5.2 on, if it gave one)."""

    endpoint_id: UUID
    service_id: UUID
    silo_id: UUID | None


@valueclass()
class Refused:
    """Nothing happened, or the guest was told no: which rule, and what the offending field held.

    `legal`: the guest was within its rights (its message crossed ours), or the limit is the host's own.
    """

    rule: str
    text: str
    field: str = ""
    value: int | str | bytes | None = None
    legal: bool = False


Effect = (
    SendMessage
    | Connected
    | MonitorPages
    | Disconnected
    | MapGpadl
    | UnmapGpadl
    | OpenDevice
    | CloseDevice
    | DropDevice
    | BindEvent
    | RetargetEvent
    | UnbindEvent
    | OpenDoorbell
    | CloseDoorbell
    | ConnectSocket
    | Refused
)
