"""Scenarios: what is left out has its default, what cannot be meant is one line with file, key and cure."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import UserError
from emu.scenario import (
    MAX_OFFERS,
    MAX_RAM,
    MAX_RING_PAGES,
    MIN_RAM,
    DeviceSpec,
    MachineSpec,
    Poll,
    Scenario,
    derived_instance,
    parse_device,
)
from emu.wire.device_classes import BY_NAME
from emu.wire.messages import GPADL_MAX_PFNS
from emu.wire.versions import VERSION_COPPER, VERSION_WIN10_V5_3, FeatureFlags
from guestproc.kernel.layout import compute

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
INSTANCE = "6c1f9d1e-0f6b-4b8e-9c55-3f0a6f0f2a11"


def load(tmp_path: Path, text: str) -> Scenario:
    """Load a scenario from its text."""
    path = tmp_path / "x.toml"
    path.write_text(text, encoding="utf-8")
    return Scenario.load(path)


def refusal(tmp_path: Path, text: str) -> str:
    """The line that a scenario is refused with, without its file's name."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    source, line = str(caught.value).split(": ", 1)
    assert source == str(tmp_path / "x.toml")
    assert "\n" not in line
    return line


def test_default_scenario_has_the_documented_values() -> None:
    """Without a scenario there are 2 vCPUs, 1 GiB and 8 echo devices with rings of 16 pages each way."""
    scenario = Scenario.default()

    assert scenario.machine == MachineSpec(
        name=None,
        vcpus=2,
        ram_bytes=1 << 30,
        era="current",
        host_version=VERSION_WIN10_V5_3,
        features=FeatureFlags(0x2D),
        deprecate_auto_eoi=True,
        poll=Poll(200, adaptive=True),
        numa=1,
        vp_order="identity",
        ring_memory="contiguous",
        exit_deadline_ns=5_000_000_000,
    )
    assert scenario.device_specs == (DeviceSpec("echo", "echo", None, 8, 16, 0),)


def test_empty_file_is_the_default_scenario(tmp_path: Path) -> None:
    """A scenario file says only what differs."""
    assert load(tmp_path, "") == Scenario.default()
    assert load(tmp_path, "[machine]\n") == Scenario.default()


def test_empty_device_array_offers_nothing(tmp_path: Path) -> None:
    """A machine without any device is a machine."""
    assert load(tmp_path, "device = []").devices() == []


def test_every_machine_key_is_read(tmp_path: Path) -> None:
    """Each key of [machine] arrives in its field."""
    scenario = load(
        tmp_path,
        """
        [machine]
        name = "a-b_9"
        vcpus = 4
        ram = "512MiB"
        era = "seed"
        host_version = "6.0"
        features = ["client-id", "pause-resume"]
        deprecate_auto_eoi = false
        poll = 50
        numa = 2
        vp_order = "reverse"
        ring_memory = "scattered"
        exit_deadline_s = 0.5
        """,
    )

    assert scenario.machine == MachineSpec(
        name="a-b_9",
        vcpus=4,
        ram_bytes=512 << 20,
        era="seed",
        host_version=VERSION_COPPER,
        features=FeatureFlags.CLIENT_ID | FeatureFlags.PAUSE_RESUME,
        deprecate_auto_eoi=False,
        poll=Poll(50, adaptive=False),
        numa=2,
        vp_order="reverse",
        ring_memory="scattered",
        exit_deadline_ns=500_000_000,
    )
    assert scenario.machine.vp_indices() == [3, 2, 1, 0]
    assert [scenario.machine.numa_node(cpu) for cpu in range(4)] == [0, 0, 1, 1]


def test_every_device_key_is_read(tmp_path: Path) -> None:
    """Each key of [[device]] arrives in its field, a ring also as a size, a GUID also in braces."""
    text = f"""
        [[device]]
        class = "echo"
        backend = "echo"
        instance = "{{{INSTANCE.upper()}}}"
        ring_pages = "20KiB"
        subchannels = 7
        """

    (device,) = load(tmp_path, text).devices()

    assert (device.class_name, device.backend, str(device.instance)) == ("echo", "echo", INSTANCE)
    assert (device.ring_pages, device.subchannels) == (5, 7)


@pytest.mark.parametrize("class_name", sorted(BY_NAME))
def test_any_class_can_be_asked_for(tmp_path: Path, class_name: str) -> None:
    """`class` takes every class of the table."""
    (device,) = load(tmp_path, f'[[device]]\nclass = "{class_name}"').devices()

    assert device.class_name == class_name


@pytest.mark.parametrize(
    ("size", "ram_bytes"),
    [('"1GiB"', 1 << 30), ('"64 MiB"', 64 << 20), ("67108864", 64 << 20), ('"65536KiB"', 64 << 20)],
)
def test_ram_is_a_size(tmp_path: Path, size: str, ram_bytes: int) -> None:
    """RAM is bytes, or a number with a unit."""
    assert load(tmp_path, f"[machine]\nram = {size}").machine.ram_bytes == ram_bytes


@pytest.mark.parametrize("name", ["default", "devices", "netlike", "reversed"])
def test_example_scenarios_load(name: str) -> None:
    """The examples are right, and the first one writes out the defaults."""
    scenario = Scenario.load(SCENARIOS / f"{name}.toml")

    assert scenario.devices()
    assert (scenario == Scenario.default()) is (name == "default")


def test_default_scenario_writes_out_every_key() -> None:
    """Whoever looks for a key finds it in `default.toml`, as it is or behind a `#`."""
    written = set(re.findall(r"^(?:# )?(\w+) = ", (SCENARIOS / "default.toml").read_text(), re.MULTILINE))
    machine = replace(Scenario.default(), machine=MachineSpec(name="mine")).to_config()["machine"]
    device = ("class", "backend", "instance", "count", "ring_pages", "subchannels")

    assert written == {*machine, *device, "plugins"}


REFUSED = [
    # [machine], one key at a time
    (
        "[machine]\nvcpus = 0",
        "machine.vcpus: 0 is not between 1 and 64; set it to the number of virtual CPUs you want",
    ),
    ("[machine]\nvcpus = 65", "machine.vcpus: 65 is not between 1 and 64; "),
    ("[machine]\nvcpus = true", "machine.vcpus: True is a boolean, not a whole number; "),
    ("[machine]\nvcpus = 2.0", "machine.vcpus: 2.0 is a number with a fraction, not a whole number; "),
    ('[machine]\nvcpus = "2"', 'machine.vcpus: "2" is a string, not a whole number; '),
    (
        "[machine]\nvcpus = 1979-05-27",
        "machine.vcpus: datetime.date(1979, 5, 27) is a date or time, not a whole",
    ),
    ("[machine]\nvcpu = 2", "machine.vcpu: unknown key; did you mean vcpus? known: name, vcpus, ram, "),
    ('[machine]\n"a\\nb" = 2', "machine.'a\\nb': unknown key; "),
    ("[machine]\nram = 0", "machine.ram: 0 is not between 32MiB and 1TiB; write a size such as"),
    ('[machine]\nram = "2TiB"', 'machine.ram: "2TiB" is not between 32MiB and 1TiB; '),
    ("[machine]\nram = 67108865", "machine.ram: 67108865 is not a multiple of a page; "),
    ('[machine]\nram = "lots"', 'machine.ram: "lots" is not a size; '),
    ('[machine]\nram = "-1GiB"', 'machine.ram: "-1GiB" is not a size; '),
    ("[machine]\nram = 1.5", "machine.ram: 1.5 is a number with a fraction, not a size; "),
    ('[machine]\nera = "future"', 'machine.era: "future" is not known; known: current, seed'),
    (
        "[machine]\nfeatures = true",
        'machine.features: True is a boolean, not an array; write an array of "client-id" or "guest-specified-',
    ),
    (
        '[machine]\nfeatures = ["client-ids"]',
        'machine.features: "client-ids" is not known; did you mean client-id? known: ',
    ),
    (
        "[machine]\ndeprecate_auto_eoi = 1",
        "machine.deprecate_auto_eoi: 1 is a whole number, not a boolean; set it to true or false",
    ),
    (
        '[machine]\nhost_version = "7.1"',
        'machine.host_version: "7.1" is not known; did you mean 5.1? known: 0.13, ',
    ),
    (
        "[machine]\nhost_version = 5.3",
        "machine.host_version: 5.3 is a number with a fraction, not a string; ",
    ),
    ("[machine]\npoll = 0", "machine.poll: 0 is not between 1 and 1000000; "),
    (
        '[machine]\npoll = "often"',
        'machine.poll: "often" is no way to poll; set it to "off", "adaptive" or micro',
    ),
    ("[machine]\npoll = false", "machine.poll: False is no way to poll; "),
    ("[machine]\nnuma = 0", "machine.numa: 0 is not between 1 and 64; "),
    ("[machine]\nnuma = 3", "machine.numa: 3 nodes are more than the 2 vCPUs; lower it"),
    ('[machine]\nvp_order = "odd"', 'machine.vp_order: "odd" is not known; known: identity, reverse'),
    ("[machine]\nexit_deadline_s = 0", "machine.exit_deadline_s: 0 is not between 0.1 and 3600; "),
    ("[machine]\nexit_deadline_s = nan", "machine.exit_deadline_s: nan is not between 0.1 and 3600; "),
    ('[machine]\nname = "a.b"', 'machine.name: "a.b" is not a machine name; use 1 to 32 letters, '),
    ('[machine]\nname = "a/b"', 'machine.name: "a/b" is not a machine name; '),
    ('[machine]\nname = ""', 'machine.name: "" is not a machine name; '),
    ('[machine]\nname = "-x"', 'machine.name: "-x" is not a machine name; '),
    ('[machine]\nname = "a\\n"', "machine.name: 'a\\n' is not a machine name; "),
    (f'[machine]\nname = "{"n" * 33}"', f'machine.name: "{"n" * 33}" is not a machine name; '),
    ("machine = 3", "machine: 3 is a whole number, not a table; write it as [machine]"),
    # [[device]]
    ("device = [1]", "device#1: 1 is a whole number, not a table; write it as [[device]]"),
    ("[[device]]\ncount = 2", "device#1.class: missing; known: "),
    (
        '[[device]]\nclass = "echo"\n[[device]]\nclass = "eco"',
        'device#2.class: "eco" is not a device class; did you mean echo? ',
    ),
    ("[[device]]\nclass = 3", "device#1.class: 3 is a whole number, not a string; known: "),
    ('[[device]]\nclass = "echo"\nbackend = "disk"', 'device#1.backend: "disk" is not known; known: echo'),
    ('[[device]]\nclass = "echo"\ncount = 0', "device#1.count: 0 is not between 1 and 2047; "),
    ('[[device]]\nclass = "echo"\ncount = 2048', "device#1.count: 2048 is not between 1 and 2047; "),
    ('[[device]]\nclass = "echo"\nring_pages = 0', "device#1.ring_pages: 0 is not between 2 and "),
    ('[[device]]\nclass = "echo"\nring_pages = 1', "device#1.ring_pages: 1 is not between 2 and "),
    (
        '[[device]]\nclass = "echo"\nring_pages = 2.5',
        "device#1.ring_pages: 2.5 pages are no whole number of pages; set",
    ),
    (
        '[[device]]\nclass = "echo"\nring_pages = "5000B"',
        'device#1.ring_pages: "5000B" is not a multiple of a page; set',
    ),
    ('[[device]]\nclass = "echo"\nring_pages = "16"', 'device#1.ring_pages: "16" is not a size; '),
    ('[[device]]\nclass = "echo"\nsubchannels = -1', "device#1.subchannels: -1 is not between 0 and 64; "),
    (
        '[[device]]\nclass = "echo"\nsubchannels = 65',
        "device#1.subchannels: 65 is not between 0 and 64; set it to the number of sub-channels of each device",
    ),
    (
        '[[device]]\nclass = "netlike"\nbackend = "echo"',
        'device#1.backend: back end "echo" and class "netlike" do not go together; set backend to "netlike"',
    ),
    (
        '[[device]]\nclass = "nic"\nbackend = "netlike"',
        'device#1.backend: back end "netlike" and class "nic" do not go together; set backend to "echo"',
    ),
    (
        '[[device]]\nclass = "echo"\ninstance = "nope"',
        'device#1.instance: "nope" is not a GUID; write it like',
    ),
    ('[[device]]\nclass = "echo"\ninstance = 7', "device#1.instance: 7 is a whole number, not a GUID; "),
    (
        '[[device]]\nclass = "echo"\ninstance = "00000000-0000-0000-0000-000000000000"',
        "device#1.instance: the zero GUID names nothing; ",
    ),
    (
        f'[[device]]\nclass = "echo"\ninstance = "{INSTANCE}"\ncount = 2',
        "device#1.instance: names one device, count is 2; leave one of them out",
    ),
    (
        f'[[device]]\nclass = "echo"\ninstance = "{INSTANCE}"\n' * 2,
        f"device.instance: {INSTANCE} names more than one device; ",
    ),
    ('[[device]]\nclass = "echo"\nrings = 2', "device#1.rings: unknown key; did you mean "),
    ("[device]\n", "device: this is a table, not an array of tables; write it as [[device]]"),
    ("device = [3]", "device#1: 3 is a whole number, not a table; "),
    # the whole
    (
        '[[device]]\nclass = "echo"\ncount = 1024\nring_pages = 2\n' * 2,
        "device.count: 2048 channels (with sub-channels) are more than the 2047 there are relids for; lower",
    ),
    (
        '[[device]]\nclass = "echo"\ncount = 2047\nring_pages = 64',
        "device.ring_pages: the rings take 1024 MiB, RAM has room for 1000 MiB of them; raise machine.ram,",
    ),
    ("[switches]\noffer = false", "switches.offer: unknown key; did you mean offer_gate? known: offer_gate, "),
    ("[switches]\noffer_gate = 0", "switches.offer_gate: 0 is neither true nor false; set it to false to make that"),
    ('[switches]\nvariant = "x"', 'switches.variant: "x" is no variant of a switch that is off; '),
    ('step = ["check"]', "step: belongs to a schedule; `vmbus-emu races run "),
    ("expect = 1", "expect: belongs to a schedule; `vmbus-emu races run "),
    ('plugins = "x.py"', 'plugins: "x.py" is a string, not an array; write it as ["FILE.py", …]'),
    ("plugins = [1]", 'plugins: 1 is no path of a file; write it as ["FILE.py", …]'),
    ("[machines]\n", "machines: unknown key; did you mean machine? known: machine, device, "),
    ("[machine\n", "not TOML: "),
    ("[machine]\nvcpus = 1\nvcpus = 2", "not TOML: "),
    (f"x = {'9' * 5000}", "not TOML: "),
    (f"x = {'[' * 5000}{']' * 5000}", "not TOML: nested too deeply; see the examples in scenarios/"),
    (f"[machine]\nvcpus = 0x{'f' * 5000}", "machine.vcpus: this is not between 1 and 64; "),
    (f'[machine]\nname = "{"n" * 900}"', f'machine.name: "{"n" * 56}... is not a machine name; '),
    ("#" * (1 << 20) + "#", "larger than 1048576 bytes; "),
]


@pytest.mark.parametrize(("text", "line"), REFUSED, ids=[line[:40] for _text, line in REFUSED])
def test_nonsense_is_one_line_with_file_key_and_cure(tmp_path: Path, text: str, line: str) -> None:
    """A scenario that cannot be meant is refused by its file, its key, what is wrong and what to do."""
    assert refusal(tmp_path, text).startswith(line)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are refused by their offset."""
    path = tmp_path / "x.toml"
    path.write_bytes(b"# \xff")

    with pytest.raises(UserError, match=r"x\.toml: byte 2 is not UTF-8; "):
        Scenario.load(path)


def test_byte_order_mark_is_no_part_of_a_scenario(tmp_path: Path) -> None:
    """Some editors write one; what follows is read as without it."""
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf[machine]\nvcpus = 3\n")

    assert Scenario.load(path).machine.vcpus == 3


def test_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    """A wrong path is refused by the system's reason."""
    with pytest.raises(UserError, match=r"gone\.toml: No such file or directory; "):
        Scenario.load(tmp_path / "gone.toml")
    with pytest.raises(UserError, match=r": Is a directory; "):
        Scenario.load(tmp_path)


@given(st.text())
def test_any_text_loads_or_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """No text whatsoever gets past as something else than a scenario or a one-line refusal."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    try:
        Scenario.load(path)
    except UserError as error:
        assert "\n" not in str(error)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
MACHINE_KEYS = st.sampled_from(["name", "vcpus", "ram", "era", "poll", "numa", "exit_deadline_s", "vp_order", "x"])
DEVICE_KEYS = st.sampled_from(["class", "backend", "instance", "count", "ring_pages", "subchannels", "x"])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "machine": st.dictionaries(MACHINE_KEYS, PLAIN, max_size=3),
            "device": st.lists(
                st.fixed_dictionaries({"class": st.just("echo") | PLAIN}, optional={"y": PLAIN})
                | st.dictionaries(DEVICE_KEYS, PLAIN, max_size=3),
                max_size=3,
            ),
        },
    )
)
def test_any_document_is_a_scenario_or_one_line(document: dict[str, Any]) -> None:
    """Whatever values the keys have, there is a scenario or a one-line refusal."""
    try:
        scenario = Scenario.from_config(document)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert 1 <= scenario.machine.vcpus <= 64


def test_config_travels_as_msgpack(tmp_path: Path) -> None:
    """What the launcher packs, the other processes read back as the same scenario."""
    scenario = load(
        tmp_path,
        f"""
        [machine]
        name = "m"
        vcpus = 3
        poll = "off"
        exit_deadline_s = 0.1
        [[device]]
        class = "echo"
        count = 5
        [[device]]
        class = "echo"
        instance = "{INSTANCE}"
        ring_pages = 8
        """,
    )

    assert Scenario.from_config(msgpack.unpackb(msgpack.packb(scenario.to_config()))) == scenario
    assert Scenario.from_config(Scenario.default().to_config()) == Scenario.default()


def test_largest_config_fits_its_place() -> None:
    """As many differing [[device]] tables as there can be still fit the 256 KiB kept for them."""
    specs = tuple(
        DeviceSpec(instance=derived_instance("scenario-test", number), ring_pages=4) for number in range(MAX_OFFERS)
    )
    config = Scenario(MachineSpec(ram_bytes=2 << 30), specs).to_config()

    assert len(msgpack.packb(config)) < 1 << 18


def test_counted_devices_have_the_same_instances_everywhere() -> None:
    """The n-th echo device has one GUID, on every machine and whatever stands between."""
    eight = Scenario.default().devices()
    apart = Scenario(MachineSpec(vcpus=1), (DeviceSpec(count=3), DeviceSpec(count=5))).devices()

    assert [d.instance for d in eight] == [d.instance for d in apart]
    assert len({d.instance for d in eight}) == 8
    assert str(eight[0].instance) == "0ce1cd77-c4e5-56e0-aa2c-2da5f1a538a4"


def test_devices_that_are_single_have_the_instance_known_for_them() -> None:
    """The first keyboard has the GUID that real hosts give it, a second one a derived GUID."""
    first, second = Scenario(MachineSpec(), (DeviceSpec("kbd", count=2),)).devices()

    assert str(first.instance) == "d34b2567-b9b6-42b9-8778-0a4ec0b955bf"
    assert second.instance == derived_instance("kbd", 1)


def test_flags_beat_the_file(tmp_path: Path) -> None:
    """A flag replaces the file's value, `--device` all of the file's devices; the rest stays."""
    scenario = load(tmp_path, '[machine]\nvcpus = 3\nram = "512MiB"\n[[device]]\nclass = "echo"\ncount = 3')

    changed = scenario.with_overrides(name="n", vcpus=5, devices=[parse_device("echo:2")], poll="off")

    assert changed.machine == replace(scenario.machine, name="n", vcpus=5, poll=Poll(0, adaptive=False))
    assert [spec.count for spec in changed.device_specs] == [2]
    assert scenario.with_overrides() == scenario


def test_flags_are_checked_like_the_file() -> None:
    """A nonsense flag is refused by its own name, and a sum by both sources."""
    default = Scenario.default()
    with pytest.raises(UserError, match=r"^command line: --vcpus: 0 is not between 1 and 64; "):
        default.with_overrides(vcpus=0)
    with pytest.raises(UserError, match=r'^command line: --name: "a b" is not a machine name; '):
        default.with_overrides(name="a b")
    with pytest.raises(UserError, match=r'^command line: --poll: "now" is no way to poll; '):
        default.with_overrides(poll="now")
    with pytest.raises(UserError, match=r"^the default scenario and the command line: device.count: 3000 channels"):
        default.with_overrides(devices=[parse_device("echo:1500")] * 2)


@pytest.mark.parametrize(("text", "count"), [("echo", 1), ("echo:1", 1), ("echo:2000", 2000)])
def test_device_flag(text: str, count: int) -> None:
    """`--device` takes a class and, behind a colon, how many."""
    assert parse_device(text) == DeviceSpec("echo", count=count)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", '"" is not a device class; known: '),
        ("eco", '"eco" is not a device class; did you mean echo?'),
        ("echo:", '"" is a string, not a whole number; set it to the number of such devices'),
        ("echo:0", "0 is not between 1 and 2047; "),
        ("echo:2048", "2048 is not between 1 and 2047; "),
        ("echo:-1", '"-1" is a string, not a whole number; '),
        ("echo:2:3", '"2:3" is a string, not a whole number; '),
        ("echo:\N{SUPERSCRIPT TWO}", "is a string, not a whole number; "),
    ],
)
def test_nonsense_device_flag_is_refused(text: str, line: str) -> None:
    """A wrong `--device` is refused by what is wrong with it."""
    with pytest.raises(UserError) as caught:
        parse_device(text)

    assert str(caught.value).startswith("command line: --device: ")
    assert line in str(caught.value)


@pytest.mark.parametrize("ring_memory", ["contiguous", "scattered"])
def test_rings_that_just_fit_are_accepted(ring_memory: str) -> None:
    """Rings may fill RAM up to what the guest kernel needs, and not a page more."""
    machine = MachineSpec(ram_bytes=64 << 20, ring_memory=ring_memory)
    ring = DeviceSpec(ring_pages=16)
    fitting = machine.ring_room // ring.ring_bytes(2, scattered=ring_memory == "scattered")

    Scenario(machine, (replace(ring, count=fitting),))
    with pytest.raises(UserError, match="rings take"):
        Scenario(machine, (replace(ring, count=fitting + 1),))


@pytest.mark.parametrize("ram_bytes", [MIN_RAM, 1 << 30, MAX_RAM])
def test_what_is_kept_from_rings_holds_the_guests_tables(ram_bytes: int) -> None:
    """The guest kernel's tables for 64 CPUs fit beside the rings, and a page a channel for its requests."""
    tables = compute(ram_bytes, 64).first_free_page * 4096

    assert tables + MAX_OFFERS * 4096 <= ram_bytes - MachineSpec(ram_bytes=ram_bytes).ring_room


def test_sub_channels_count_as_channels() -> None:
    """A device with sub-channels takes a relid, and two rings, for each of its channels."""
    with pytest.raises(UserError, match="2048 channels"):
        Scenario(MachineSpec(), (DeviceSpec(count=512, subchannels=3, ring_pages=2),))
    assert DeviceSpec(count=2, subchannels=3, ring_pages=2).ring_bytes(2) == 2 * 4 * 2 * 2 * 4096


@pytest.mark.parametrize(("vcpus", "subchannels"), [(1, 0), (4, 3), (8, 7), (64, 7)])
def test_a_netlike_device_has_a_channel_for_each_vcpu_up_to_eight(vcpus: int, subchannels: int) -> None:
    """Unless it says how many; from a flag, and also after its way through a configuration."""
    scenario = Scenario.default().with_overrides(vcpus=vcpus, devices=[parse_device("netlike:2")])

    for one in (scenario, Scenario.from_config(scenario.to_config())):
        assert [(d.backend, d.subchannels) for d in one.devices()] == [("netlike", subchannels)] * 2
    assert Scenario(MachineSpec(vcpus=4), (DeviceSpec("netlike", subchannels=0),)).devices()[0].subchannels == 0
    assert Scenario(MachineSpec(vcpus=4), (DeviceSpec("echo"),)).devices()[0].subchannels == 0


@pytest.mark.parametrize(("ring_pages", "contiguous", "scattered"), [(2, 4, 8), (9, 32, 64), (16, 32, 64)])
def test_rings_need_a_power_of_two_of_pages(ring_pages: int, contiguous: int, scattered: int) -> None:
    """The guest's page allocator hands out aligned blocks, so that is what a channel's rings cost."""
    ring = DeviceSpec(ring_pages=ring_pages)

    assert (ring.ring_bytes(2) // 4096, ring.ring_bytes(2, scattered=True) // 4096) == (contiguous, scattered)


def test_largest_rings_are_those_that_one_gpadl_describes() -> None:
    """A channel's two rings are one GPADL: with a page more each it could not be opened."""
    assert 2 * MAX_RING_PAGES <= GPADL_MAX_PFNS < 2 * (MAX_RING_PAGES + 1)
