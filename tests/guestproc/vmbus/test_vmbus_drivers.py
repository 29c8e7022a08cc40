"""The driver model: who takes which device, when, and what user space hears of it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from emu.wire.device_classes import BY_NAME
from emu.wire.messages import MessageType, OpenChannelResult
from guestproc.current import Current
from guestproc.drivers.driver import DRIVER_OBJECTS
from guestproc.drivers.echo import EchoDriver
from guestproc.kernel.layout import CallbackMode, ChannelState, Device
from guestproc.protocol import uevent_text
from guestproc.user import end_user_space, run_call
from guestproc.vmbus.device import (
    vmbus_device_unregister,
    vmbus_driver_register,
    vmbus_driver_unregister,
    vmbus_shutdown,
)
from tests.guestproc.world import Task, World

T = MessageType
NIC = BY_NAME["nic"].guid
ECHO = BY_NAME["echo"].guid
UIO = "uio_hv_generic"


class Spy:
    """A driver that opens nothing and notes what is asked of it."""

    def __init__(self, number: int, name: str, *classes: UUID, error: int = 0) -> None:
        self.number = number
        self.name = name
        self.id_table = frozenset(one.bytes_le for one in classes)
        self.error = error
        self.calls: list[tuple[str, int]] = []

    def _note(self, current: Current, what: str, device: Device) -> None:
        self.calls.append((what, current.channel(device.channel).relid))

    def probe(self, current: Current, device: Device) -> int:
        self._note(current, "probe", device)
        return -self.error

    def remove(self, current: Current, device: Device) -> None:
        self._note(current, "remove", device)

    def shutdown(self, current: Current, device: Device) -> None:
        self._note(current, "shutdown", device)


@pytest.fixture
def spies() -> Iterator[list[Spy]]:
    """Two more drivers that every process knows and nobody has registered: for NICs, and one that fails."""
    made = [Spy(60, "hv_spy", NIC), Spy(61, "hv_grump", NIC, error=errno.ENXIO)]
    DRIVER_OBJECTS.update({spy.number: spy for spy in made})
    yield made
    for spy in made:
        del DRIVER_OBJECTS[spy.number]


def call(world: World, name: str, **arguments: Any) -> dict[str, Any]:
    """One call of user space, to its end."""
    return world.call(lambda current: run_call(current, name, arguments))


def begin(world: World, name: str, *, cpu: int = 0, **arguments: Any) -> Task[dict[str, Any]]:
    """One that may hang."""
    return world.start(lambda current: run_call(current, name, arguments), cpu=cpu)


def heads(world: World) -> list[str]:
    """What user space was told, by action and place, devices by the last digits of their instance."""
    found = [one.head for one in uevent_text.since(world.tables, 0)]
    return [head.replace("/devices/vmbus-emu/00000000-0000-0000-0000-0000000000", "") for head in found]


def driver_of(world: World, relid: int) -> str:
    """Who has a device."""
    number = device_of(world, relid).driver
    return DRIVER_OBJECTS[number].name if number else ""


def device_of(world: World, relid: int) -> Device:
    """The device of a relid."""
    device: Device = world.tables.devices.from_handle(world.channel(relid).device_obj)
    return device


def offered(world: World, relid: int, class_id: UUID = ECHO) -> None:
    """A device that was offered, and whatever came of it."""
    world.host.device(relid, class_id=class_id)
    world.settle()


def probe_failures(world: World) -> list[str]:
    """What the kernel's log has of them."""
    return [line for line in world.log if line.startswith("probe failed")]


# -- unbind, bind ---------------------------------------------------------------------------------------


def test_unbound_device_stays_and_can_be_bound_again(booted: World) -> None:
    """remove closes the channel; the device is on the bus, its relid is not given back; bind opens it anew."""
    offered(booted, 9)
    gone = call(booted, "unbind", device="9")

    assert gone["driver"] == ""
    assert booted.channel(9).state.load() == ChannelState.OPEN_STATE
    assert booted.host.types()[-2:] == [T.CLOSECHANNEL, T.GPADL_TEARDOWN]
    assert booted.host.released == []
    back = call(booted, "bind", driver="hv_echo", device="9")
    assert back["driver"] == "hv_echo"
    assert booted.channel(9).state.load() == ChannelState.OPENED_STATE
    assert booted.shut_down() == {}


def test_device_is_named_by_relid_or_instance(booted: World) -> None:
    """Both mean the same one."""
    offered(booted, 9)

    assert call(booted, "unbind", device=str(UUID(int=9)))["device"] == str(UUID(int=9))
    assert call(booted, "bind", driver="hv_echo", device="9")["device"] == str(UUID(int=9))


@pytest.mark.parametrize(
    ("name", "arguments", "number", "words"),
    [
        ("bind", {"driver": "hv_echo", "device": "9"}, errno.EBUSY, "has a driver already"),
        ("bind", {"driver": UIO, "device": "9"}, errno.EBUSY, "has a driver already"),
        ("bind", {"driver": UIO, "device": "10"}, errno.ENODEV, "does not match"),
        ("bind", {"driver": "hv_nobody", "device": "9"}, errno.ENODEV, "ctl drivers"),
        ("bind", {"driver": "hv_spy", "device": "9"}, errno.ENODEV, "ctl drivers"),
        ("bind", {"driver": "hv_echo", "device": "77"}, errno.ENODEV, "vmbus-emu ls"),
        ("unbind", {"device": "10"}, errno.ENODEV, "no driver has it"),
        ("unbind", {"device": "9", "driver": UIO}, errno.ENODEV, "is not bound to it"),
        ("unbind", {"device": "what"}, errno.EINVAL, "no GUID"),
        ("unbind", {"device": "{" + str(UUID(int=9)) + "}"}, errno.EINVAL, "no GUID"),
        ("new_id", {"driver": UIO, "guid": "12345"}, errno.EINVAL, "no GUID"),
        ("new_id", {"driver": "nobody", "guid": str(NIC)}, errno.ENODEV, "ctl drivers"),
        ("remove_id", {"driver": UIO, "guid": str(NIC)}, errno.ENODEV, "no id that was added"),
        ("override", {"device": "9", "driver": "x" * 32}, errno.EINVAL, "shorten"),
        ("register", {"driver": "hv_echo"}, errno.EBUSY, "registered already"),
        ("register", {"driver": "hv_nobody"}, errno.ENOENT, "there are hv_echo"),
        ("unregister", {"driver": "hv_spy"}, errno.ENODEV, "not registered"),
        ("eject", {}, errno.ENOSYS, "there are bind"),
    ],
)
def test_refusal_is_the_kernels_errno_with_a_cure(
    booted: World, spies: list[Spy], name: str, arguments: dict[str, Any], number: int, words: str
) -> None:
    """Each has the errno that a write to sysfs gets, one line, and changes nothing."""
    offered(booted, 9)
    offered(booted, 10)
    if arguments.get("driver") == UIO and name == "bind" and arguments["device"] == "9":
        call(booted, "new_id", driver=UIO, guid=str(ECHO))
    call(booted, "unbind", device="10")
    refused = call(booted, name, **arguments)

    assert refused["errno"] == number
    assert refused["error"].startswith(f"-{errno.errorcode[number]}: ") and words in refused["error"]
    assert "\n" not in refused["error"]
    assert (driver_of(booted, 9), driver_of(booted, 10)) == ("hv_echo", "")
    assert booted.tables.connection.user_calls.load() == 0
    assert booted.shut_down() == {}


# -- ids, override --------------------------------------------------------------------------------------


def test_id_that_is_added_probes_what_has_no_driver(booted: World) -> None:
    """Those of that class without a driver are bound at once; who has one keeps it; later ones are asked in order."""
    offered(booted, 9)
    offered(booted, 10)
    call(booted, "unbind", device="10")
    told = call(booted, "new_id", driver=UIO, guid=str(ECHO))

    assert (told["devices"], told["dynamic_ids"]) == (1, [str(ECHO)])
    assert (driver_of(booted, 9), driver_of(booted, 10)) == ("hv_echo", UIO)
    assert call(booted, "new_id", driver=UIO, guid=str(ECHO))["errno"] == errno.EEXIST
    offered(booted, 11)
    assert driver_of(booted, 11) == "hv_echo"
    assert booted.shut_down() == {}


def test_id_that_is_taken_back_leaves_who_is_bound(booted: World) -> None:
    """And nobody new is taken by it."""
    call(booted, "unregister", driver="hv_echo")
    call(booted, "new_id", driver=UIO, guid=str(ECHO))
    offered(booted, 9)
    told = call(booted, "remove_id", driver=UIO, guid=str(ECHO))
    offered(booted, 10)

    assert (told["devices"], told["dynamic_ids"]) == (1, [])
    assert (driver_of(booted, 9), driver_of(booted, 10)) == (UIO, "")


def test_override_matches_without_an_id_and_excludes_others(booted: World) -> None:
    """Nothing is unbound by it; then only that driver, known or not, may bind; an empty name lifts it."""
    offered(booted, 9)
    told = call(booted, "override", device="9", driver=UIO)
    assert (told["driver"], told["driver_override"]) == ("hv_echo", UIO)
    call(booted, "unbind", device="9")

    assert call(booted, "bind", driver="hv_echo", device="9")["errno"] == errno.ENODEV
    assert call(booted, "bind", driver=UIO, device="9")["driver"] == UIO
    call(booted, "override", device="9", driver="not_written_yet")
    call(booted, "unbind", device="9")
    assert call(booted, "bind", driver=UIO, device="9")["errno"] == errno.ENODEV
    call(booted, "override", device="9", driver="")
    assert call(booted, "bind", driver="hv_echo", device="9")["driver"] == "hv_echo"


# -- registering, probing -------------------------------------------------------------------------------


def test_driver_that_is_registered_late_probes_what_is_there(booted: World, spies: list[Spy]) -> None:
    """Devices that it matches and that have no driver; its remove is called when it goes, and they stay."""
    spy = spies[0]
    call(booted, "unregister", driver="hv_echo")
    offered(booted, 9, NIC)
    offered(booted, 10)
    assert driver_of(booted, 9) == ""
    told = call(booted, "register", driver="hv_spy")

    assert (told["registered"], told["devices"]) == (True, 1)
    assert (driver_of(booted, 9), driver_of(booted, 10)) == ("hv_spy", "")
    call(booted, "unregister", driver="hv_spy")
    assert spy.calls == [("probe", 9), ("remove", 9)]
    assert driver_of(booted, 9) == ""
    assert call(booted, "register", driver="hv_echo")["devices"] == 2


def test_probe_that_fails_leaves_the_device_to_the_next(booted: World, spies: list[Spy]) -> None:
    """Its errno is logged; the next driver that matches is tried, and without one the device stays unbound."""
    spy, grump = spies
    call(booted, "unregister", driver="hv_echo")
    call(booted, "register", driver="hv_grump")
    offered(booted, 9, NIC)
    assert probe_failures(booted) == [f"probe failed for device {UUID(int=9)} ({-errno.ENXIO})"]
    assert device_of(booted, 9).probe_error == errno.ENXIO
    call(booted, "register", driver="hv_spy")
    offered(booted, 10, NIC)

    assert (driver_of(booted, 9), driver_of(booted, 10)) == ("hv_spy", "hv_spy")
    assert grump.calls == [("probe", 9), ("probe", 10)]
    assert booted.host.released == []
    refused = call(booted, "unbind", device="9") and call(booted, "bind", driver="hv_grump", device="9")
    assert refused["errno"] == errno.ENXIO
    assert spy.calls == [("probe", 9), ("probe", 10), ("remove", 9)]


def test_host_that_refuses_a_channel_fails_the_probe(booted: World) -> None:
    """-EAGAIN in the log; once it lets the channel be opened, bind opens it."""
    booted.host.answer[T.OPENCHANNEL] = lambda message: [OpenChannelResult(9, 9, 1)]
    offered(booted, 9)
    assert probe_failures(booted) == [f"probe failed for device {UUID(int=9)} ({-errno.EAGAIN})"]
    assert call(booted, "bind", driver="hv_echo", device="9")["errno"] == errno.EAGAIN
    del booted.host.answer[T.OPENCHANNEL]

    assert call(booted, "bind", driver="hv_echo", device="9")["driver"] == "hv_echo"
    assert booted.shut_down() == {}


def test_shutdown_is_told_to_drivers_that_want_to_know(booted: World, spies: list[Spy]) -> None:
    """Those with a device; the device stays bound until the drivers are unloaded."""
    call(booted, "unregister", driver="hv_echo")
    call(booted, "register", driver="hv_spy")
    offered(booted, 9, NIC)
    offered(booted, 10)
    booted.call(vmbus_shutdown)
    assert spies[0].calls == [("probe", 9), ("shutdown", 9)]

    assert booted.shut_down() == {}
    assert spies[0].calls[2:] == [("remove", 9)]


def test_generic_driver_opens_in_direct_mode(booted: World) -> None:
    """An interrupt masks the ring and counts an event; packets stay for whoever reads them."""
    call(booted, "unregister", driver="hv_echo")
    call(booted, "new_id", driver=UIO, guid=str(ECHO))
    offered(booted, 9)
    channel = booted.channel(9)
    booted.host.write(9, b"one")
    booted.settle()
    booted.host.write(9, b"two")
    booted.settle()

    assert channel.callback_mode == CallbackMode.DIRECT
    assert device_of(booted, 9).driver_state[0] == 1
    assert channel.interrupts == 1
    call(booted, "unbind", device="9")
    assert (channel.callback_mode, channel.rescind_callback) == (CallbackMode.BATCHED, 0)


def test_generic_driver_unregisters_its_device_itself(booted: World) -> None:
    """Its rescind callback does what the handler does otherwise: released once, nothing left."""
    call(booted, "unregister", driver="hv_echo")
    call(booted, "new_id", driver=UIO, guid=str(ECHO))
    offered(booted, 9)
    booted.host.rescind(9)
    booted.settle()

    assert booted.host.released == [9]
    assert booted.tables.devices.in_use == 0
    assert booted.shut_down() == {}


# -- probes that hang -----------------------------------------------------------------------------------


def test_rescind_waits_for_a_probe_that_hangs(booted: World) -> None:
    """The handler waits for probe_done; when the probe ends, the device goes, released once."""
    call(booted, "fail", where="probe_hang", times=1, relid=9)
    offered(booted, 9)
    booted.host.rescind(9)
    booted.settle()
    assert booted.channel(9).rescind.load() and not booted.channel(9).probe_done.load() & 1
    assert booted.host.released == []
    call(booted, "fail", where="probe_hang", times=0, relid=0)

    assert booted.host.released == [9]
    assert probe_failures(booted) == [f"probe failed for device {UUID(int=9)} ({-errno.ENODEV})"]
    assert booted.shut_down() == {}


def test_probe_that_hangs_ends_by_itself(booted: World) -> None:
    """Nobody lets it go: behind 30 s it goes on, and what waited for it does."""
    call(booted, "fail", where="probe_hang", times=1, relid=0)
    offered(booted, 9)
    task = begin(booted, "unbind", device="9")
    booted.settle()
    assert not task.ended()
    booted.pass_time(31)

    assert task.result["driver"] == ""
    assert booted.shut_down() == {}


def test_offers_of_other_devices_wait_behind_a_probe_that_hangs(booted: World) -> None:
    """One queue for primaries: the next device's probe comes when the first has ended, as in the kernel."""
    call(booted, "fail", where="probe_hang", times=1, relid=9)
    offered(booted, 9)
    offered(booted, 10)
    assert booted.channel(10).state.load() == ChannelState.OFFER_STATE
    call(booted, "fail", where="probe_hang", times=0, relid=0)

    assert [booted.channel(relid).state.load() for relid in (9, 10)] == [ChannelState.OPENED_STATE] * 2


def test_shutdown_lets_a_hanging_probe_go_and_ends_user_space(booted: World) -> None:
    """Calls that run end first, none begins afterwards, and everything is given back."""
    offered(booted, 9)
    call(booted, "unbind", device="9")
    call(booted, "fail", where="probe_hang", times=1, relid=0)
    hangs = begin(booted, "bind", cpu=1, driver="hv_echo", device="9")
    booted.settle()
    assert not hangs.ended()
    booted.call(end_user_space)

    assert hangs.result["driver"] == "hv_echo"
    assert call(booted, "drivers")["errno"] == errno.ENODEV
    assert booted.shut_down() == {}


def test_call_before_the_bus_is_up(world: World) -> None:
    """-ENODEV: there is no bus to write to."""
    world.boot_bus()

    assert call(world, "drivers")["errno"] == errno.ENODEV


# -- uevents --------------------------------------------------------------------------------------------


def test_uevents_of_a_device(booted: World) -> None:
    """Added, bound, its channel's directory; unbound and bound by hand; gone with its channel."""
    before = uevent_text.since(booted.tables, 0)[-1].seqnum
    offered(booted, 9)
    call(booted, "unbind", device="9")
    call(booted, "bind", driver="hv_echo", device="9")
    booted.host.rescind(9)
    booted.settle()

    assert heads(booted)[-8:] == [
        "add@09",
        "bind@09",
        "add@09/channels/9",
        "unbind@09",
        "bind@09",
        "unbind@09",
        "remove@09",
        "remove@09/channels/9",
    ]
    assert [one.seqnum for one in uevent_text.since(booted.tables, before)] == list(range(before + 1, before + 9))


def test_uevent_as_user_space_reads_it(booted: World) -> None:
    """The bytes of the netlink message: head, action, path, subsystem, the driver while there is one, alias, number."""
    offered(booted, 9, NIC)
    added, bound, channel = uevent_text.since(booted.tables, 0)[-3:]
    path = f"/devices/vmbus-emu/{UUID(int=9)}"

    assert (
        bound.text
        == (
            f"bind@{path}\0ACTION=bind\0DEVPATH={path}\0SUBSYSTEM=vmbus\0DRIVER=hv_echo\0"
            f"MODALIAS=vmbus:635161f83edfc546913ff2d2f965ed0e\0SEQNUM={bound.seqnum}\0"
        ).encode()
    )
    assert "DRIVER" not in added.variables
    assert channel.variables["SUBSYSTEM"] == "channels"


def test_uevents_of_drivers(booted: World, spies: list[Spy]) -> None:
    """Registered, registered no more."""
    call(booted, "register", driver="hv_spy")
    call(booted, "unregister", driver="hv_spy")

    assert heads(booted)[-2:] == ["add@/bus/vmbus/drivers/hv_spy", "remove@/bus/vmbus/drivers/hv_spy"]


def test_ring_of_uevents_keeps_the_newest(booted: World) -> None:
    """64 of them; a reader is given what is left, whole and in order."""
    offered(booted, 9)
    for _ in range(40):
        call(booted, "unbind", device="9")
        call(booted, "bind", driver="hv_echo", device="9")
    found = uevent_text.since(booted.tables, 0)

    newest = booted.tables.connection.uevent_seqnum
    assert [one.seqnum for one in found] == list(range(newest - 63, newest + 1))
    assert [one.seqnum for one in uevent_text.since(booted.tables, newest - 2)] == [newest - 1, newest]
    assert uevent_text.since(booted.tables, newest) == []


# -- races ----------------------------------------------------------------------------------------------


def test_bind_of_a_device_that_goes(booted: World) -> None:
    """It waits for the device's lock while the device is unregistered: -ENODEV, and the record goes with the last."""
    offered(booted, 9)
    call(booted, "unbind", device="9")
    call(booted, "fail", where="probe_hang", times=1, relid=0)
    first = begin(booted, "bind", cpu=1, driver="hv_echo", device="9")
    booted.settle()
    second = begin(booted, "bind", driver="hv_echo", device="9")
    booted.host.rescind(9)
    booted.settle()
    assert not first.ended() and not second.ended()
    booted.pass_time(31)

    assert first.result.get("errno") == errno.ENODEV
    assert second.result["errno"] in (errno.ENODEV, errno.EBUSY)
    assert booted.host.released == [9]
    assert booted.tables.devices.in_use == 0
    assert booted.shut_down() == {}


def test_driver_that_goes_while_it_probes(booted: World, spies: list[Spy]) -> None:
    """rmmod waits for the device's lock, then takes the device from the driver that just got it."""
    call(booted, "unregister", driver="hv_echo")
    call(booted, "register", driver="hv_spy")
    call(booted, "fail", where="probe_hang", times=1, relid=9)
    offered(booted, 9, NIC)
    task = begin(booted, "unregister", driver="hv_spy")
    booted.settle()
    assert not task.ended()
    booted.pass_time(31)

    assert task.result["registered"] is False
    assert spies[0].calls == [("probe", 9), ("remove", 9)]
    assert driver_of(booted, 9) == ""


def test_unregistered_device_is_not_found(booted: World) -> None:
    """A device that went is -ENODEV by either name."""
    offered(booted, 9)
    device = device_of(booted, 9)
    booted.channel(9).rescind.store(1)
    booted.call(lambda current: vmbus_device_unregister(current, device))

    assert call(booted, "unbind", device="9")["errno"] == errno.ENODEV
    assert call(booted, "override", device=str(UUID(int=9)), driver=UIO)["errno"] == errno.ENODEV


# -- the bus's own files --------------------------------------------------------------------------------


def test_nobody_is_probed_unasked_while_autoprobe_is_off(booted: World, spies: list[Spy]) -> None:
    """Neither a new device nor a new driver; a write to drivers_probe asks, of one that is bound it asks nothing."""
    off = call(booted, "drivers_autoprobe", value="0")
    offered(booted, 9, NIC)
    unasked = driver_of(booted, 9)
    call(booted, "register", driver="hv_spy")
    calls = list(spies[0].calls)
    asked = call(booted, "drivers_probe", device="9")
    call(booted, "drivers_probe", device="9")
    gone = call(booted, "drivers_probe", device=str(UUID(int=77)))
    on = call(booted, "drivers_autoprobe", value="on")
    offered(booted, 10)

    assert (off, on) == ({"autoprobe": False}, {"autoprobe": True})
    assert (unasked, calls) == ("", [])
    assert asked["driver"] and driver_of(booted, 9) == asked["driver"]
    assert gone["errno"] == errno.ENODEV
    assert driver_of(booted, 10) == "hv_echo"


def test_bus_itself_tells_of_itself_when_asked(booted: World) -> None:
    """Its place in sysfs, subsystem bus, marked as made up; an action that there is not is refused."""
    call(booted, "bus_uevent", action="change")
    wrong = call(booted, "bus_uevent", action="explode")
    (told,) = [one for one in uevent_text.since(booted.tables, 0) if one.head == "change@/bus/vmbus"]

    assert told.variables["SUBSYSTEM"] == "bus" and told.variables["SYNTH_UUID"] == "0"
    assert wrong["errno"] == errno.EINVAL


def test_driver_tells_of_itself_when_asked(booted: World) -> None:
    """As when it was registered, but marked as made up; one that is not registered has no file to write to."""
    call(booted, "driver_uevent", driver="hv_echo", action="add")
    wrong = [
        call(booted, "driver_uevent", driver=driver, action=action)["errno"]
        for driver, action in (("hv_echo", "explode"), ("hv_none", "add"))
    ]
    first, told = [one for one in uevent_text.since(booted.tables, 0) if one.head == "add@/bus/vmbus/drivers/hv_echo"]

    assert "SYNTH_UUID" not in first.variables and told.variables["SYNTH_UUID"] == "0"
    assert told.variables["SUBSYSTEM"] == "drivers"
    assert wrong == [errno.EINVAL, errno.ENODEV]


def test_driver_that_another_process_registered_takes_the_next_device(booted: World, spies: list[Spy]) -> None:
    """A process keeps the list of drivers, and makes it anew when one came or went in any other."""
    booted.call(lambda current: vmbus_driver_unregister(current, DRIVER_OBJECTS[EchoDriver.number]))
    offered(booted, 9)
    kept = booted.tables.known_drivers
    booted.call(lambda current: vmbus_driver_register(current, spies[0]))
    booted.tables.known_drivers = kept  # as in a process that has not looked since

    offered(booted, 10, NIC)
    assert driver_of(booted, 10) == "hv_spy"

    kept = booted.tables.known_drivers
    booted.call(lambda current: vmbus_driver_unregister(current, spies[0]))
    booted.tables.known_drivers = kept
    offered(booted, 11, NIC)
    assert driver_of(booted, 11) != "hv_spy"
