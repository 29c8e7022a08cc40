"""A plugin's driver in the guest: what it raises where it may sleep, and where it may not."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emu.errors import MachineStopping, UserError
from emu.plugin import Callback, Plugins, RegisteredDriver
from emu.wire.device_classes import ECHO
from emu.wire.guids import guid_to_wire
from guestproc.current import Current
from guestproc.drivers.driver import DRIVER_OBJECTS, HvDriver
from guestproc.drivers.echo import EchoDriver
from guestproc.drivers.plugged import PluggedDriver, PluginFault, plugged_callback
from guestproc.drivers.table import add_plugins
from guestproc.kernel.layout import ChannelState, Device
from guestproc.protocol.numbers import Callbacks
from guestproc.vmbus.channel import vmbus_close, vmbus_open
from guestproc.vmbus.device import vmbus_driver_register
from tests.guestproc.world import World

NUMBER = 64
PATH = Path("mine.py")
Body = Callable[[Current, Device], Any]


def opened(current: Current, device: Device) -> int:
    """Open the device's channel, as a probe does."""
    channel = current.channel(device.channel)
    return vmbus_open(current, channel, 8192, 8192, b"", Callbacks.ECHO_ONCHANNELCALLBACK, device.handle)


def closed(current: Current, device: Device) -> None:
    """Close it, as a remove does."""
    vmbus_close(current, current.channel(device.channel))


class Author:
    """A plugin author's driver, made of what a test gives it."""

    name = "hv_mine"
    id_table = frozenset({guid_to_wire(ECHO.guid)})

    def __init__(self, probe: Body, remove: Body) -> None:
        self._probe = probe
        self._remove = remove

    def probe(self, current: Current, device: Device) -> Any:
        return self._probe(current, device)

    def remove(self, current: Current, device: Device) -> None:
        self._remove(current, device)


@pytest.fixture
def drivers() -> Iterator[dict[int, HvDriver]]:
    """The table of drivers, as it was before and after: whoever is asked first depends on its order."""
    before = dict(DRIVER_OBJECTS)
    yield DRIVER_OBJECTS
    DRIVER_OBJECTS.clear()
    DRIVER_OBJECTS.update(before)


@pytest.fixture
def plugged(world: World, drivers: dict[int, HvDriver]) -> Callable[..., World]:
    """Boots a world that has the author's driver and no other, and offers it a device of relid 9."""

    def boot(probe: Body = opened, remove: Body = closed) -> World:
        driver = PluggedDriver(RegisteredDriver(NUMBER, Author(probe, remove), PATH))
        del drivers[EchoDriver.number]
        drivers[NUMBER] = driver
        world.boot()
        world.host.device(9)
        world.settle()
        return world

    return boot


def logged(world: World) -> str:
    """The guest's log as one text."""
    return "\n".join(world.log)


def plugin_errors(world: World) -> int:
    """What all threads of the guest counted."""
    return sum(current.counters.plugin_errors for current in (*world.currents, *world.workers.values()))


def raising(error: Exception, before: Body | None = None) -> Body:
    """A probe or remove that raises, after something."""

    def body(current: Current, device: Device) -> int:
        if before is not None:
            assert not before(current, device)
        raise error

    return body


def test_a_driver_of_a_plugin_binds_and_leaves(plugged: Callable[..., World]) -> None:
    """Nothing is wrong with it, so nothing is counted, and nothing leaks."""
    world = plugged()

    assert world.channel(9).state.load() == ChannelState.OPENED_STATE
    assert world.shut_down() == {} and plugin_errors(world) == 0


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (raising(ValueError("no sensor")), "ValueError: no sensor"),
        (raising(ValueError("too late"), opened), "ValueError: too late"),
        (lambda current, device: None, "it returned None, which is neither 0 nor a negative errno"),
        (lambda current, device: 5, "it returned 5, which is neither 0 nor a negative errno"),
    ],
    ids=["raises", "raises after the open", "returns nothing", "returns a positive number"],
)
def test_a_probe_that_is_wrong_is_a_failed_probe(plugged: Callable[..., World], probe: Body, text: str) -> None:
    """-EIO; traceback in the log, counted once; the channel is closed, the device stays, unbound; nothing leaks."""
    world = plugged(probe)

    (device,) = world.tables.devices.live()
    assert (device.driver, device.probe_error) == (0, errno.EIO)
    assert plugin_errors(world) == 1 and text in logged(world) and "mine.py" in logged(world)
    assert world.channel(9).state.load() == ChannelState.OPEN_STATE
    assert world.shut_down() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        ("text", 1, 0),
        (None, 1, 0),
        (b"", opened, 0),
        (b"", None, 0),
        (b"", -1, 0),
        (b"", 99, 0),
        (b"", 1, None),
        (b"", 1, -1),
    ],
    ids=["text", "no bytes", "function", "no callback", "below 0", "nobody's", "no context", "context below 0"],
)
def test_an_open_with_what_is_no_argument_begins_nothing(plugged: Callable[..., World], wrong: tuple[Any, ...]) -> None:
    """A failed probe that leaves the channel closed, without a callback and without pages."""
    world = plugged(lambda current, device: vmbus_open(current, current.channel(device.channel), 8192, 8192, *wrong))

    channel = world.channel(9)
    assert plugin_errors(world) == 1 and "vmbus_open" in logged(world)
    assert (channel.state.load(), channel.onchannel_callback) == (ChannelState.OPEN_STATE, 0)
    assert world.shut_down() == {}


@pytest.mark.parametrize("sizes", [("8192", 8192), (8192, 8192.0), (None, 8192)], ids=["text", "float", "none"])
def test_an_open_with_sizes_that_are_no_numbers_begins_nothing(
    plugged: Callable[..., World], sizes: tuple[Any, Any]
) -> None:
    """The same: a failed probe, and a channel that is closed."""
    callback = Callbacks.ECHO_ONCHANNELCALLBACK
    world = plugged(lambda current, device: vmbus_open(current, current.channel(device.channel), *sizes, b"", callback))

    assert plugin_errors(world) == 1 and "vmbus_open" in logged(world)
    assert world.channel(9).state.load() == ChannelState.OPEN_STATE
    assert world.shut_down() == {}


def test_a_log_takes_what_is_no_text(plugged: Callable[..., World]) -> None:
    """A number is logged as it prints: that is no reason to stop a machine."""

    def probe(current: Current, device: Device) -> int:
        current.log(20.5)
        return opened(current, device)

    world = plugged(probe)

    assert "20.5" in logged(world)
    assert world.shut_down() == {} and plugin_errors(world) == 0


def test_a_probe_that_fails_as_it_may_leaves_no_channel_open(plugged: Callable[..., World]) -> None:
    """A negative errno is no mistake; a channel that was left open is, and is closed all the same."""
    world = plugged(lambda current, device: opened(current, device) or -errno.ENXIO)

    assert next(iter(world.tables.devices.live())).probe_error == errno.ENXIO
    assert plugin_errors(world) == 0 and "probe failed with the channel open; it is closed" in logged(world)
    assert world.shut_down() == {}


def test_after_a_failed_probe_the_next_driver_is_asked(plugged: Callable[..., World]) -> None:
    """As for any driver: ours takes the device that the plugin's could not."""
    world = plugged(raising(ValueError()))
    DRIVER_OBJECTS[EchoDriver.number] = EchoDriver()

    assert world.call(lambda current: vmbus_driver_register(current, DRIVER_OBJECTS[EchoDriver.number])) == 0

    assert next(iter(world.tables.devices.live())).driver == EchoDriver.number
    assert world.shut_down() == {}


@pytest.mark.parametrize("remove", [raising(ValueError("stuck")), lambda current, device: None], ids=["raises", "idle"])
def test_a_remove_that_is_wrong_closes_all_the_same(plugged: Callable[..., World], remove: Body) -> None:
    """By a rescind: the channel is closed, the relid released once, nothing leaks."""
    world = plugged(remove=remove)

    world.host.rescind(9)
    world.settle()

    assert world.host.released == [9]
    assert "remove returned with the channel open; it is closed" in logged(world)
    assert ("ValueError: stuck" in logged(world)) == (plugin_errors(world) == 1)
    assert world.shut_down() == {}


def test_a_callback_that_raises_names_plugin_and_channel() -> None:
    """In interrupt context there is nobody to fail to: PluginFault goes up and ends the processor's process."""

    class Nine:
        relid = 9

    def callback(current: object, channel: object) -> None:
        raise ValueError("in the tasklet")

    run: Any = plugged_callback("mine.callback", Callback(callback, 1024))

    with pytest.raises(PluginFault, match=r"^plugin callback mine\.callback on relid 9: ValueError: in the tasklet$"):
        run(None, Nine())


def test_a_machine_that_stops_is_no_mistake_of_a_plugin() -> None:
    """MachineStopping passes through a callback as it is."""

    def callback(current: object, channel: object) -> None:
        raise MachineStopping("now")

    run: Any = plugged_callback("mine.callback", Callback(callback, 1024))

    with pytest.raises(MachineStopping):
        run(None, None)


def registered(number: int, name: str) -> RegisteredDriver:
    """A driver of a plugin."""
    author = Author(opened, closed)
    author.name = name
    return RegisteredDriver(number, author, PATH)


def test_drivers_of_plugins_are_asked_before_ours(drivers: dict[int, HvDriver]) -> None:
    """Ours take every class, so that a plugin's would never be asked about one of ours behind them."""
    ours = list(drivers)

    add_plugins(Plugins(drivers=[registered(64, "hv_a"), registered(65, "hv_b")]))

    assert list(drivers) == [64, 65, *ours]


def test_a_drivers_name_may_not_be_one_of_ours(drivers: dict[int, HvDriver]) -> None:
    """sysfs has one directory a driver; the complaint names the file, and nothing was added."""
    before = dict(drivers)

    with pytest.raises(UserError, match=r"^plugin mine\.py: driver hv_echo is one of ours; choose another name$"):
        add_plugins(Plugins(drivers=[registered(64, "hv_echo")]))

    assert drivers == before
