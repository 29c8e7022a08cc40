"""The guest's user space: what its administrator does to the bus, call by call.

A call is what a process of a user's would do: a write to a file of `/sys/bus/vmbus`, a `modprobe`. It runs in the
writer's context, a task that may sleep, so a write to `bind` returns when the probe has. An errno is told as text
with the cure, `-EEXIST: …; …`.

Calls run only while the bus is up: `begin_call` and `end_call` count them, and a shutdown first closes that gate and
waits until those that run have ended, as a machine ends its processes before it takes its devices away.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from emu.errors import DeadlinePassed, UserError
from emu.values import valueclass
from emu.wire.device_classes import HV_SOCK, class_of, hv_sock_guid
from emu.wire.versions import VERSION_WIN10, VERSION_WIN10_V4_1, version_text
from guestproc.drivers import claims, stream
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver
from guestproc.kernel.layout import Channel, Connection, ConnectionState, Device, Driver, KernelTables
from guestproc.kernel.smp import ProcessorGone
from guestproc.kernel.wait import SECOND_NS
from guestproc.protocol import devices, faults, placement
from guestproc.protocol.numbers import Ipis
from guestproc.protocol.uevents import Action
from guestproc.vmbus import device as bus
from guestproc.vmbus import uevents
from guestproc.vmbus.chan_list import smp_call_function_single
from guestproc.vmbus.connection import VMBUS_CONNECT_CPU, vmbus_send_tl_connect_request
from guestproc.vmbus.cpu_hotplug import cpu_down, cpu_up
from guestproc.vmbus.hyperv_timer import HV_MAX_MAX_DELTA_TICKS, HV_MIN_DELTA_TICKS, TICK_NS
from guestproc.vmbus.retarget import scan_unsigned, target_cpu_store
from guestproc.vmbus.ring_stats import hv_ringbuffer_get_debuginfo

if TYPE_CHECKING:
    from guestproc.current import Current

Values = dict[str, Any]

CLOSED: Final = 1 << 31
"""Bit of `Connection.user_calls`: there may be no call any more."""
CALLS_END_TIMEOUT_NS: Final = 60 * SECOND_NS
MOST_RELIDS: Final = 8
"""Of a CPU, in an answer, which has room for 64 CPUs."""


class CallFailed(Exception):
    """A system call returned an errno (positive here)."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"-{errno.errorcode.get(number, str(number))}: {text}")
        self.errno = number


@valueclass()
class Call:
    """One of user space's calls; `sleeps`: it may wait for the host, or for whoever does."""

    run: Callable[[Current, Values], Values]
    sleeps: bool = True


CALLS: Final[dict[str, Call]] = {}


def _call(name: str, *, sleeps: bool = True) -> Callable[[Callable[[Current, Values], Values]], Callable[..., Values]]:
    def add(function: Callable[[Current, Values], Values]) -> Callable[..., Values]:
        CALLS[name] = Call(function, sleeps)
        return function

    return add


def run_call(current: Current, name: str, arguments: Mapping[str, Any]) -> Values:
    """Run one call to its end: what it has to say, or its error as text."""
    try:
        call = CALLS.get(name)
        if call is None:
            raise CallFailed(errno.ENOSYS, f"no call {name}; there are {', '.join(sorted(CALLS))}")
        begin_call(current.connection)
        try:
            return call.run(current, dict(arguments))
        except DeadlinePassed as passed:
            raise CallFailed(errno.ETIMEDOUT, f"{passed}; something holds it up, try again") from None
        finally:
            end_call(current)
    except CallFailed as failed:
        return {"error": str(failed), "errno": failed.errno}


# -- the gate -------------------------------------------------------------------------------------------


def begin_call(connection: Connection) -> None:
    """One call more; CallFailed (ENODEV) before the bus is up, and once it goes."""
    calls = connection.user_calls
    while True:
        seen = calls.load()
        if seen & CLOSED or connection.conn_state.load() != ConnectionState.CONNECTED:
            raise CallFailed(errno.ENODEV, "the guest has no VMBus now; wait until its channels are open")
        if calls.cas(seen, seen + 1) == seen:
            return


def end_call(current: Current) -> None:
    """One call less."""
    current.connection.user_calls.fetch_sub(1)
    current.connection.state_wait.wake_all(current.actor)


def end_user_space(current: Current) -> None:
    """Let no call begin, let those that hang go, and wait until all have ended."""
    connection = current.connection
    connection.user_calls.fetch_or(CLOSED)
    faults.forget_all(current.faults.plan)
    connection.state_wait.wake_all(current.actor)
    if not connection.state_wait.wait_until_timeout(
        current.actor, lambda: connection.user_calls.load() == CLOSED, CALLS_END_TIMEOUT_NS
    ):
        current.log(f"{connection.user_calls.load() & ~CLOSED} calls of user space do not end")


# -- drivers and devices --------------------------------------------------------------------------------


@_call("bind")
def bind(current: Current, asked: Values) -> Values:
    """`echo DEVICE >drivers/DRIVER/bind`."""
    driver = _registered(current, asked["driver"])
    name = asked["driver"]
    with bus.held_device(current, *_named(asked["device"])) as device:
        told = _there(device, asked["device"])
        result = bus.bind_store(current, told, driver)
        if result == -errno.EBUSY:
            raise CallFailed(errno.EBUSY, f"{_text(told)} has a driver already; `vmbus-emu ctl unbind` takes it away")
        if result == -errno.ENODEV and not told.driver and not _matches(current, told, driver):
            cure = f"`vmbus-emu ctl new-id {name} {UUID(bytes_le=told.dev_type)}`, or override it"
            raise CallFailed(errno.ENODEV, f"{name} does not match {_text(told)}; {cure}")
        if result:
            raise CallFailed(-result, f"{name} does not take {_text(told)}; `vmbus-emu inspect log` says why")
        return _device(current, told)


@_call("unbind")
def unbind(current: Current, asked: Values) -> Values:
    """`echo DEVICE >drivers/DRIVER/unbind`; without a driver, of the one that has it."""
    number = _registered(current, asked["driver"]).number if asked.get("driver") else 0
    with bus.held_device(current, *_named(asked["device"])) as device:
        told = _there(device, asked["device"])
        if bus.unbind_store(current, told, number):
            who = asked.get("driver") or "no driver"
            state = "is not bound to it" if asked.get("driver") else "has it"
            raise CallFailed(errno.ENODEV, f"{_text(told)}: {who} {state}; `vmbus-emu ctl drivers` lists them")
        return _device(current, told)


@_call("override")
def override(current: Current, asked: Values) -> Values:
    """`echo DRIVER >devices/DEVICE/driver_override`; an empty name takes it away. The name need not be known."""
    name = str(asked["driver"])
    if len(name.encode()) >= 32 or not name.isprintable():
        raise CallFailed(errno.EINVAL, "a driver's name is at most 31 bytes; shorten it")
    with bus.held_device(current, *_named(asked["device"])) as device:
        told = _there(device, asked["device"])
        bus.driver_override_store(current, told, name)
        return _device(current, told)


@_call("new_id")
def new_id(current: Current, asked: Values) -> Values:
    """`echo GUID >drivers/DRIVER/new_id`: devices of that class that have no driver are probed at once."""
    name, guid = asked["driver"], _guid(asked["guid"])
    result = bus.new_id_store(current, _registered(current, name), guid.bytes_le)
    if result == -errno.EEXIST:
        raise CallFailed(errno.EEXIST, f"{guid} is an id of {name} already; `vmbus-emu ctl remove-id` takes it away")
    if result:
        raise CallFailed(-result, f"{name} has as many ids as fit; remove one")
    return _driver(current, DRIVER_OBJECTS[_registered(current, name).number])


@_call("remove_id")
def remove_id(current: Current, asked: Values) -> Values:
    """`echo GUID >drivers/DRIVER/remove_id`: who is bound stays bound."""
    name, guid = asked["driver"], _guid(asked["guid"])
    if bus.remove_id_store(current, _registered(current, name), guid.bytes_le):
        raise CallFailed(errno.ENODEV, f"{guid} is no id that was added to {name}; `vmbus-emu ctl drivers` lists them")
    return _driver(current, DRIVER_OBJECTS[_registered(current, name).number])


@_call("register")
def register(current: Current, asked: Values) -> Values:
    """`modprobe DRIVER`: devices that it matches and that have no driver are probed."""
    driver = _known(asked["driver"])
    result = bus.vmbus_driver_register(current, driver)
    if result == -errno.EBUSY:
        raise CallFailed(errno.EBUSY, f"{driver.name} is registered already; `vmbus-emu ctl unregister` first")
    if result:
        raise CallFailed(-result, f"there is no record for {driver.name}; unregister another")
    return _driver(current, driver)


@_call("unregister")
def unregister(current: Current, asked: Values) -> Values:
    """`rmmod DRIVER`: its devices stay, unbound."""
    driver = _known(asked["driver"])
    if not bus.vmbus_driver_unregister(current, driver):
        raise CallFailed(errno.ENODEV, f"{driver.name} is not registered; `vmbus-emu ctl register` does that")
    return _driver(current, driver)


@_call("drivers", sleeps=False)
def drivers(current: Current, _asked: Values) -> Values:
    """Every driver that this guest has, registered or not."""
    return {"drivers": [_driver(current, DRIVER_OBJECTS[number]) for number in sorted(DRIVER_OBJECTS)]}


@_call("drivers_autoprobe", sleeps=False)
def drivers_autoprobe(current: Current, asked: Values) -> Values:
    """`echo 0 >drivers_autoprobe`: whatever does not begin with 0 switches it on, as in the kernel."""
    on = not str(asked["value"]).startswith("0")
    bus.drivers_autoprobe_store(current, on=on)
    return {"autoprobe": on}


@_call("drivers_probe")
def drivers_probe(current: Current, asked: Values) -> Values:
    """`echo DEVICE >drivers_probe`: a device without a driver looks for one."""
    with bus.held_device(current, *_named(asked["device"])) as device:
        told = _there(device, asked["device"])
        bus.drivers_probe_store(current, told)
        return _device(current, told)


@_call("bus_uevent")
def bus_uevent(current: Current, asked: Values) -> Values:
    """`echo ACTION >uevent` of the bus itself."""
    uevents.bus_uevent(current, _action(asked["action"]))
    return {}


@_call("driver_uevent")
def driver_uevent(current: Current, asked: Values) -> Values:
    """`echo ACTION >drivers/DRIVER/uevent`: user space is told of the driver once more."""
    uevents.driver_uevent(current, _registered(current, asked["driver"]), _action(asked["action"]), synthetic=True)
    return {}


@_call("uevent")
def uevent(current: Current, asked: Values) -> Values:
    """`echo ACTION >devices/DEVICE/uevent`: user space is told once more (`udevadm trigger` does that)."""
    action = _action(asked["action"])
    with bus.held_device(current, *_named(asked["device"])) as device:
        told = _there(device, asked["device"])
        bus.synth_uevent(current, told, action)
        return _device(current, told)


# -- where interrupts go --------------------------------------------------------------------------------


@_call("move")
def move(current: Current, asked: Values) -> Values:
    """`echo CPU >devices/DEVICE/channels/RELID/cpu`: named by its relid, or by its device and its index."""
    channel = _channel(current, asked)
    handle, relid = channel.handle, channel.relid
    before = channel.target_cpu.load()
    result = target_cpu_store(current, handle, str(asked["cpu"]))
    if result:
        raise CallFailed(-result, _why_not_moved(current, relid, -result, str(asked["cpu"])))
    return {"relid": relid, "from": before, "cpu": scan_unsigned(str(asked["cpu"]))}


def _channel(current: Current, asked: Values) -> Channel:
    """The channel that is meant: `device`, and the `index` of one of its channels (0: its primary, or itself)."""
    named, index = str(asked["device"]), int(asked.get("index", 0))
    relid, instance = _named(named)
    with current.connection.channel_mutex.hold(current.actor):
        tables = current.tables
        found = tables.relids.lookup(relid) if relid else next(iter(tables.instances.find(instance)), None)
        if found is not None and index:
            found = next((one for one in tables.sc_list(found) if one.sub_channel_index == index), None)
    if found is None:
        which = f"sub-channel {index} of {named}" if index else f"channel {named}"
        raise CallFailed(errno.ENODEV, f"no {which} on the guest's bus; `vmbus-emu ls` lists them")
    return found


def _why_not_moved(current: Current, relid: int, number: int, cpu: str) -> str:
    version = current.connection.vmbus_proto_version
    if version < VERSION_WIN10_V4_1:
        return (
            f"channels move from VMBus 4.1 on, this is {version_text(version)}; start a machine whose host speaks more"
        )
    return {
        errno.EINVAL: f"there is no CPU {cpu} that is online; `vmbus-emu ctl cpus` lists them",
        errno.EBUSY: f"relid {relid} is being moved already; wait for its end",
        errno.ENODEV: f"the host has taken relid {relid} back; `vmbus-emu ls` lists what is left",
        errno.ETIMEDOUT: f"the host does not answer for relid {relid}; look at the machine's log",
    }.get(number, f"relid {relid} is not open, or the host refused; open it first (`vmbus-emu ctl bind`)")


@_call("cpu_online")
def cpu_online(current: Current, asked: Values) -> Values:
    """`echo 0|1 >/sys/devices/system/cpu/cpuN/online`."""
    cpu, online = int(asked["cpu"]), bool(asked["online"])
    result = (cpu_up if online else cpu_down)(current, cpu)
    if result == -errno.EINVAL:
        raise CallFailed(errno.EINVAL, f"there is no CPU {cpu}; `vmbus-emu ctl cpus` lists them")
    if result:
        raise CallFailed(-result, _why_not_offline(current, cpu))
    return _cpu(current, cpu)


def _why_not_offline(current: Current, cpu: int) -> str:
    """What holds a CPU, as far as it can be seen from here."""
    if cpu == VMBUS_CONNECT_CPU:
        return f"CPU {cpu} takes the host's messages; choose another"
    relids = _cpu(current, cpu)["relids"]
    if relids:
        movable = current.connection.vmbus_proto_version >= VERSION_WIN10_V4_1
        cure = f"ctl move {relids[0]} 0` first" if movable else f"ctl rescind {relids[0]}`: below VMBus 4.1 none moves"
        return f"the interrupts of relid {relids[0]} go to CPU {cpu}; `vmbus-emu {cure}"
    return f"CPU {cpu} runs a program, or an interrupt of it has not been taken; try again"


@_call("cpus")
def cpus(current: Current, _asked: Values) -> Values:
    """Every CPU, whether it is online, and whose interrupts it takes."""
    return {"cpus": [_cpu(current, number) for number in range(current.tables.layout.ncpus)]}


def _cpu(current: Current, number: int) -> Values:
    """A CPU as an answer says it."""
    record = current.cpu_record(number)
    with current.connection.channel_mutex.hold(current.actor):
        relids = sorted(channel.relid for channel in placement.targets_of(current.tables, number))
    return {
        "cpu": number,
        "vp_index": record.vp_index,
        "online": record.online.load() != 0,
        "channels": len(relids),
        "relids": relids[:MOST_RELIDS],
    }


@_call("ring_debuginfo")
def ring_debuginfo(current: Current, asked: Values) -> Values:
    """`cat devices/DEVICE/channels/RELID/in_mask` and the like: mask and indices of both rings."""
    channel = _channel(current, asked)
    found = hv_ringbuffer_get_debuginfo(current, channel)
    if found is None:
        raise CallFailed(errno.EINVAL, f"relid {channel.relid} has no rings; open it first (`vmbus-emu ctl bind`)")
    return {"relid": channel.relid, "outbound": found[0], "inbound": found[1]}


# -- programs of user space ------------------------------------------------------------------------------


@_call("stream_write")
def stream_write(current: Current, asked: Values) -> Values:
    """Write `bytes` bytes into a device of hv_stream's, asleep in epoll_wait whenever its ring is full."""
    channel = _channel(current, asked)
    cpu, calls = channel.target_cpu.load(), current.connection.user_calls
    claimed = claims.claim_channels(current, stream.StreamDriver.number, cpu, channel.relid)
    if not claimed:
        raise CallFailed(errno.ENODEV, f"relid {channel.relid} is no open channel of {stream.STREAM}; bind it first")
    try:
        written = stream.write_all(current, channel, int(asked["bytes"]), lambda: calls.load() & CLOSED != 0)
    finally:
        claims.release_claim(current, channel)
    return {"relid": channel.relid, "written": written}


# -- sockets --------------------------------------------------------------------------------------------


@_call("connect")
def connect(current: Current, asked: Values) -> Values:
    """`connect` of a socket that does not block, from `endpoint` to the host's `service`, both GUIDs of AF_VSOCK ports.

    It is under way then: a host that has the service offers a channel, one that has not says so to nobody who looks.
    """
    endpoint, service = (_socket_guid(asked[name]) for name in ("endpoint", "service"))
    version = current.connection.vmbus_proto_version
    if version < VERSION_WIN10:
        text = f"sockets are there from VMBus 4.0 on, this is {version_text(version)}"
        raise CallFailed(errno.ENODEV, f"{text}; start a machine whose host speaks more")
    result = vmbus_send_tl_connect_request(current, endpoint, service)
    if result:
        raise CallFailed(-result, "the host does not take the request; try again")
    return {"endpoint": str(endpoint), "service": str(service)}


def _socket_guid(text: str) -> UUID:
    guid = _guid(text)
    if class_of(guid) is not HV_SOCK:
        raise CallFailed(errno.EINVAL, f"{guid} is no GUID of a port; that of port 5000 is {hv_sock_guid(5000)}")
    return guid


# -- faults ---------------------------------------------------------------------------------------------


@_call("fail", sleeps=False)
def fail(current: Current, asked: Values) -> Values:
    """Let a step fail the next `times` times, of one relid or of any; what is planned then."""
    plan = current.faults.plan
    try:
        faults.plan(plan, asked["where"], asked["times"], asked["relid"])
    except UserError as error:
        raise CallFailed(errno.EBUSY, str(error)) from None
    if not asked["times"]:
        current.connection.state_wait.wake_all(current.actor)
    return {"faults": [{"where": at, "times": n, "relid": relid} for at, n, relid in faults.planned(plan)]}


# -- time -----------------------------------------------------------------------------------------------


@_call("timer")
def timer(current: Current, asked: Values) -> Values:
    """Have CPU `cpu` set its next clock event `after_ns` from now; how many it had had before (`clock_events`)."""
    cpu, delta = asked["cpu"], asked["after_ns"] // TICK_NS
    if not 0 <= cpu < current.tables.layout.ncpus:
        raise CallFailed(errno.EINVAL, f"no CPU {cpu}; the guest has 0 to {current.tables.layout.ncpus - 1}")
    if not HV_MIN_DELTA_TICKS <= delta <= HV_MAX_MAX_DELTA_TICKS:
        most = HV_MAX_MAX_DELTA_TICKS * TICK_NS
        raise CallFailed(errno.EINVAL, f"after_ns={asked['after_ns']}; give {HV_MIN_DELTA_TICKS * TICK_NS} to {most}")
    record = current.cpu_record(cpu)
    if not record.stimer0_message_sint:
        raise CallFailed(errno.ENODEV, f"CPU {cpu} has no clock event device: it is offline, or the host has no timers")
    before = record.clock_events
    try:
        smp_call_function_single(current, cpu, Ipis.HV_CE_SET_NEXT_EVENT, delta)
    except ProcessorGone as gone:
        raise CallFailed(errno.ENODEV, str(gone)) from None
    return {"cpu": cpu, "clock_events": before}


# -- what calls say, and how they read what they are given ----------------------------------------------


def _named(text: str) -> tuple[int, bytes]:
    """A device as a user names it: its relid, or its instance GUID (0 and the wire form then)."""
    if text.isascii() and text.isdecimal() and len(text) <= 4:
        return int(text), b""
    return 0, _guid(text).bytes_le


def _action(text: str) -> Action:
    action = next((one for one in Action if one.name.lower() == text), None)
    if action is None:
        names = ", ".join(one.name.lower() for one in Action)
        raise CallFailed(errno.EINVAL, f"{text!r} is no action; there are {names}")
    return action


def _guid(text: str) -> UUID:
    """A GUID as the kernel reads it (`guid_parse`): 36 characters, and the dashes at their places, unlike `UUID`."""
    try:
        guid = UUID(text)
    except ValueError:
        guid = None
    if guid is None or str(guid) != text.lower():
        raise CallFailed(errno.EINVAL, f"{text!r} is no GUID; write it as 01234567-89ab-cdef-0123-456789abcdef")
    return guid


def _there(device: Device | None, named: str) -> Device:
    if device is None:
        raise CallFailed(errno.ENODEV, f"no device {named} on the guest's bus; `vmbus-emu ls` lists them")
    return device


def _registered(current: Current, name: str) -> Driver:
    found = bus.find_driver(current, name)
    if found is None:
        raise CallFailed(errno.ENODEV, f"no driver {name} is registered; `vmbus-emu ctl drivers` lists them")
    return found


def _known(name: str) -> HvDriver:
    found = next((driver for driver in DRIVER_OBJECTS.values() if driver.name == name), None)
    if found is None:
        raise CallFailed(errno.ENOENT, f"no driver {name}; there are {', '.join(_names())}")
    return found


def _names() -> list[str]:
    return sorted(driver.name for driver in DRIVER_OBJECTS.values())


def _matches(current: Current, device: Device, driver: Driver) -> bool:
    with device.device_lock.hold(current.actor):
        return bus.vmbus_match(current, device, driver)


def _text(device: Device) -> str:
    return f"device {bus.dev_name(device)}"


def _device(current: Current, device: Device) -> Values:
    """A device as an answer says it."""
    with device.device_lock.hold(current.actor):
        number, override_name = device.driver, devices.override_name(device)
    return {
        "device": bus.dev_name(device),
        "driver": DRIVER_OBJECTS[number].name if number else "",
        "driver_override": override_name,
    }


def _driver(current: Current, driver: HvDriver) -> Values:
    """A driver as an answer says it: how many devices it has, and its dynamic ids."""
    tables = current.tables
    record = next((one for one in tables.drivers.live() if one.number == driver.number), None)
    ids: list[bytes] = []
    if record is not None:
        with record.dynids_lock.hold(current.actor):
            ids = devices.dynamic_ids(record)
    return {
        "name": driver.name,
        "number": driver.number,
        "registered": record is not None and devices.is_registered(record),
        "devices": _bound(current, tables, driver.number),
        "static_ids": len(driver.id_table),
        "dynamic_ids": [str(UUID(bytes_le=one)) for one in ids],
    }


def _bound(current: Current, tables: KernelTables, number: int) -> int:
    """How many devices a driver has."""
    with current.connection.channel_mutex.hold(current.actor):
        found = (tables.devices.find(channel.device_obj) for channel in tables.chn_list)
        return sum(device is not None and device.driver == number for device in found)
