"""Your own devices and drivers: what a plugin file registers, and how every process of a machine comes to know it.

A plugin is one Python file outside the package. It is executed once in each process of the machine, which is
how a number in guest RAM can mean its code: numbers are handed out in the order of plugins and of the
registrations in each, so the same file gives the same numbers everywhere. `docs/writing-a-driver.md` shows one
from the first line to its test.

    TEMPSENSOR = plugin.device_class("tempsensor", guid="…")    a class of devices
    @plugin.backend           class …(Backend): name, open      its host side
    @plugin.driver            class …: name, id_table, probe, remove    its guest side
    @plugin.channel_callback  def …(current, channel)           what an interrupt of its channel calls

A file that is imported as an ordinary module registers nothing: only `load` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar
from uuid import UUID

from emu.discarded import compiled, namespace
from emu.errors import UserError
from emu.scenario_text import Nonsense, machine_name
from emu.values import valueclass
from emu.wire.device_classes import BY_GUID, BY_NAME, HV_UNKNOWN, DeviceClass, remember_classes
from emu.wire.messages import ChannelFlags, PipeMode

FIRST_DRIVER: Final = 64
FIRST_CALLBACK: Final = 1024
MAX_FILES: Final = 16
MAX_DRIVERS: Final = 16
MAX_FILE_BYTES: Final = 1 << 20

Class = TypeVar("Class", bound=type[Any])


@valueclass()
class Callback:
    """A channel callback with its number, by which `vmbus_open` and guest RAM name it; 0 outside of a machine."""

    function: Callable[[Any, Any], None]
    number: int

    def __call__(self, current: Any, channel: Any) -> None:
        """Call it directly, as a test does."""
        self.function(current, channel)


@valueclass()
class PluginFile:
    """A file that was loaded, and what it held (SHA-256): every process of a machine must run the same."""

    path: Path
    digest: str


@valueclass()
class RegisteredDriver:
    """A driver, with its number and the file it comes from."""

    number: int
    driver: Any
    path: Path


@valueclass()
class Plugins:
    """What the plugin files of one machine register, in order. Two are equal when their files are."""

    files: list[PluginFile] = field(default_factory=list, hash=False)
    classes: dict[str, DeviceClass] = field(default_factory=dict, compare=False)
    backends: dict[str, type[Any]] = field(default_factory=dict, compare=False)
    drivers: list[RegisteredDriver] = field(default_factory=list, compare=False)
    callbacks: dict[str, Callback] = field(default_factory=dict, compare=False)
    """By `file.function`, the name that traces show."""
    _owners: dict[tuple[str, object], Path] = field(default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def paths(self) -> list[str]:
        """Absolute paths of the files, as a machine's configuration has them."""
        return [str(file.path) for file in self.files]

    def backend_of(self, class_name: str) -> str | None:
        """The back end that a class of these plugins has if nobody says another: the one of the same name."""
        return class_name if class_name in self.classes and class_name in self.backends else None

    def facts(self) -> dict[str, Any]:
        """What others may know of these plugins without running them, as plain values."""
        return {
            "digests": [file.digest for file in self.files],
            "classes": [_class_values(one) for one in self.classes.values()],
            "backends": list(self.backends),
            "drivers": [one.driver.name for one in self.drivers],
            "callbacks": list(self.callbacks),
        }

    def path_of(self, kind: str, key: object) -> Path:
        """The file that registered something."""
        return self._owners[kind, key]

    def owned(self, kind: str, key: object, path: Path) -> None:
        """Note who registered something; UserError when somebody has."""
        owner = self._owners.setdefault((kind, key), path)
        if owner is not path:
            raise UserError(f"{kind} {key} is registered already by {owner}; choose another")


NO_PLUGINS: Final = Plugins()


@dataclass(slots=True)
class _Loading:
    """The load that goes on: where registrations go."""

    plugins: Plugins
    path: Path


_loading: _Loading | None = None
_installed: Plugins = NO_PLUGINS


# -- what a plugin file calls -----------------------------------------------------------------------------


def device_class(
    name: str,
    *,
    guid: str | UUID,
    description: str = "",
    perf: bool = False,
    flags: ChannelFlags = ChannelFlags.ENUMERATE_DEVICE_INTERFACE,
    pipe_mode: PipeMode | None = None,
) -> DeviceClass:
    """Register a class of devices: its name in scenarios, the GUID of its offers, what its offers carry.

    `perf`: the guest spreads its channels over CPUs. `description` is what `vmbus-emu ls` says of it.
    """
    _refuse_late(f"device class {name}")
    _check_name("device class", name)
    try:
        value = guid if isinstance(guid, UUID) else UUID(guid)
    except ValueError:
        raise UserError(f"device class {name}: {guid!r} is no GUID; make one with `uuidgen`") from None
    one = DeviceClass(HV_UNKNOWN, name, "HV_UNKNOWN", value, perf, False, description or name, None, flags, pipe_mode)
    if _loading is not None:
        if name in BY_NAME:
            raise UserError(f"device class {name} is one of ours; choose another name")
        if value in BY_GUID:
            raise UserError(f"GUID {value} is that of our class {BY_GUID[value].name}; make one with `uuidgen`")
        _own("device class", name, _loading.plugins.classes)
        if any(known.guid == value for known in _loading.plugins.classes.values()):
            raise UserError(f"device class {name}: GUID {value} is registered already; make one with `uuidgen`")
        _loading.plugins.classes[name] = one
    return one


def ids(*classes: DeviceClass) -> frozenset[bytes]:
    """An `id_table`: the class GUIDs as they are on the wire."""
    return frozenset(one.guid.bytes_le for one in classes)


def backend(cls: Class) -> Class:
    """Class decorator: a `hostproc.devices.backend.Backend`, found by its `name`; each device gets one of its own."""
    name = getattr(cls, "name", None)
    _refuse_late(f"back end {name}")
    _check_name(f"back end {cls.__name__}: name", name)
    if inspect.isabstract(cls) or not callable(getattr(cls, "open", None)) or not callable(getattr(cls, "close", None)):
        raise UserError(f"back end {name}: no open and close; derive it from hostproc.devices.backend.Backend")
    if _loading is not None:
        _own("back end", name, _loading.plugins.backends)
        _loading.plugins.backends[str(name)] = cls
    return cls


def driver(cls: Class) -> Class:
    """Class decorator: a guest driver (see `guestproc.drivers.driver.HvDriver`), made once in each process.

    It is registered before our own drivers, so it is asked first about the devices whose class it takes. Its
    `number` is set here.
    """
    name = getattr(cls, "name", None)
    _refuse_late(f"driver {name}")
    _check_name(f"driver {cls.__name__}: name", name)
    table = getattr(cls, "id_table", None)
    if not isinstance(table, frozenset) or not all(isinstance(one, bytes) and len(one) == 16 for one in table):
        raise UserError(f"driver {name}: id_table is no frozenset of GUIDs in wire form; write plugin.ids(CLASS, …)")
    for method in ("probe", "remove"):
        if not callable(getattr(cls, method, None)):
            raise UserError(f"driver {name}: it has no {method}(self, current, device)")
    if _loading is not None:
        drivers = _loading.plugins.drivers
        _loading.plugins.owned("driver", name, _loading.path)
        if any(one.driver.name == name for one in drivers):
            raise UserError(f"driver {name} is registered already; choose another name")
        if len(drivers) == MAX_DRIVERS:
            raise UserError(f"driver {name}: more than {MAX_DRIVERS} drivers in plugins; leave some out")
        cls.number = FIRST_DRIVER + len(drivers)
        drivers.append(RegisteredDriver(cls.number, cls(), _loading.path))
    return cls


def channel_callback(function: Callable[[Any, Any], None]) -> Callback:
    """Decorator: `function(current, channel)`, which `vmbus_open` is given as `function.number`.

    It runs as the channel's callback mode says (in the channel's tasklet, or in the ISR) and must not sleep.
    """
    _refuse_late(f"channel callback {function.__name__}")
    if _loading is None:
        return Callback(function, 0)
    callbacks = _loading.plugins.callbacks
    name = f"{_loading.path.stem}.{function.__name__}"
    _own("channel callback", name, callbacks)
    callbacks[name] = Callback(function, FIRST_CALLBACK + len(callbacks))
    return callbacks[name]


def _refuse_late(what: str) -> None:
    """Refuse a registration in the middle of a machine's life: the other processes would know nothing of it."""
    if _loading is not None or not _installed:
        return
    frame = sys._getframe(2)
    raise UserError(
        f"plugin {frame.f_code.co_filename}, line {frame.f_lineno}: {what} is registered in {frame.f_code.co_name}, "
        "while the machine runs: no other process would know it, nor its number; register it at the file's top level"
    )


# -- loading ----------------------------------------------------------------------------------------------


def _whole(path: Path) -> Path:
    """Its absolute path: inner processes find it from wherever they are."""
    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise UserError(f"plugin {path}: the current directory is gone; go to one that exists") from None


def load(paths: Iterable[Path]) -> Plugins:
    """Execute these files, in order, and return what they register; a file that is named twice counts once.

    UserError, in one line that names the file, when one cannot be read, raises, or registers what cannot be.
    """
    plugins, drawn = _load(paths)
    for one in drawn:
        again = _load(file.path for file in plugins.files)[0].classes.get(one.name, one)
        if again.guid != one.guid:
            raise UserError(
                f"plugin {plugins.path_of('device class', one.name)}: device class {one.name}: its GUID is another one "
                f"each time the file is executed ({one.guid}, then {again.guid}), and each process of a machine "
                "executes it; write down what `uuidgen` prints"
            )
    return plugins


def _load(paths: Iterable[Path]) -> tuple[Plugins, list[DeviceClass]]:
    """As `load`; and the classes whose GUID is not to be read in their file, so that it may be drawn there."""
    plugins = Plugins()
    drawn: list[DeviceClass] = []
    for path in dict.fromkeys(map(_whole, paths)):
        if len(plugins.files) == MAX_FILES:
            raise UserError(f"plugin {path}: more than {MAX_FILES} plugins; leave some out")
        source = _read(path)
        plugins.owned("plugin", path.stem, path)
        before = len(plugins.classes)
        with _registering(plugins, path):
            module = _execute(path, source, len(plugins.files))
            _refuse_forgotten(module, plugins)
        plugins.files.append(PluginFile(path, hashlib.sha256(source).hexdigest()))
        digits = source.replace(b"-", b"").lower()
        drawn += [one for one in list(plugins.classes.values())[before:] if one.guid.hex.encode() not in digits]
    return plugins, drawn


def attach(config: Mapping[str, Any]) -> Plugins:
    """Load the plugins of a machine into this process, which is to be one of the machine's.

    UserError when a file is not what it was when the machine was made.
    """
    global _installed
    paths = config.get("plugins", ())
    if not paths:
        return NO_PLUGINS
    plugins = load(map(Path, paths))
    for file, digest in zip(plugins.files, config["plugin_facts"]["digests"], strict=True):
        if file.digest != digest:
            raise UserError(f"plugin {file.path}: changed since the machine was made; start the machine anew")
    _refuse_other_facts(plugins, config["plugin_facts"])
    remember_classes(plugins.classes.values())
    _installed = plugins
    return plugins


def _refuse_other_facts(plugins: Plugins, made: Mapping[str, Any]) -> None:
    """Refuse what the same files register otherwise than when the machine was made: the processes would not meet."""
    here = plugins.facts()
    for kind in ("classes", "backends", "drivers", "callbacks"):
        if here[kind] != made[kind]:
            files = ", ".join(map(str, (file.path for file in plugins.files)))
            raise UserError(
                f"plugin {files}: its {kind} are {here[kind]} in this process and were {made[kind]} when the machine "
                "was made: each process executes the file anew; let what it registers, and its order, not hang on "
                "chance, time or the process"
            )


def installed() -> Plugins:
    """The plugins of the machine that this process belongs to."""
    return _installed


def known_from(config: Mapping[str, Any]) -> Plugins:
    """A machine's plugins as far as its configuration tells: their classes and back ends by name, and no code."""
    facts = config.get("plugin_facts")
    if not facts:
        return NO_PLUGINS
    plugins = Plugins(
        [PluginFile(Path(path), digest) for path, digest in zip(config["plugins"], facts["digests"], strict=True)]
    )
    plugins.classes.update((one.name, one) for one in map(_class_of_values, facts["classes"]))
    plugins.backends.update(dict.fromkeys(facts["backends"], object))
    remember_classes(plugins.classes.values())
    return plugins


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            source = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"plugin {path}: {error.strerror}; give the path of a Python file") from None
    if len(source) > MAX_FILE_BYTES:
        raise UserError(f"plugin {path}: larger than {MAX_FILE_BYTES} bytes; give the path of a Python file")
    if b"\0" in source:
        # Each Python says this in words of its own.
        raise UserError(f"plugin {path}: it has a NUL byte, which no text has; give the path of a Python file")
    return source


@contextlib.contextmanager
def _registering(plugins: Plugins, path: Path) -> Iterator[None]:
    """Registrations go into `plugins`, in the name of `path`; what is printed meanwhile goes to stderr."""
    global _loading
    assert _loading is None, "a plugin loads plugins"
    _loading = _Loading(plugins, path)
    try:
        # stdout is the command's: what it prints there may be read by a program.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError as error:
        raise UserError(f"plugin {path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"plugin {path}: {_said(error, path)}; mend it") from error
    finally:
        _loading = None


def _execute(path: Path, source: bytes, number: int) -> ModuleType:
    # Not imported: that would leave bytecode beside the file, and believe it when the file changed within a second.
    module = ModuleType(f"vmbus_plugin_{number}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    module.__dict__.update(namespace())
    exec(compiled(source, str(path)), module.__dict__)
    return module


def _refuse_forgotten(module: ModuleType, plugins: Plugins) -> None:
    """Refuse a class that is plainly meant to be registered and is not: its device would have the echo in its place."""
    registered = [*plugins.backends.values(), *(type(one.driver) for one in plugins.drivers)]
    own = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    for cls in own:
        if any(issubclass(one, cls) for one in registered):
            continue
        name = getattr(cls, "name", None)
        has = {word for word in ("open", "close", "probe", "remove", "id_table") if hasattr(cls, word)}
        if {"probe", "remove", "id_table"} <= has and isinstance(name, str):
            raise UserError(f"driver {name}: class {cls.__name__} is not registered; write @plugin.driver above it")
        if {"open", "close"} <= has and name in plugins.classes and name not in plugins.backends:
            raise UserError(f"back end {name}: class {cls.__name__} is not registered; write @plugin.backend above it")


def _said(error: BaseException, path: Path) -> str:
    """An exception in one line, with the line of the file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, text = [error.lineno], error.msg
    else:
        text = " ".join(str(error).split())
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}{': ' if text else ''}{text}"


def _own(kind: str, name: object, table: Mapping[str, object]) -> None:
    """Refuse a name that is in the table already."""
    assert _loading is not None
    _loading.plugins.owned(kind, name, _loading.path)
    if name in table:
        raise UserError(f"{kind} {name} is registered twice; choose another name")


def _check_name(what: str, name: object) -> None:
    try:
        machine_name(name)
    except Nonsense:
        raise UserError(f"{what}: {name!r} is no name; use up to 32 letters, digits, - and _") from None


def _class_values(one: DeviceClass) -> list[Any]:
    pipe = None if one.pipe_mode is None else int(one.pipe_mode)
    return [one.name, str(one.guid), one.lsvmbus_text, one.perf, int(one.chn_flags), pipe]


def _class_of_values(values: list[Any]) -> DeviceClass:
    name, guid, text, perf, flags, pipe = values
    mode = None if pipe is None else PipeMode(pipe)
    return DeviceClass(HV_UNKNOWN, name, "HV_UNKNOWN", UUID(guid), perf, False, text, None, ChannelFlags(flags), mode)
