"""Plugins: what a file may register, in which numbers, and each way in which it may be wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest

from emu import plugin
from emu.errors import UserError
from emu.plugin import FIRST_CALLBACK, FIRST_DRIVER, NO_PLUGINS, Plugins
from emu.scenario import DeviceSpec, Scenario, parse_device
from emu.wire.device_classes import class_of, lsvmbus_text
from emu.wire.messages import ChannelFlags, PipeMode

GUID = "3f0f57a1-2f6c-4be9-9b6a-1c0a8d2f9e55"
CLASS = f'from emu import plugin\nONE = plugin.device_class("one", guid="{GUID}", description="One")\n'
BACKEND = (
    "@plugin.backend\nclass B:\n    name = 'one'\n    def open(self, channel): ...\n    def close(self, channel): ...\n"
)
DRIVER = (
    "@plugin.driver\nclass D:\n    name = 'hv_one'\n    id_table = plugin.ids(ONE)\n"
    "    def probe(self, current, device): return 0\n    def remove(self, current, device): ...\n"
)
CALLBACK = "@plugin.channel_callback\ndef callback(current, channel): ...\n"
WHOLE = CLASS + BACKEND + DRIVER + CALLBACK


def written(directory: Path, text: str, name: str = "one.py") -> Path:
    """A plugin file."""
    path = directory / name
    path.write_text(text)
    return path


def test_a_plugin_registers_all_four_kinds(tmp_path: Path) -> None:
    """A class, a back end, a driver and a callback, each found by name or number."""
    plugins = plugin.load([written(tmp_path, WHOLE)])

    one = plugins.classes["one"]
    assert (one.guid, one.lsvmbus_text, one.chn_flags, one.pipe_mode) == (UUID(GUID), "One", 1, None)
    assert plugins.backends["one"].name == "one" and plugins.backend_of("one") == "one"
    assert [(one.number, one.driver.name) for one in plugins.drivers] == [(FIRST_DRIVER, "hv_one")]
    assert plugins.drivers[0].driver.id_table == frozenset({UUID(GUID).bytes_le})
    assert {name: one.number for name, one in plugins.callbacks.items()} == {"one.callback": FIRST_CALLBACK}


def test_numbers_follow_the_order_of_files_and_registrations(tmp_path: Path) -> None:
    """So every process that loads the same files in the same order means the same by a number."""
    other = WHOLE.replace("one", "two").replace("e55", "e56") + CALLBACK.replace("callback(", "second(")
    paths = [written(tmp_path, WHOLE), written(tmp_path, other, "two.py")]

    first, again = plugin.load(paths), plugin.load(paths)

    assert [one.driver.name for one in first.drivers] == ["hv_one", "hv_two"]
    assert {name: one.number - FIRST_CALLBACK for name, one in first.callbacks.items()} == {
        "one.callback": 0,
        "two.callback": 1,
        "two.second": 2,
    }
    assert [one.number for one in again.drivers] == [one.number for one in first.drivers]
    assert first == again


def test_an_ordinary_import_registers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test may import a plugin for its constants, and call its callback; it has no number then."""
    written(tmp_path, WHOLE, "imported_plugin.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    import imported_plugin  # type: ignore[import-not-found]

    assert imported_plugin.callback.number == 0 and imported_plugin.callback(None, None) is None
    assert imported_plugin.ONE.name == "one"


def test_a_file_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a scenario and by a flag, say; also where one path is relative."""
    path = written(tmp_path, WHOLE)
    monkeypatch.chdir(tmp_path)

    assert plugin.load([path, Path("one.py")]).paths == [str(path)]


def test_what_a_plugin_prints_is_not_mixed_with_a_commands_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout may be read by a program: what is printed while a plugin is loaded goes to stderr."""
    plugin.load([written(tmp_path, "print('hello')")])

    assert capsys.readouterr() == ("", "hello\n")


REFUSED = [
    ("def def", "line 1: SyntaxError: invalid syntax; mend it"),
    ("import nonesuch", "line 1: ModuleNotFoundError: No module named 'nonesuch'; mend it"),
    ("\nraise SystemExit(3)", "line 2: SystemExit: 3; mend it"),
    ("raise ValueError('two\\nlines')", "line 1: ValueError: two lines; mend it"),
    ("x = '\0'", "it has a NUL byte, which no text has; give the path of a Python file"),
    (CLASS + CLASS, "device class one is registered twice; choose another name"),
    (CLASS + CLASS.replace('"one"', '"two"'), f"device class two: GUID {GUID} is registered already; "),
    (CLASS.replace('"one"', '"nic"'), "device class nic is one of ours; choose another name"),
    (CLASS.replace(GUID, "f8615163-df3e-46c5-913f-f2d2f965ed0e"), "GUID f8615163-df3e-46c5-913f-f2d2f965ed0e is that "),
    (CLASS.replace(GUID, "zz"), "device class one: 'zz' is no GUID; make one with `uuidgen`"),
    (CLASS.replace('"one"', '"o n e"'), "device class: 'o n e' is no name; "),
    (CLASS.replace('"one"', "3"), "device class: 3 is no name; "),
    (CLASS + BACKEND + BACKEND, "back end one is registered twice; choose another name"),
    (CLASS + BACKEND.replace("'one'", "None"), "back end B: name: None is no name; "),
    (CLASS + BACKEND.replace("def close", "def shut"), "back end one: no open and close; derive it from "),
    (CLASS + DRIVER + DRIVER, "driver hv_one is registered already; choose another name"),
    (CLASS + DRIVER.replace("def remove", "def take"), "driver hv_one: it has no remove(self, current, device)"),
    (CLASS + DRIVER.replace("plugin.ids(ONE)", "{ONE}"), "driver hv_one: id_table is no frozenset of GUIDs "),
    (
        CLASS + DRIVER.replace("    def probe", "    def __init__(self): 1 / 0\n    def probe"),
        "line 7: ZeroDivisionError: ",
    ),
    (CLASS + CALLBACK + CALLBACK, "channel callback one.callback is registered twice; choose another name"),
    ("#" * (1 << 20) + "#", "larger than 1048576 bytes; give the path of a Python file"),
]


@pytest.mark.parametrize(("text", "line"), REFUSED, ids=[line[:50] for _text, line in REFUSED])
def test_a_plugin_that_cannot_be_is_one_line_with_its_file(tmp_path: Path, text: str, line: str) -> None:
    """Whatever is wrong with a file: its path, the line of it where there is one, what, and the cure."""
    path = written(tmp_path, text)

    with pytest.raises(UserError) as refused:
        plugin.load([path])

    said = str(refused.value)
    assert said.startswith(f"plugin {path}: {line}") and "\n" not in said


@pytest.mark.parametrize(
    ("forgotten", "line"),
    [
        ("backend", "back end one: class B is not registered; write @plugin.backend above it"),
        ("driver", "driver hv_one: class D is not registered; write @plugin.driver above it"),
    ],
)
def test_a_decorator_that_was_forgotten_is_told(tmp_path: Path, forgotten: str, line: str) -> None:
    """The device would have the echo at its other end, and nobody would say so."""
    path = written(tmp_path, WHOLE.replace(f"@plugin.{forgotten}\n", ""))

    with pytest.raises(UserError) as refused:
        plugin.load([path])
    assert str(refused.value) == f"plugin {path}: {line}"


def test_a_class_that_another_is_derived_from_is_not_forgotten(tmp_path: Path) -> None:
    """Nor one that looks like none of ours, or that comes from somewhere else."""
    bases = (BACKEND + DRIVER).replace("@plugin.backend\n", "").replace("@plugin.driver\n", "")
    bases = bases.replace("class B:", "class BB:").replace("class D:", "class DD:")
    derived = "@plugin.backend\nclass B(BB): ...\n@plugin.driver\nclass D(DD): ...\n"
    others = "from pathlib import Path\nclass File:\n    def open(self): ...\n    def close(self): ...\n"

    plugins = plugin.load([written(tmp_path, CLASS + bases + derived + others)])

    assert list(plugins.backends) == ["one"] and [one.driver.name for one in plugins.drivers] == ["hv_one"]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """One that is not there, and one that is none."""
    with pytest.raises(UserError, match=r"nowhere\.py: No such file or directory; give the path of a Python file"):
        plugin.load([tmp_path / "nowhere.py"])
    with pytest.raises(UserError, match="Is a directory"):
        plugin.load([tmp_path])


def test_a_plugin_named_from_a_directory_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name leads nowhere then; that is no error of ours."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    with pytest.raises(UserError, match=r"^plugin x\.py: the current directory is gone; "):
        plugin.load([Path("x.py")])


def test_two_files_may_not_register_the_same(tmp_path: Path) -> None:
    """The complaint is about the second and names the first; two files of one name cannot be told apart."""
    first = written(tmp_path, WHOLE)
    (tmp_path / "b").mkdir()

    with pytest.raises(UserError, match=rf"two\.py: device class one is registered already by {first}; "):
        plugin.load([first, written(tmp_path, WHOLE, "two.py")])
    with pytest.raises(UserError, match=f"plugin one is registered already by {first}; "):
        plugin.load([first, written(tmp_path / "b", "")])


def test_there_is_an_end_to_plugins_and_drivers(tmp_path: Path) -> None:
    """16 files, 16 drivers: they have to fit the guest's table beside ours."""
    with pytest.raises(UserError, match="more than 16 plugins; leave some out"):
        plugin.load([written(tmp_path, "", f"p{number}.py") for number in range(17)])
    drivers = "".join(DRIVER.replace("hv_one", f"hv_{number}") for number in range(17))
    with pytest.raises(UserError, match="driver hv_16: more than 16 drivers in plugins; leave some out"):
        plugin.load([written(tmp_path, CLASS + drivers)])


# -- a machine's plugins ----------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of a machine remembers is forgotten afterwards."""
    monkeypatch.setattr(plugin, "_installed", NO_PLUGINS)
    monkeypatch.setattr("emu.wire.device_classes._REMEMBERED", {})


def config_of(plugins: Plugins) -> dict[str, Any]:
    """The part of a machine's configuration that is about them."""
    return {"plugins": plugins.paths, "plugin_facts": plugins.facts()}


@pytest.mark.usefixtures("clean")
def test_a_process_attaches_to_the_same_files(tmp_path: Path) -> None:
    """What they register is known to the process afterwards; scenarios from the configuration may name it."""
    path = written(tmp_path, WHOLE)
    config = config_of(plugin.load([path]))

    attached = plugin.attach(config)

    assert plugin.installed() is attached and attached.paths == [str(path)]
    known = class_of(UUID(GUID))
    assert known is not None and (known.name, lsvmbus_text(UUID(GUID))) == ("one", "One")
    document = {"machine": {}, "device": [{"class": "one"}]}
    assert Scenario.from_config(document).device_specs == (DeviceSpec("one", "one"),)


@pytest.mark.usefixtures("clean")
def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    """A process that is started later must not run other code under the same numbers."""
    path = written(tmp_path, WHOLE)
    config = config_of(plugin.load([path]))
    written(tmp_path, WHOLE + "\n")

    with pytest.raises(UserError, match=rf"{path}: changed since the machine was made; start the machine anew"):
        plugin.attach(config)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("registers", "what"),
    [
        ("plugin.channel_callback(late)", "channel callback late"),
        ("plugin.device_class('late', guid='c3d0a1a4-67a2-4a39-8d77-3fb5c2c0e0a1')", "device class late"),
        ("plugin.backend(type('B', (), {'name': 'late', 'open': print, 'close': print}))", "back end late"),
        ("plugin.driver(type('D', (), {'name': 'hv_late'}))", "driver hv_late"),
    ],
)
def test_nothing_is_registered_while_the_machine_runs(tmp_path: Path, registers: str, what: str) -> None:
    """In a probe it would have number 0, which `vmbus_open` takes for no callback: it is told, with its place."""
    path = written(tmp_path, f"{WHOLE}def late(current, device):\n    {registers}\nONE_LATE = late\n")
    plugin.attach(config_of(plugin.load([path])))
    late = sys.modules["vmbus_plugin_0_one"].late

    with pytest.raises(UserError) as told:
        late(None, None)

    line = WHOLE.count("\n") + 2
    assert str(told.value).startswith(
        f"plugin {path}, line {line}: {what} is registered in late, while the machine runs"
    )
    assert str(told.value).endswith("; register it at the file's top level")


@pytest.mark.usefixtures("clean")
def test_a_guid_that_is_drawn_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Each process would have another: it is not in the file, and comes out otherwise the second time."""
    drawn = CLASS.replace(f'"{GUID}"', "uuid4()").replace("\n", "\nfrom uuid import uuid4\n", 1)

    with pytest.raises(UserError, match=r"one\.py: device class one: its GUID is another one each .*`uuidgen` prints"):
        plugin.load([written(tmp_path, drawn)])


def test_a_guid_may_be_computed(tmp_path: Path) -> None:
    """Of a name, or of a number: it is the same each time."""
    computed = CLASS.replace(f'"{GUID}"', f"UUID(int={UUID(GUID).int})").replace("\n", "\nfrom uuid import UUID\n", 1)

    assert plugin.load([written(tmp_path, computed)]).classes["one"].guid == UUID(GUID)


def test_a_file_is_executed_once_where_its_guids_are_written_down(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """However they are written: with capitals, or without hyphens."""
    text = "print('once')\n" + CLASS.replace(GUID, GUID.replace("-", "").upper())

    plugin.load([written(tmp_path, text)])

    assert capfd.readouterr().err == "once\n"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("kind", "known"), [("drivers", "hv_other"), ("callbacks", "one.other"), ("backends", "other")]
)
def test_a_process_that_registers_something_else_is_refused(tmp_path: Path, kind: str, known: str) -> None:
    """The file is the same, but what it registers hangs on chance: numbers would mean other code here."""
    config = config_of(plugin.load([written(tmp_path, WHOLE)]))
    there = config["plugin_facts"][kind]
    config["plugin_facts"][kind] = [known, *there]

    with pytest.raises(UserError, match=rf"one\.py: its {kind} are .* in this process and were .*{known}"):
        plugin.attach(config)


@pytest.mark.usefixtures("clean")
def test_a_machine_without_plugins_costs_nothing() -> None:
    """Its configuration does not mention them."""
    assert plugin.attach(MappingProxyType({"machine": {}})) is NO_PLUGINS
    assert plugin.known_from({"machine": {}}) is NO_PLUGINS
    assert "plugins" not in Scenario.default().to_config()


@pytest.mark.usefixtures("clean")
def test_tools_know_the_classes_without_running_the_plugin(tmp_path: Path) -> None:
    """`ls` and `ctl` read names, GUIDs and flags from the configuration; the file may be gone."""
    pipe = CLASS.replace("description=", "pipe_mode=PipeMode.MESSAGE, flags=ChannelFlags.NAMED_PIPE_MODE, description=")
    path = written(tmp_path, "from emu.wire.messages import *\n" + pipe + BACKEND)
    config = config_of(plugin.load([path]))
    path.unlink()

    known = plugin.known_from(config)

    one = known.classes["one"]
    assert (one.guid, one.pipe_mode, one.chn_flags) == (UUID(GUID), PipeMode.MESSAGE, ChannelFlags.NAMED_PIPE_MODE)
    assert parse_device("one:3", known) == DeviceSpec("one", "one", count=3)


# -- scenarios --------------------------------------------------------------------------------------------


def test_a_scenario_names_plugins_relative_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes and back ends are then as good as ours; a class has the back end of its name by default."""
    (tmp_path / "here").mkdir()
    path = written(tmp_path / "here", WHOLE)
    scenario = tmp_path / "here" / "x.toml"
    scenario.write_text(
        'plugins = ["one.py"]\n[[device]]\nclass = "one"\n'
        '[[device]]\nclass = "one"\nbackend = "echo"\n[[device]]\nclass = "nic"\nbackend = "one"\n'
    )
    monkeypatch.chdir(tmp_path)

    loaded = Scenario.load(scenario)

    assert loaded.plugins.paths == [str(path)]
    assert loaded.device_specs == (DeviceSpec("one", "one"), DeviceSpec("one", "echo"), DeviceSpec("nic", "one"))
    assert Scenario.from_config(loaded.to_config()) == loaded


def test_a_scenario_without_the_plugin_knows_no_such_class(tmp_path: Path) -> None:
    """The complaint lists what there is, the plugins' own included."""
    path = written(tmp_path, WHOLE)
    scenario = tmp_path / "x.toml"
    scenario.write_text('[[device]]\nclass = "one"\n')

    with pytest.raises(UserError, match='device#1.class: "one" is not a device class; '):
        Scenario.load(scenario)
    assert Scenario.load(scenario, [path]).device_specs == (DeviceSpec("one", "one"),)
    scenario.write_text('[[device]]\nclass = "one"\nbackend = "ones"\n')
    with pytest.raises(UserError, match=r'device#1.backend: "ones" .*one'):
        Scenario.load(scenario, [path])


def test_the_default_scenario_offers_what_a_plugin_brings(tmp_path: Path) -> None:
    """Whoever names a plugin and nothing else sees its device appear."""
    specs = (DeviceSpec(count=8), DeviceSpec("one", "one"))
    path = written(tmp_path, WHOLE)
    (tmp_path / "x.toml").write_text("[machine]\nvcpus = 1\n")

    assert Scenario.default([path]).device_specs == specs
    assert Scenario.load(tmp_path / "x.toml", [path]).device_specs == specs
