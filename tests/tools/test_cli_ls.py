"""`ls`: the kernel's own lsvmbus, run on a tree of the same devices, prints the same bytes."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from emu.control import ActorKind
from emu.errors import DeadlinePassed, MissingPrerequisite
from emu.ipc.segments import unlink_objects
from emu.layout import MachineState
from emu.machine import Machine
from emu.mirror import Mirror, MirrorChannel
from emu.wire.device_classes import BY_NAME, CLASSES
from emu.wire.guids import braced
from guestproc.kernel.layout import ChannelState, Era, KernelTables
from hostproc.protocol.states import ChannelState as HostChannelState
from tools import kernel_source
from tools.device_list import ListedChannel, ListedDevice, guest_devices, host_devices, list_devices
from tools.kernel_source import tools_hv
from tools.ls import lsvmbus

RunCli = Callable[..., subprocess.CompletedProcess[str]]

DEVICES = [
    ListedDevice(
        relid=7 * number + 3,
        class_id=device_class.guid,
        device_id=UUID(int=number + 1),
        driver="",
        channels=tuple(
            ListedChannel(relid, relid % 4, index, "opened")
            for index, relid in enumerate([7 * number + 3, 2000 - number, 7 * number + 4][: 1 + number % 3])
        ),
    )
    for number, device_class in enumerate(CLASSES)
]


def write_tree(devices: list[ListedDevice], root: Path) -> None:
    """Write what lsvmbus reads of a sysfs: a directory a device, mapping lines primary first."""
    for device in devices:
        directory = root / str(device.device_id)
        directory.mkdir(parents=True)
        (directory / "id").write_text(f"{device.relid}\n")
        (directory / "class_id").write_text(f"{braced(device.class_id)}\n")
        (directory / "device_id").write_text(f"{braced(device.device_id)}\n")
        mapping = "".join(f"{channel.relid}:{channel.cpu}\n" for channel in device.channels)
        (directory / "channel_vp_mapping").write_text(mapping)


@pytest.mark.parametrize("verbosity", [0, 1, 2, 3])
def test_format_is_the_kernels_byte_for_byte(tmp_path: Path, verbosity: int) -> None:
    """Every class, ids of one to four digits, sub-channels in any order: lsvmbus prints what we print."""
    tree = tmp_path / "vmbus" / "devices"
    write_tree(DEVICES, tree)
    script = 'mount --bind "$1" /sys/bus && shift && exec "$@"'
    theirs = [sys.executable, str(tools_hv() / "lsvmbus"), *["-v"] * verbosity]

    done = subprocess.run(
        ["unshare", "-rm", "sh", "-ec", script, "sh", str(tmp_path), *theirs],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )

    assert lsvmbus(DEVICES, verbosity) == done.stdout


def test_no_device_prints_nothing() -> None:
    """A bus without devices is an empty listing."""
    assert lsvmbus([], 2) == ""


def add_channel(tables: KernelTables, relid: int, cpu: int, *, primary: int = 0, index: int = 0) -> int:
    """Give the guest kernel a channel that is open; its handle."""
    channel = tables.channels.alloc()
    assert channel is not None
    channel.relid = relid
    channel.target_cpu.store(cpu)
    channel.state.store(ChannelState.OPENED_STATE)
    channel.sub_channel_index = index
    channel.primary_channel = primary
    handle: int = channel.handle
    return handle


def add_device(tables: KernelTables, channel: int, class_name: str, instance: UUID, driver: int = 0) -> None:
    """Give the guest kernel a device on a channel."""
    device = tables.devices.alloc()
    assert device is not None
    device.channel = channel
    device.driver = driver
    device.dev_type = BY_NAME[class_name].guid.bytes_le
    device.dev_instance = instance.bytes_le


@pytest.fixture
def tables() -> Iterator[KernelTables]:
    """A guest kernel's tables in RAM of their own."""
    yield KernelTables.format(mmap.mmap(-1, 64 << 20), 4, Era.CURRENT)


def test_guests_records_become_devices(tables: KernelTables) -> None:
    """Device, driver, primary and sub-channels are joined by their handles, and sorted by relid."""
    driver = tables.drivers.alloc()
    assert driver is not None
    driver.number = 3
    driver.name = b"hv_echo"
    nic = add_channel(tables, relid=9, cpu=2)
    add_device(tables, nic, "nic", UUID(int=1))
    add_channel(tables, relid=4, cpu=1, primary=nic, index=1)
    add_device(tables, add_channel(tables, relid=5, cpu=0), "echo", UUID(int=2), driver=3)

    assert guest_devices(tables) == [
        ListedDevice(5, BY_NAME["echo"].guid, UUID(int=2), "hv_echo", (ListedChannel(5, 0, 0, "opened"),)),
        ListedDevice(
            9,
            BY_NAME["nic"].guid,
            UUID(int=1),
            "",
            (ListedChannel(9, 2, 0, "opened"), ListedChannel(4, 1, 1, "opened")),
        ),
    ]


def test_device_whose_channel_is_gone_is_not_listed(tables: KernelTables) -> None:
    """Between the two ends of a removal there is a device without a channel: nothing to list."""
    handle = add_channel(tables, relid=5, cpu=0)
    add_device(tables, handle, "echo", UUID(int=2))
    tables.channels.free(tables.channels.from_handle(handle))

    assert guest_devices(tables) == []


def test_record_that_goes_while_it_is_read_starts_the_look_again(
    tables: KernelTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale name is met by looking again, and after many times by giving up."""
    add_device(tables, add_channel(tables, relid=5, cpu=0), "echo", UUID(int=2))
    live, failures = tables.channels.live, iter(range(3))

    def stale_at_first() -> Iterator[object]:
        assert next(failures, None) is None, "stale"
        return live()

    monkeypatch.setattr(tables.channels, "live", stale_at_first)
    assert len(guest_devices(tables)) == 1

    failures = iter(range(1_000))
    with pytest.raises(DeadlinePassed):
        guest_devices(tables)


def mirror_channel(relid: int, index: int, vp: int, instance: int, state: HostChannelState) -> MirrorChannel:
    """A row of the host's mirror."""
    return MirrorChannel(
        relid=relid,
        state=state,
        generation=1,
        sub_channel_index=index,
        ring_gpadl=0,
        gpadl_count=0,
        target_vp=vp,
        connection_id=relid,
        flags=0,
        if_type=BY_NAME["echo"].guid,
        if_instance=UUID(int=instance),
    )


def test_hosts_channels_become_devices() -> None:
    """A foreign guest's devices are known by what the host offers: primaries and sub-channels by instance."""
    devices = host_devices(
        [
            mirror_channel(1, 1, 0, 5, HostChannelState.CLOSED),
            mirror_channel(2, 0, 1, 6, HostChannelState.CLOSED),
            mirror_channel(3, 0, 3, 5, HostChannelState.OPEN),
        ]
    )

    assert [(device.relid, device.device_id.int, device.state) for device in devices] == [
        (2, 6, "closed"),
        (3, 5, "open"),
    ]
    assert [(channel.relid, channel.cpu) for channel in devices[1].channels] == [(3, 3), (1, 0)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine of this process, with nothing running in it."""
    name = f"test-{os.getpid()}-ls"
    machine = Machine.create(name, {"no_guest": False}, ram_bytes=64 << 20, vp_indices=[0, 1], cpuid=[])
    machine.control.enlist(ActorKind.LAUNCHER, "launcher")
    machine.set_state(MachineState.RUNNING)
    yield machine
    unlink_objects(name)
    machine.close()


def test_ls_reads_the_guests_side_when_it_is_ours(machine: Machine, run_cli: RunCli) -> None:
    """With our guest's tables in RAM the command lists them, whatever the host says."""
    tables = KernelTables.format(mmap.mmap(machine.ram.fd, machine.ram.size), 2, Era.CURRENT)
    add_device(tables, add_channel(tables, relid=12, cpu=1), "scsi", UUID(int=1))

    plain = run_cli("ls", "--machine", machine.name)
    verbose = run_cli("ls", "-v", "--machine", machine.name)
    report = json.loads(run_cli("ls", "--json", "--machine", machine.name).stdout)

    assert (plain.stdout, plain.stderr) == ("VMBUS ID 12: Synthetic SCSI Controller\n", "")
    assert verbose.stdout == (
        "VMBUS ID 12: Class_ID = {ba6163d9-04a1-4d29-b605-72e2ffb1dc7f} - Synthetic SCSI Controller\n"
        "\tRel_ID=12, target_cpu=1\n\n"
    )
    assert report == {
        "schema": {"name": "vmbus-emu.ls", "version": 1},
        "machine": machine.name,
        "devices": [
            {
                "relid": 12,
                "class": "scsi",
                "class_id": "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f",
                "description": "Synthetic SCSI Controller",
                "instance": "00000000-0000-0000-0000-000000000001",
                "driver": None,
                "state": "opened",
                "channels": [{"relid": 12, "vcpu": 1, "sub_channel_index": 0, "state": "opened"}],
            }
        ],
    }


def test_ls_reads_the_hosts_side_of_a_foreign_guest(machine: Machine) -> None:
    """Without tables of ours in RAM the host's mirror is what is known."""
    Mirror(machine.control).write_channel(mirror_channel(2, 0, 1, 6, HostChannelState.OPEN))

    (device,) = list_devices(machine)

    assert (device.relid, device.class_name, device.channels[0].cpu) == (2, "echo", 1)


def test_kernel_source_that_is_not_installed_is_told_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the package there is no lsvmbus, and a line that says how to get it."""
    monkeypatch.setattr(kernel_source, "SOURCES", tmp_path)

    with pytest.raises(MissingPrerequisite, match="apt install linux-source"):
        tools_hv()


def test_archive_that_is_broken_leaves_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An archive that cannot be unpacked is told, and no half of it is taken for the whole."""
    (tmp_path / "linux-source-6.12.tar.xz").write_bytes(b"no archive")
    monkeypatch.setattr(kernel_source, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with pytest.raises(MissingPrerequisite, match="cannot unpack"):
        tools_hv()

    assert list((tmp_path / "cache/vmbus-emu/kernel-hv").iterdir()) == []
