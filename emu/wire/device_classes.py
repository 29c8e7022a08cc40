"""The device classes: what a class GUID means to Linux, to `lsvmbus` and to the host's offers. One table.

`number` is the kernel's `vmbus_device_type`; 16 is HV_UNKNOWN, which is also what it calls the classes
that it leaves alone (`supported` is false) and hv_sock, whose class GUIDs are made of a port and a
fixed tail. `echo` and `netlike` are ours: no real guest and no real `lsvmbus` knows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final
from uuid import UUID

from emu.values import valueclass
from emu.wire.messages import ChannelFlags, PipeMode

HV_UNKNOWN: Final = 16
UNKNOWN_TEXT: Final = "Unknown"
PCI_VENDOR_ID_MICROSOFT: Final = 0x1414
"""The `vendor` attribute of every device in sysfs."""

_KIB: Final = 1024
_PLAIN: Final = ChannelFlags.ENUMERATE_DEVICE_INTERFACE
_PIPE: Final = ChannelFlags.NAMED_PIPE_MODE
_SOCKET: Final = _PLAIN | _PIPE | ChannelFlags.TLNPI_PROVIDER_OFFER


@valueclass()
class DeviceClass:
    """One class. `perf`: the guest spreads its channels over CPUs; `isolated`: allowed in an isolated VM.

    `ring_bytes` is what Linux's driver takes for one direction, control page included (None: no driver
    opens it). `chn_flags` and `pipe_mode` (None: no pipe) are what the host's offer carries.
    """

    number: int
    name: str
    linux_name: str
    guid: UUID
    perf: bool
    isolated: bool
    lsvmbus_text: str
    ring_bytes: int | None
    chn_flags: ChannelFlags = _PLAIN
    pipe_mode: PipeMode | None = None
    supported: bool = True


def _table() -> tuple[DeviceClass, ...]:
    """Lay out the table: number, name, Linux's name, GUID, perf, isolated, lsvmbus text, ring."""
    c, u, message = DeviceClass, UUID, PipeMode.MESSAGE
    reserved = "[Reserved system device]"
    # fmt: off
    return (
        c(0, "ide", "HV_IDE", u("32412632-86cb-44a2-9b5c-50d1417354f5"), True, False,
          "Synthetic IDE Controller", 128 * _KIB),
        c(1, "scsi", "HV_SCSI", u("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"), True, True,
          "Synthetic SCSI Controller", 128 * _KIB),
        c(2, "fc", "HV_FC", u("2f9bcc4a-0069-4af3-b76b-6fd0be528cda"), True, False,
          "Synthetic fiber channel adapter", 128 * _KIB),
        c(3, "nic", "HV_NIC", u("f8615163-df3e-46c5-913f-f2d2f965ed0e"), True, True,
          "Synthetic network adapter", 512 * _KIB),
        c(4, "nd", "HV_ND", u("8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501"), True, False,
          "Synthetic RDMA adapter", None),
        c(5, "pcie", "HV_PCIE", u("44c4f61d-4444-4400-9d52-802e27ede19f"), False, True,
          "PCI Express pass-through", 20 * _KIB),
        c(6, "fb", "HV_FB", u("da0a7802-e377-4aac-8e77-0558eb1073f8"), False, False,
          "Synthetic framebuffer adapter", 256 * _KIB, _PIPE, message),
        # No pipe header, although it is the mouse's sibling.
        c(7, "kbd", "HV_KBD", u("f912ad6d-2b17-48ea-bd65-f927a61c7684"), False, False,
          "Synthetic keyboard", 36 * _KIB, ChannelFlags(0)),
        c(8, "mouse", "HV_MOUSE", u("cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a"), False, False,
          "Synthetic mouse", 36 * _KIB, _PIPE, message),
        c(9, "kvp", "HV_KVP", u("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"), False, False,
          "[Data Exchange]", 16 * _KIB, _PLAIN | _PIPE, message),
        c(10, "ts", "HV_TS", u("9527e630-d0ae-497b-adce-e80ab0175caf"), False, True,
          "[Time Synchronization]", 16 * _KIB, _PLAIN | _PIPE, message),
        c(11, "hb", "HV_HB", u("57164f39-9115-4e78-ab55-382f3bd5422d"), False, True,
          "[Heartbeat]", 16 * _KIB, _PLAIN | _PIPE, message),
        c(12, "shutdown", "HV_SHUTDOWN", u("0e0b6031-5213-4934-818b-38d90ced39db"), False, True,
          "[Operating system shutdown]", 16 * _KIB, _PLAIN | _PIPE, message),
        c(13, "fcopy", "HV_FCOPY", u("34d14be3-dee4-41c8-9ae7-6b174977c192"), False, False,
          "[Guest services]", 20 * _KIB, _PLAIN | _PIPE, message),
        c(14, "backup", "HV_BACKUP", u("35fa2e29-ea23-4236-96ae-3a6ebacba440"), False, False,
          "[Backup (volume checkpoint)]", 16 * _KIB, _PLAIN | _PIPE, message),
        c(15, "dm", "HV_DM", u("525074dc-8985-46e2-8057-a307dc18a502"), False, False,
          "[Dynamic Memory]", 20 * _KIB),
        c(16, "avma1", "HV_UNKNOWN", u("f8e65716-3cb3-4a06-9a60-1889c5cccab5"), False, False,
          reserved, None, supported=False),
        c(16, "avma2", "HV_UNKNOWN", u("3375baf4-9e15-4b30-b765-67acb10d607b"), False, False,
          reserved, None, supported=False),
        c(16, "rdv", "HV_UNKNOWN", u("276aacf4-ac15-426c-98dd-7521ad3f01fe"), False, False,
          reserved, None, supported=False),
        c(16, "imc", "HV_UNKNOWN", u("c376c1c3-d276-48d2-90a9-c04748072c60"), False, False,
          UNKNOWN_TEXT, None, supported=False),
        c(16, "hv_sock", "HV_UNKNOWN", u("00000000-facb-11e6-bd58-64006a7986d3"), False, True,
          UNKNOWN_TEXT, 28 * _KIB, _SOCKET, PipeMode.BYTE),
        c(16, "serial", "HV_UNKNOWN", u("8b60ccf6-709f-4c11-90b5-229c959a9e6a"), False, False,
          UNKNOWN_TEXT, None, _PLAIN | _PIPE, message),
        c(16, "echo", "HV_UNKNOWN", u("6563686f-766d-4275-9d2d-656d752d3031"), True, False,
          UNKNOWN_TEXT, 64 * _KIB),
        c(16, "netlike", "HV_UNKNOWN", u("6e65746c-696b-4265-9d2d-656d752d3032"), True, False,
          UNKNOWN_TEXT, 64 * _KIB),
    )
    # fmt: on


CLASSES: Final = _table()
BY_NAME: Final[Mapping[str, DeviceClass]] = MappingProxyType({c.name: c for c in CLASSES})
BY_GUID: Final[Mapping[UUID, DeviceClass]] = MappingProxyType({c.guid: c for c in CLASSES})

HV_SOCK: Final = BY_NAME["hv_sock"]
ECHO: Final = BY_NAME["echo"]
NETLIKE: Final = BY_NAME["netlike"]
_HV_SOCK_TAIL: Final = HV_SOCK.guid.bytes[4:]
_REMEMBERED: Final[dict[UUID, DeviceClass]] = {}


def remember_classes(classes: Iterable[DeviceClass]) -> None:
    """Know classes of plugins by their GUIDs, too; what is said last of a GUID holds."""
    _REMEMBERED.update((one.guid, one) for one in classes)


def class_of(guid: UUID) -> DeviceClass | None:
    """Find the class of an offer's `if_type`; None for a GUID that nobody knows."""
    known = BY_GUID.get(guid) or _REMEMBERED.get(guid)
    if known is None and guid.bytes[4:] == _HV_SOCK_TAIL:
        return HV_SOCK
    return known


def device_number(guid: UUID) -> int:
    """The kernel's device type, the `device` attribute in sysfs; HV_UNKNOWN for what it does not know."""
    known = BY_GUID.get(guid)
    return HV_UNKNOWN if known is None else known.number


def lsvmbus_text(guid: UUID) -> str:
    """What `lsvmbus` prints for a class GUID."""
    known = BY_GUID.get(guid) or _REMEMBERED.get(guid)
    return UNKNOWN_TEXT if known is None else known.lsvmbus_text


def hv_sock_guid(port: int) -> UUID:
    """The class GUID of a service on a Linux AF_VSOCK port."""
    return UUID(bytes=port.to_bytes(4, "big") + _HV_SOCK_TAIL)


SINGLETON_INSTANCES: Final[Mapping[str, UUID]] = MappingProxyType(
    {
        "shutdown": UUID("b6650ff7-33bc-4840-8048-e0676786f393"),
        "ts": UUID("2dd1ce17-079e-403c-b352-a1921ee207ee"),
        "kvp": UUID("242ff919-07db-4180-9c2e-b86cb68c8c55"),
        "kbd": UUID("d34b2567-b9b6-42b9-8778-0a4ec0b955bf"),
        "mouse": UUID("58f75a6d-d949-4320-99e1-a2a2576d581c"),
        "imc": UUID("c4e5e7d1-d748-4afc-979d-683167910a55"),
    }
)
"""The instance GUIDs that OpenVMM gives to devices of which there is one."""
