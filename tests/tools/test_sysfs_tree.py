"""The tree against the records: every attribute of the reference, its text, its mode, and when it is not there."""

from __future__ import annotations

import errno
from uuid import UUID

import pytest

from emu.layout import MachineState
from emu.mirror import Mirror, MirrorChannel
from emu.wire.device_classes import BY_NAME
from guestproc.kernel.layout import ChannelState, Era
from guestproc.view import GuestView
from hostproc.protocol.states import ChannelState as HostChannelState
from tests.tools.sysfs_records import RAM_BYTES, Guest, guest_of, idle_machine, new_guest
from tools.sysfs_guest import GuestBus
from tools.sysfs_live import HostBus, LiveTree
from tools.sysfs_nodes import Attribute, Directory, Link, Node

MONITOR_GPAS = (RAM_BYTES - (3 << 20), RAM_BYTES - (2 << 20))
NIC_INSTANCE = 0x635161F83EDFC546913FF2D2F965ED0E

PLAIN = {
    "id": "9\n",
    "state": "3\n",
    "class_id": "{f8615163-df3e-46c5-913f-f2d2f965ed0e}\n",
    "device_id": "{635161f8-3edf-c546-913f-f2d2f965ed0e}\n",
    "modalias": "vmbus:635161f83edfc546913ff2d2f965ed0e\n",
    "uevent": "DRIVER=hv_netvsc\nMODALIAS=vmbus:635161f83edfc546913ff2d2f965ed0e\n",
    "vendor": "0x1414\n",
    "device": "0x3\n",
    "numa_node": "1\n",
    "channel_vp_mapping": "9:2\n12:0\n4:1\n",
    "driver_override": "(null)\n",
}
RINGS = {
    "out_intr_mask": "1\n",
    "out_read_index": "24\n",
    "out_write_index": "64\n",
    "out_read_bytes_avail": "40\n",
    "out_write_bytes_avail": "12248\n",
    "in_intr_mask": "0\n",
    "in_read_index": "12280\n",
    "in_write_index": "16\n",
    "in_read_bytes_avail": "24\n",
    "in_write_bytes_avail": "12264\n",
}
MONITORED = {
    "monitor_id": "70\n",
    "server_monitor_pending": "66\n",
    "server_monitor_latency": "100\n",
    "server_monitor_conn_id": "1194684\n",
    "client_monitor_pending": "-2147483648\n",
    "client_monitor_latency": "200\n",
    "client_monitor_conn_id": "5\n",
}
CHANNEL = {
    "cpu": "2\n",
    "interrupts": "18446744073709551615\n",
    "events": "7\n",
    "intr_in_full": "1\n",
    "intr_out_empty": "2\n",
    "out_full_first": "3\n",
    "out_full_total": "4\n",
    "subchannel_id": "0\n",
}
CHANNEL_RINGS = {"out_mask": "1\n", "in_mask": "0\n", "read_avail": "24\n", "write_avail": "12248\n"}
CHANNEL_MONITORED = {"pending": "-2147483648\n", "latency": "200\n", "monitor_id": "70\n"}
SEED_ONLY = {"out_mask", "in_mask", "read_avail", "write_avail", "cpu", "interrupts", "events"}
LINKS = {"channels", "subsystem", "driver"}


def walk(directory: Directory, path: str) -> Node:
    """The node at a path, which must be there."""
    node: Node | None = directory
    for name in path.split("/"):
        assert isinstance(node, Directory), path
        node = node.find(name)
    assert node is not None, path
    return node


def listing(directory: Directory, path: str) -> set[str]:
    """Names in the directory at a path."""
    node = walk(directory, path)
    assert isinstance(node, Directory)
    return set(node.names())


def text(directory: Directory, path: str) -> str:
    """What a read of the attribute at a path gives."""
    node = walk(directory, path)
    assert isinstance(node, Attribute)
    return node.show()


def texts(directory: Directory, path: str) -> dict[str, str]:
    """What every attribute of a directory says."""
    return {
        name: text(directory, f"{path}/{name}")
        for name in listing(directory, path)
        if isinstance(walk(directory, f"{path}/{name}"), Attribute)
    }


def failure(directory: Directory, path: str) -> int | None:
    """The errno of a read of the attribute at a path."""
    with pytest.raises(OSError) as caught:
        text(directory, path)
    return caught.value.errno


def nic(guest: Guest) -> tuple[str, GuestBus]:
    """A NIC with two sub-channels on four CPUs in two nodes; its name, and the tree."""
    connection = guest.tables.connection
    connection.nr_numa_nodes = 2
    connection.numa_cpus[0], connection.numa_cpus[1] = 0b0011, 0b1100
    guest.driver(5, "hv_storvsc")
    guest.driver(6, "hv_netvsc")
    _, channel = guest.device(9, NIC_INSTANCE, "nic", driver=6, cpu=2)
    guest.sub_channel(channel, 12, 1)
    guest.sub_channel(channel, 4, 2, cpu=1)
    channel.interrupts = 0xFFFFFFFFFFFFFFFF
    channel.sig_events.store(7)
    channel.intr_in_full, channel.intr_out_empty = 1, 2
    channel.out_full_first, channel.out_full_total = 3, 4
    return str(UUID(int=NIC_INSTANCE)), GuestBus(GuestView(guest.tables))


def give_rings(guest: Guest) -> None:
    """Give the NIC its rings, with something in both."""
    channel = guest.tables.channels.at(0)
    outbound, inbound = guest.rings(channel)
    guest.ring_words(outbound, write=64, read=24, mask=1)
    guest.ring_words(inbound, write=16, read=12280, mask=0)


def give_monitor(guest: Guest) -> None:
    """Give the NIC a monitor, number 70: bit 6 of group 2 of two pages with different words."""
    channel = guest.tables.channels.at(0)
    channel.monitor_allocated, channel.monitor_grp, channel.monitor_bit = 1, 2, 6
    words = ((0x42, 100, 0xFF123ABC), (0x80000000, 200, 5))
    for page, (gpa, (pending, latency, connection_id)) in enumerate(zip(MONITOR_GPAS, words, strict=True)):
        guest.tables.connection.monitor_page_gpas[page] = gpa
        guest.store(gpa + 8 + 8 * 2, pending)
        guest.store(gpa + 576 + 2 * 70, latency, 2)
        guest.store(gpa + 1088 + 8 * 70, connection_id)


def test_every_attribute_says_what_the_records_say() -> None:
    """With rings and a monitor all attributes of the reference are there, and each has its text."""
    guest = new_guest()
    name, tree = nic(guest)
    give_rings(guest)
    give_monitor(guest)

    assert texts(tree.parent, name) == PLAIN | RINGS | MONITORED
    assert texts(tree.parent, f"{name}/channels/9") == CHANNEL | CHANNEL_RINGS | CHANNEL_MONITORED
    assert listing(tree.parent, name) == set(PLAIN | RINGS | MONITORED) | LINKS
    assert text(tree.bus, "hibernation") == "0\n"
    assert text(tree.bus, "drivers_autoprobe") == "1\n"
    assert failure(tree.bus, "drivers_probe") == failure(tree.bus, "uevent") == errno.EACCES


def test_ring_attributes_are_einval_without_a_ring() -> None:
    """Before the channel is opened, and after it was closed, a ring's attributes are there and cannot be read."""
    guest = new_guest()
    name, tree = nic(guest)

    assert listing(tree.parent, name) == set(PLAIN | RINGS) | LINKS
    assert {failure(tree.parent, f"{name}/{one}") for one in RINGS} == {errno.EINVAL}
    assert {failure(tree.parent, f"{name}/channels/9/{one}") for one in CHANNEL_RINGS} == {errno.EINVAL}
    assert {one: text(tree.parent, f"{name}/{one}") for one in PLAIN} == PLAIN


def test_monitor_attributes_are_hidden_without_a_monitor() -> None:
    """Where the host allocated none they are not even found; with one, and no page yet, they are EINVAL."""
    guest = new_guest()
    name, tree = nic(guest)
    device = walk(tree.parent, name)
    assert isinstance(device, Directory)
    assert {device.find(one) for one in MONITORED} == {None}
    assert listing(tree.parent, f"{name}/channels/9") == set(CHANNEL | CHANNEL_RINGS)

    guest.tables.channels.at(0).monitor_allocated = 1

    assert failure(tree.parent, f"{name}/server_monitor_pending") == errno.EINVAL
    assert failure(tree.parent, f"{name}/channels/9/latency") == errno.EINVAL


def test_numbers_are_signed_where_the_kernel_prints_them_so() -> None:
    """A mask or an index with its top bit set is negative in a device's directory and is not in a channel's."""
    guest = new_guest()
    name, tree = nic(guest)
    outbound, _ = guest.rings(guest.tables.channels.at(0))
    guest.ring_words(outbound, write=0xFFFFFFFF, read=0, mask=0xFFFFFFFE)

    assert text(tree.parent, f"{name}/out_intr_mask") == "-2\n"
    assert text(tree.parent, f"{name}/out_write_index") == "-1\n"
    assert text(tree.parent, f"{name}/channels/9/out_mask") == "4294967294\n"


@pytest.mark.parametrize("state", ChannelState)
def test_state_is_the_channels(state: ChannelState) -> None:
    """0 to 3, as the channel's record says at that moment."""
    guest = new_guest()
    name, tree = nic(guest)

    guest.tables.channels.at(0).state.store(state)

    assert text(tree.parent, f"{name}/state") == f"{int(state)}\n"


def test_modes_are_the_kernels() -> None:
    """Everything is 0444, but for what root may write: 0644."""
    guest = new_guest()
    name, tree = nic(guest)
    give_monitor(guest)

    def modes(path: str) -> dict[str, int]:
        nodes = {one: walk(tree.parent, f"{path}/{one}") for one in listing(tree.parent, path)}
        return {one: node.mode for one, node in nodes.items() if isinstance(node, Attribute)}

    assert {one for one, mode in modes(name).items() if mode != 0o444} == {"driver_override", "uevent"}
    assert {one for one, mode in modes(f"{name}/channels/9").items() if mode != 0o444} == {"cpu"}
    assert modes(f"{name}/channels/9")["cpu"] == modes(name)["driver_override"] == 0o644


def test_sub_channels_have_directories_of_their_own() -> None:
    """Every channel of a device is found by its relid, and no other channel is."""
    guest = new_guest()
    name, tree = nic(guest)
    guest.device(5, 5)

    assert listing(tree.parent, f"{name}/channels") == {"9", "12", "4"}
    assert text(tree.parent, f"{name}/channels/4/cpu") == "1\n"
    assert text(tree.parent, f"{name}/channels/4/subchannel_id") == "2\n"
    channels = walk(tree.parent, f"{name}/channels")
    assert isinstance(channels, Directory)
    assert [channels.find(wrong) for wrong in ("5", "04", "0", "")] == [None] * 4


def test_devices_and_drivers_are_linked_both_ways() -> None:
    """Bus and driver point at the device, the device at its driver and its bus; unbound it has no driver."""
    guest = new_guest()
    name, tree = nic(guest)
    guest.device(3, 3)
    other = str(UUID(int=3))

    assert set(tree.parent.names()) == listing(tree.bus, "devices") == {name, other}
    assert walk(tree.bus, f"devices/{name}") == Link(f"../../../devices/vmbus-emu/{name}")
    assert listing(tree.bus, "drivers") == {"hv_netvsc", "hv_storvsc"}
    files = {"bind", "unbind", "new_id", "remove_id", "uevent"}
    assert listing(tree.bus, "drivers/hv_netvsc") == {name, *files}
    assert listing(tree.bus, "drivers/hv_storvsc") == files
    assert walk(tree.bus, f"drivers/hv_netvsc/{name}") == Link(f"../../../../devices/vmbus-emu/{name}")
    assert walk(tree.parent, f"{name}/driver") == Link("../../../bus/vmbus/drivers/hv_netvsc")
    assert walk(tree.parent, f"{name}/subsystem") == Link("../../../bus/vmbus")
    assert "driver" not in listing(tree.parent, other)
    assert text(tree.parent, f"{other}/uevent").startswith("MODALIAS=")


def test_driver_override_names_the_driver() -> None:
    """What may alone bind the device is said by its name."""
    guest = new_guest()
    name, tree = nic(guest)
    guest.tables.devices.at(0).driver_override = b"hv_storvsc"

    assert text(tree.parent, f"{name}/driver_override") == "hv_storvsc\n"


def test_names_that_the_kernel_would_not_print_are_not_found() -> None:
    """Upper case, braces, other instances and plain nonsense name no device and no driver."""
    guest = new_guest()
    name, tree = nic(guest)
    wrong = (name.upper(), f"{{{name}}}", name.replace("-", ""), str(UUID(int=1)), "x", "")

    assert [tree.parent.find(one) for one in wrong] == [None] * len(wrong)
    drivers = walk(tree.bus, "drivers")
    driver = walk(tree.bus, "drivers/hv_netvsc")
    assert isinstance(drivers, Directory)
    assert isinstance(driver, Directory)
    assert drivers.find("hv_utils") is None
    assert driver.find(str(UUID(int=1))) is None


def test_open_file_of_a_device_that_went_is_enodev() -> None:
    """Who held a file, a device's directory or a channel's finds it dead, also when the instance is back."""
    guest = new_guest()
    device, _ = guest.device(3, 7)
    name, tree = str(UUID(int=7)), GuestBus(GuestView(guest.tables))
    files = [walk(tree.parent, f"{name}/{one}") for one in ("id", "modalias", "channels/3/interrupts")]
    directories = [walk(tree.parent, one) for one in (name, f"{name}/channels", f"{name}/channels/3")]

    guest.remove(device)
    assert tree.parent.names() == []
    guest.device(4, 7)

    for file in files:
        assert isinstance(file, Attribute)
        with pytest.raises(OSError) as caught:
            file.show()
        assert caught.value.errno == errno.ENODEV
    for directory in directories:
        assert isinstance(directory, Directory)
        assert directory.names() == []
        assert [directory.find(one) for one in ("id", "3", "interrupts")] == [None] * 3
    assert text(tree.parent, f"{name}/id") == "4\n"


def test_values_are_those_of_the_moment() -> None:
    """An attribute that is held shows what the record says at each read."""
    guest = new_guest()
    name, tree = nic(guest)
    interrupts = walk(tree.parent, f"{name}/channels/9/interrupts")
    assert isinstance(interrupts, Attribute)
    channel = guest.tables.channels.at(0)

    shown = []
    for count in (0, 1, 12):
        channel.interrupts = count
        shown.append(interrupts.show())

    assert shown == ["0\n", "1\n", "12\n"]


def test_seed_kernel_has_fewer_attributes() -> None:
    """Era `seed`: no counters of full rings, no hibernation, and `cpu` is nobody's to write."""
    guest = new_guest(Era.SEED)
    name, tree = nic(guest)
    give_monitor(guest)

    assert listing(tree.parent, f"{name}/channels/9") == SEED_ONLY | {"pending", "latency"}
    cpu = walk(tree.parent, f"{name}/channels/9/cpu")
    assert isinstance(cpu, Attribute)
    assert cpu.mode == 0o444
    assert tree.bus.find("hibernation") is None


# -- which tree a machine has -------------------------------------------------------------------------------


def offer(mirror: Mirror, relid: int, index: int, vp: int, *, open_channels: int = 0) -> None:
    """Let the host offer a channel of an echo device."""
    mirror.write_channel(
        MirrorChannel(
            relid=relid,
            state=HostChannelState.OPEN,
            generation=1,
            sub_channel_index=index,
            ring_gpadl=0,
            gpadl_count=0,
            target_vp=vp,
            connection_id=relid,
            flags=0,
            if_type=BY_NAME["echo"].guid,
            if_instance=UUID(int=6),
        )
    )
    publish(mirror)


def publish(mirror: Mirror) -> None:
    """Let the host finish a round."""
    mirror.write_head(
        version=0,
        offers=0,
        open_channels=0,
        gpadls=0,
        to_slots=0,
        outgoing=0,
        incoming=0,
        attached_pid=0,
        disconnects=0,
    )


def test_foreign_guest_is_shown_as_the_host_knows_it() -> None:
    """Ids, class and VPs come from the offers; what only the guest's kernel knows is not there."""
    with idle_machine("sysfs-host") as machine:
        mirror = Mirror(machine.control)
        tree = HostBus(mirror)
        publish(mirror)
        assert tree.parent.names() == []
        offer(mirror, 2, 0, 1)
        offer(mirror, 3, 1, 0)
        name = str(UUID(int=6))
        held = walk(tree.parent, f"{name}/channels/3/cpu")
        assert isinstance(held, Attribute)

        assert texts(tree.parent, name) == {
            "id": "2\n",
            "class_id": "{6563686f-766d-4275-9d2d-656d752d3031}\n",
            "device_id": f"{{{name}}}\n",
            "modalias": "vmbus:6f6863656d7675429d2d656d752d3031\n",
            "vendor": "0x1414\n",
            "device": "0x10\n",
            "channel_vp_mapping": "2:1\n3:0\n",
        }
        assert texts(tree.parent, f"{name}/channels/3") == {"cpu": "0\n", "subchannel_id": "1\n"}
        assert listing(tree.bus, "devices") == {name}
        assert listing(tree.bus, "drivers") == set()

        mirror.clear_channel(3, 1)
        publish(mirror)
        assert listing(tree.parent, f"{name}/channels") == {"2"}
        with pytest.raises(OSError, match="No such device"):
            held.show()
        mirror.clear_channel(2, 1)
        publish(mirror)
        assert tree.parent.names() == []
        assert tree.parent.find(name) is None


@pytest.mark.parametrize("how", ["stopping", "launcher died"])
def test_machine_that_ends_has_an_empty_bus(how: str) -> None:
    """The bus stays and has no device; a file that is open is ENODEV."""
    with idle_machine("sysfs-end") as machine:
        guest = guest_of(machine)
        guest.device(3, 7)
        tree = LiveTree(machine)
        held = walk(tree.parent, f"{UUID(int=7)}/id")
        assert isinstance(held, Attribute)
        assert held.show() == "3\n"

        if how == "stopping":
            machine.set_state(MachineState.STOPPING)
        else:
            tree.gone = True

        assert (tree.parent.names(), listing(tree.bus, "devices")) == ([], set())
        assert tree.bus.names() == ["devices", "drivers", "hibernation"]
        with pytest.raises(OSError, match="No such device"):
            held.show()


def test_guest_that_boots_later_is_seen_when_it_is_there() -> None:
    """Until our guest's tables lie in RAM the host's side is shown, from then on the guest's."""
    with idle_machine("sysfs-boot") as machine:
        tree = LiveTree(machine)
        offer(Mirror(machine.control), 2, 0, 1)
        assert tree.parent.names() == [str(UUID(int=6))]

        guest_of(machine).device(3, 7)

        assert tree.parent.names() == [str(UUID(int=7))]
