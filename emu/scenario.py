"""A scenario: which machine to build and which devices to offer, as frozen values.

It is read from TOML (`Scenario.load`), changed by flags (`with_overrides`: flags beat the file), and travels
to the machine's processes as plain data (`to_config`, `from_config`). Whatever exists was checked: a value
that cannot be meant, an unknown key, more than the machine can hold: a UserError names source, key and cure.

    [machine]   name vcpus ram era host_version features deprecate_auto_eoi poll numa vp_order ring_memory
                exit_deadline_s
    [[device]]  class backend instance count ring_pages subchannels
    [switches]  fixes to leave out, `NAME = false`, and their variant (see `emu.switches`)
    [[fault]]   name value, and the keys of `emu.faults`: what goes wrong on this machine
    [policy]    KIND.STATE = "silent", "refuse" or "accept": see `emu.host_policy`
    plugins     files that register classes and back ends of your own (see `emu.plugin`)
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from emu import faults as fault_table
from emu import plugin
from emu.faults import Fault
from emu.host_policy import read_policy
from emu.layout import MAX_VPS, PAGE_SIZE
from emu.plugin import NO_PLUGINS, Plugins
from emu.scenario_text import (
    Nonsense,
    Table,
    byte_count,
    complaint,
    guid,
    machine_name,
    nearest,
    one_of,
    page_count,
    read_toml,
    seconds,
    shown,
    type_name,
    whole_number,
)
from emu.switches import ALL_FIXED, Fix, read_switches
from emu.values import valueclass
from emu.wire.device_classes import BY_NAME, NETLIKE, SINGLETON_INSTANCES
from emu.wire.subchannel_request import MAX_SUBCHANNELS
from emu.wire.versions import (
    KNOWN_VERSIONS,
    VERSION_WIN10_V5_3,
    FeatureFlags,
    version_from_text,
    version_text,
)

MAX_OFFERS: Final = 2047
"""relid 0 is nobody's and 2,047 is the last flag of an event-flag page: so many channels can be offered."""

MIN_RAM: Final = 32 << 20
MAX_RAM: Final = 1 << 40
KERNEL_RAM: Final = 16 << 20
"""What the guest kernel's records take at most, beside its 1/128 of RAM for a line on each page."""

MIN_RING_PAGES: Final = 2  # one of indices, one of data
MAX_RING_PAGES: Final = 8190 // 2  # both rings are one GPADL, whose bytes in its header's field are 16 bits

ERAS: Final = ("current", "seed")
SUPPORTED_FEATURES: Final = (
    FeatureFlags.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    | FeatureFlags.MODIFY_CONNECTION
    | FeatureFlags.CLIENT_ID
    | FeatureFlags.PAUSE_RESUME
)
"""The features of 6.0 that the host carries out."""

BACKENDS: Final = ("echo", "netlike")
SCENARIO_KEYS: Final = ("machine", "device", "fault", "policy", "plugins", "switches")
"""What a scenario has at its top."""
SCHEDULE_KEYS: Final = ("title", "story", "step", "expect")
"""What a schedule has beside its scenario (`tools.schedule`)."""
_INSTANCES: Final = UUID("8e2f4c6a-5d0b-5c52-9a41-6f7a3d1c0be7")


@valueclass()
class Poll:
    """How long a halting processor looks before it blocks: `limit_us` (0: not at all), or up to that."""

    limit_us: int = 200
    adaptive: bool = True

    @classmethod
    def read(cls, value: object) -> Poll:
        """Read "off", "adaptive" or a number of microseconds (also as text, as a flag gives it)."""
        if value == "off":
            return cls(0, adaptive=False)
        if value == "adaptive":
            return cls()
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        if isinstance(number, bool) or not isinstance(number, int):
            raise Nonsense(f"{shown(value)} is no way to poll", 'set it to "off", "adaptive" or microseconds')
        limit_us = whole_number(1, 1_000_000, 'microseconds to poll for, or to "off" or "adaptive"')(number)
        return cls(limit_us, adaptive=False)

    def text(self) -> int | str:
        """The value as a scenario spells it."""
        if self.adaptive:
            return "adaptive"
        return self.limit_us or "off"


@valueclass()
class MachineSpec:
    """The `[machine]` table: processors, memory, how they behave; `name` None lets the launcher pick one."""

    name: str | None = None
    vcpus: int = 2
    ram_bytes: int = 1 << 30
    era: str = "current"
    host_version: int = VERSION_WIN10_V5_3
    features: FeatureFlags = SUPPORTED_FEATURES
    deprecate_auto_eoi: bool = True
    poll: Poll = field(default_factory=Poll)
    numa: int = 1
    vp_order: str = "identity"
    ring_memory: str = "contiguous"
    exit_deadline_ns: int = 5_000_000_000

    def vp_indices(self) -> list[int]:
        """VP index of each VP page, by position."""
        order = range(self.vcpus)
        return list(reversed(order)) if self.vp_order == "reverse" else list(order)

    @property
    def ring_room(self) -> int:
        """Bytes of RAM that may become rings."""
        return self.ram_bytes - self.ram_bytes // 128 - KERNEL_RAM

    def numa_node(self, cpu: int) -> int:
        """NUMA node of a CPU: the CPUs are dealt out in runs, as evenly as they go."""
        return cpu * self.numa // self.vcpus


@valueclass()
class DeviceSpec:
    """One `[[device]]` table: `count` equal devices; `instance` names a single one, else it is derived.

    What is not said depends on the class: an empty `backend` is `backend_of` it, `subchannels` None as many as
    `subchannels_of` it says.
    """

    class_name: str = "echo"
    backend: str = ""
    instance: UUID | None = None
    count: int = 1
    ring_pages: int = 16
    subchannels: int | None = None

    def __post_init__(self) -> None:
        if not self.backend:
            object.__setattr__(self, "backend", backend_of(self.class_name))
        if self.subchannels is None and self.class_name != NETLIKE.name:
            object.__setattr__(self, "subchannels", 0)

    def subchannels_with(self, vcpus: int) -> int:
        """Sub-channels of each of these devices, on a machine of so many vCPUs."""
        return subchannels_of(self.class_name, vcpus) if self.subchannels is None else self.subchannels

    def channels(self, vcpus: int) -> int:
        """Channels of all these devices together, sub-channels included."""
        return self.count * (1 + self.subchannels_with(vcpus))

    def ring_block(self, *, scattered: bool = False) -> int:
        """Bytes of guest RAM out of which the guest takes both rings of a channel.

        A power of two of pages; twice as large when no two pages shall lie beside each other.
        """
        pages = 2 * self.ring_pages * (2 if scattered else 1)
        return (1 << (pages - 1).bit_length()) * PAGE_SIZE

    def ring_list_block(self) -> int:
        """Bytes of guest RAM for the list of both rings' pages, which only scattered ones have: 8 bytes a page."""
        pages = -(-8 * 2 * self.ring_pages // PAGE_SIZE)
        return (1 << (pages - 1).bit_length()) * PAGE_SIZE

    def ring_bytes(self, vcpus: int, *, scattered: bool = False) -> int:
        """Guest RAM that the rings of all these channels need, both ways."""
        return self.channels(vcpus) * self.ring_block(scattered=scattered)


@valueclass()
class Device:
    """One device to offer: what a `DeviceSpec` means, each of its devices by itself."""

    class_name: str
    backend: str
    instance: UUID
    ring_pages: int
    subchannels: int


@valueclass()
class Scenario:
    """A machine and its devices, checked; `source` is what a complaint names."""

    machine: MachineSpec
    device_specs: tuple[DeviceSpec, ...]
    source: str = field(default="the default scenario", compare=False)
    plugins: Plugins = NO_PLUGINS
    fix: Fix = ALL_FIXED
    faults: tuple[Fault, ...] = ()
    policy: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Cells of the host's policy that differ from its defaults: `KIND.STATE` to an answer."""

    def __post_init__(self) -> None:
        self._check()

    @classmethod
    def default(cls, plugins: Iterable[Path] = ()) -> Scenario:
        """2 vCPUs, 8 echo devices, and one device of each class that these plugins register."""
        loaded = plugin.load(plugins) or NO_PLUGINS
        return cls(MachineSpec(), _default_devices(loaded), plugins=loaded)

    @classmethod
    def load(cls, path: Path, plugins: Iterable[Path] = ()) -> Scenario:
        """Read a scenario file; UserError names the file, the key and the cure.

        Its own plugins, relative to it, are loaded first, then those of `plugins`.
        """
        return cls._read(read_toml(path), str(path), path.parent, plugins)

    @classmethod
    def of_document(cls, document: Mapping[str, Any], source: str, directory: Path) -> Scenario:
        """The scenario in a document that was read already, `source` of which lies in `directory`. Raises as `load`."""
        return cls._read(document, source, directory)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Scenario:
        """The scenario that `to_config` gave; what did not come from there is a UserError as in a file.

        Without `plugins` in it, those count that this process is attached with.
        """
        return cls._read(config, "configuration", Path("/"))

    @classmethod
    def _read(
        cls, document: Mapping[str, Any], source: str, directory: Path, more_plugins: Iterable[Path] = ()
    ) -> Scenario:
        top = Table(dict(document), source, "")
        machine = _read_machine(Table(top.take("machine", _as_it_is, {}), source, "machine"))
        blocks = top.take("device", _array("device"), None)
        fault_blocks = top.take("fault", _array("fault"), None)
        policy = read_policy(top.take("policy", _as_it_is, {}), source)
        names: list[str] = []
        paths = [*(directory / name for name in top.take("plugins", _paths, names)), *more_plugins]
        fix = read_switches(Table(top.take("switches", _as_it_is, {}), source, "switches"))
        for key in SCHEDULE_KEYS:
            if key in top:
                cure = f"`vmbus-emu races run {source}` runs it"
                raise top.complaint(key, Nonsense("belongs to a schedule", cure))
        top.end()
        plugins = plugin.load(paths) if paths else plugin.installed()
        specs = _default_devices(plugins)
        if blocks is not None:
            specs = tuple(
                _read_device(Table(block, source, f"device#{n}"), plugins) for n, block in enumerate(blocks, 1)
            )
        classes = plugins.classes
        faults = [
            fault_table.read_table(one, source, f"fault#{n}", classes) for n, one in enumerate(fault_blocks or (), 1)
        ]
        return cls(machine, specs, source, plugins, fix, tuple(faults), policy)

    def with_overrides(
        self,
        *,
        name: str | None = None,
        vcpus: int | None = None,
        devices: Sequence[DeviceSpec] = (),
        poll: str | None = None,
        faults: Sequence[str] = (),
    ) -> Scenario:
        """The scenario with what the flags say instead; `devices` replaces all of the file's, `faults` come to them."""
        flags = Table({}, "command line", "")
        machine = self.machine
        if name is not None:
            machine = replace(machine, name=flags.read("--name", machine_name, name))
        if vcpus is not None:
            machine = replace(machine, vcpus=flags.read("--vcpus", _vcpus, vcpus))
        if poll is not None:
            machine = replace(machine, poll=flags.read("--poll", Poll.read, poll))
        source = f"{self.source} and the command line" if machine != self.machine or devices else self.source
        more = [fault_table.parse(text, classes=self.plugins.classes) for text in faults]
        fault_table.check_count(len(self.faults) + len(more), "command line: --fault")
        return replace(
            self,
            machine=machine,
            device_specs=tuple(devices) or self.device_specs,
            source=source,
            faults=(*self.faults, *more),
        )

    def devices(self) -> list[Device]:
        """Every device to offer, one by one; the n-th of a class has the same GUID on every machine."""
        seen: Counter[str] = Counter()
        devices = []
        for spec in self.device_specs:
            for _ in range(spec.count):
                instance = spec.instance or derived_instance(spec.class_name, seen[spec.class_name])
                seen[spec.class_name] += 1
                subchannels = spec.subchannels_with(self.machine.vcpus)
                devices.append(Device(spec.class_name, spec.backend, instance, spec.ring_pages, subchannels))
        return devices

    def to_config(self) -> dict[str, Any]:
        """The scenario as plain values (msgpack, JSON), in the shape and the words of a scenario file."""
        machine = self.machine
        table = {
            "vcpus": machine.vcpus,
            "ram": machine.ram_bytes,
            "era": machine.era,
            "host_version": version_text(machine.host_version),
            "features": [_feature_word(flag) for flag in machine.features],
            "deprecate_auto_eoi": machine.deprecate_auto_eoi,
            "poll": machine.poll.text(),
            "numa": machine.numa,
            "vp_order": machine.vp_order,
            "ring_memory": machine.ring_memory,
            "exit_deadline_s": machine.exit_deadline_ns / 1e9,
        }
        if machine.name is not None:
            table["name"] = machine.name
        config: dict[str, Any] = {"machine": table, "device": [_device_config(spec) for spec in self.device_specs]}
        if self.fix != ALL_FIXED:
            config["switches"] = self.fix.to_config()
        if self.faults:
            config["fault"] = [one.table() for one in self.faults]
        if self.policy:
            config["policy"] = dict(self.policy)
        return {**config, "plugins": self.plugins.paths} if self.plugins else config

    @property
    def ring_bytes(self) -> int:
        """Guest RAM that the rings of all channels need, both ways."""
        scattered = self.machine.ring_memory == "scattered"
        return sum(spec.ring_bytes(self.machine.vcpus, scattered=scattered) for spec in self.device_specs)

    def _check(self) -> None:
        """What no single key can be blamed for: too many channels, too little RAM, an instance twice."""
        vcpus = self.machine.vcpus
        fault_table.check_count(len(self.faults), self.source)
        offers = sum(spec.channels(vcpus) for spec in self.device_specs)
        if offers > MAX_OFFERS:
            problem = Nonsense(
                f"{offers} channels (with sub-channels) are more than the {MAX_OFFERS} there are relids for",
                "lower a count, or subchannels",
            )
            raise complaint(self.source, "device.count", problem)
        rings = self.ring_bytes
        if rings > self.machine.ring_room:
            room = self.machine.ring_room >> 20
            problem = Nonsense(
                f"the rings take {_mib(rings)} MiB, RAM has room for {room} MiB of them",
                "raise machine.ram, or lower count or ring_pages",
            )
            raise complaint(self.source, "device.ring_pages", problem)
        if self.machine.numa > self.machine.vcpus:
            problem = Nonsense(f"{self.machine.numa} nodes are more than the {self.machine.vcpus} vCPUs", "lower it")
            raise complaint(self.source, "machine.numa", problem)
        twice = [instance for instance, n in Counter(d.instance for d in self.devices()).items() if n > 1]
        if twice:
            problem = Nonsense(f"{twice[0]} names more than one device", "give each device an instance of its own")
            raise complaint(self.source, "device.instance", problem)


def parse_device(text: str, plugins: Plugins = NO_PLUGINS, *, flag: str = "--device") -> DeviceSpec:
    """Read `CLASS[:COUNT]`, as `flag` takes it; UserError otherwise."""
    class_name, colon, count = text.partition(":")
    flags = Table({}, "command line", "")
    known = flags.read(flag, _device_class(plugins), class_name)
    spec = DeviceSpec(known, default_backend(known, plugins))
    if not colon:
        return spec
    number: object = int(count) if count.isascii() and count.isdigit() and len(count) < 19 else count
    return replace(spec, count=flags.read(flag, _count, number))


def default_backend(class_name: str, plugins: Plugins) -> str:
    """The back end of a device of which nobody says: a plugin's own for its class; else `backend_of` it."""
    return plugins.backend_of(class_name) or backend_of(class_name)


def _default_devices(plugins: Plugins) -> tuple[DeviceSpec, ...]:
    own = (DeviceSpec(name, default_backend(name, plugins)) for name in plugins.classes)
    return (DeviceSpec(count=8), *own)


@lru_cache(maxsize=MAX_OFFERS)
def derived_instance(class_name: str, index: int) -> UUID:
    """Instance GUID of the `index`-th device of a class: the same in every machine, so that runs compare."""
    if index == 0 and class_name in SINGLETON_INSTANCES:
        return SINGLETON_INSTANCES[class_name]
    return uuid.uuid5(_INSTANCES, f"{class_name}/{index}")


_vcpus = whole_number(1, MAX_VPS, "the number of virtual CPUs you want")
_count = whole_number(1, MAX_OFFERS, "the number of such devices")


def _read_machine(table: Table) -> MachineSpec:
    default = MachineSpec()
    machine = MachineSpec(
        name=table.take("name", machine_name, default.name),
        vcpus=table.take("vcpus", _vcpus, default.vcpus),
        ram_bytes=table.take("ram", _ram, default.ram_bytes),
        era=table.take("era", one_of(*ERAS), default.era),
        host_version=table.take("host_version", _host_version, default.host_version),
        features=table.take("features", _features, default.features),
        deprecate_auto_eoi=table.take("deprecate_auto_eoi", _yes_or_no, default.deprecate_auto_eoi),
        poll=table.take("poll", Poll.read, default.poll),
        numa=table.take("numa", whole_number(1, MAX_VPS, "the number of NUMA nodes"), default.numa),
        vp_order=table.take("vp_order", one_of("identity", "reverse"), default.vp_order),
        ring_memory=table.take("ring_memory", one_of("contiguous", "scattered"), default.ring_memory),
        exit_deadline_ns=table.take("exit_deadline_s", seconds(0.1, 3600), default.exit_deadline_ns),
    )
    table.end()
    return machine


def _read_device(table: Table, plugins: Plugins) -> DeviceSpec:
    if "class" not in table:
        raise table.complaint("class", Nonsense("missing", nearest("", (*BY_NAME, *plugins.classes))))
    default = DeviceSpec()
    class_name = table.take("class", _device_class(plugins), default.class_name)
    spec = DeviceSpec(
        class_name=class_name,
        backend=table.take("backend", one_of(*BACKENDS, *plugins.backends), default_backend(class_name, plugins)),
        instance=table.take("instance", guid, default.instance),
        count=table.take("count", _count, default.count),
        ring_pages=table.take("ring_pages", page_count(MIN_RING_PAGES, MAX_RING_PAGES), default.ring_pages),
        subchannels=table.take("subchannels", _subchannels, None),
    )
    table.end()
    if (fault := backend_fault(spec.class_name, spec.backend)) is not None:
        raise table.complaint("backend", fault)
    if spec.instance is not None and spec.count > 1:
        raise table.complaint("instance", Nonsense(f"names one device, count is {spec.count}", "leave one of them out"))
    return spec


def _as_it_is(value: object) -> Any:
    return value


def _array(name: str) -> Callable[[object], list[object] | None]:
    def read(value: object) -> list[object]:
        if not isinstance(value, list):
            raise Nonsense(f"{shown(value)} is {type_name(value)}, not an array of tables", f"write it as [[{name}]]")
        return value

    return read


def _ram(value: object) -> int:
    ram_bytes = byte_count(value)
    if not MIN_RAM <= ram_bytes <= MAX_RAM:
        raise Nonsense(f"{shown(value)} is not between 32MiB and 1TiB", 'write a size such as "1GiB"')
    if ram_bytes % PAGE_SIZE:
        raise Nonsense(f"{shown(value)} is not a multiple of a page", 'write a size such as "1GiB"')
    return ram_bytes


def _host_version(value: object) -> int:
    return version_from_text(one_of(*map(version_text, KNOWN_VERSIONS))(value))


def _feature_word(flag: FeatureFlags) -> str:
    return str(flag.name).lower().replace("_", "-")


def _features(value: object) -> FeatureFlags:
    """Names of 6.0's features, as an array; older versions have none, whatever it says."""
    words = {_feature_word(flag): flag for flag in SUPPORTED_FEATURES}
    if not isinstance(value, list):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not an array", f"write an array of {_either(words)}")
    features = FeatureFlags(0)
    for word in value:
        features |= words[one_of(*words)(word)]
    return features


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not a boolean", "set it to true or false")
    return value


def _subchannels(value: object) -> int:
    return whole_number(0, MAX_SUBCHANNELS, "the number of sub-channels of each device")(value)


def _paths(value: object) -> list[str]:
    if not isinstance(value, list):
        raise Nonsense(f"{shown(value)} is {type_name(value)}, not an array", 'write it as ["FILE.py", …]')
    for one in value:
        if not isinstance(one, str) or not one:
            raise Nonsense(f"{shown(one)} is no path of a file", 'write it as ["FILE.py", …]')
    return value


def _device_class(plugins: Plugins) -> Callable[[object], str]:
    names = (*BY_NAME, *plugins.classes)

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise Nonsense(f"{shown(value)} is {type_name(value)}, not a string", nearest("", names))
        if value not in names:
            raise Nonsense(f"{shown(value)} is not a device class", nearest(value, names))
        return value

    return read


def _device_config(spec: DeviceSpec) -> dict[str, Any]:
    """A [[device]] table without what it leaves at its default: there may be 2,047 of them."""
    table = {
        "backend": spec.backend,
        "instance": spec.instance and str(spec.instance),
        "count": spec.count,
        "ring_pages": spec.ring_pages,
        "subchannels": spec.subchannels,
    }
    default = DeviceSpec(spec.class_name)
    changed = {key: value for key, value in table.items() if value != getattr(default, key)}
    if spec.class_name not in BY_NAME:
        changed["backend"] = spec.backend  # a plugin's class may have another default
    return {"class": spec.class_name, **changed}


def backend_of(class_name: str) -> str:
    """The back end of a device that names none."""
    return "netlike" if class_name == NETLIKE.name else "echo"


def backend_fault(class_name: str, backend: str) -> Nonsense | None:
    """Why this back end cannot stand behind this class: `netlike` and its driver speak to each other only."""
    if (class_name == NETLIKE.name) is (backend == "netlike"):
        return None
    other = "netlike" if class_name == NETLIKE.name else "echo"
    return Nonsense(f'back end "{backend}" and class "{class_name}" do not go together', f'set backend to "{other}"')


def subchannels_of(class_name: str, vcpus: int) -> int:
    """How many sub-channels a device has that does not say: a NIC has as many channels as vCPUs, up to 8."""
    return min(vcpus, 8) - 1 if class_name == NETLIKE.name else 0


def _either(words: Iterable[str]) -> str:
    return " or ".join(f'"{word}"' for word in sorted(words))


def _mib(nbytes: int) -> int:
    return -(-nbytes // (1 << 20))
