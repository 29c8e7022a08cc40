"""The documents agree with the repository: links, paths, commands, exit codes."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import click
import pytest

from emu.scenario import Scenario
from tools.cli import COMMANDS, vmbus_emu
from tools.exit_status import ExitStatus
from tools.launch import cpu_positions
from tools.run import run

SOURCES: Final = Path(__file__).resolve().parents[2]
README: Final = SOURCES / "README.md"
DESIGN: Final = SOURCES / "docs" / "design.md"
PAGES: Final = [README, *sorted((SOURCES / "docs").glob("*.md"))]

RUN_OPTIONS: Final = {name for one in run.params for name in one.opts}
FOLDERS: Final = ("emu", "hostproc", "guestproc", "tools", "tests", "docs", "include", "scenarios")
NAMED: Final = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)(?:::[^`]*)?`")
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
TEST_COMMAND: Final = re.compile(r"^(?:\$ )?(python3 -m venv .*pytest -q)$", re.MULTILINE)


def text(page: Path) -> str:
    """A document."""
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: headings, lower case, without punctuation, blanks as dashes."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link is a file of the repository, every `#` a heading."""
    for target in LINK.findall(text(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert there.is_relative_to(SOURCES), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_paths_exist(page: Path) -> None:
    """What is written as a path of ours is one."""
    missing = [name for name in NAMED.findall(text(page)) if not (SOURCES / name).exists()]

    assert missing == []


def test_scenarios_of_examples_exist() -> None:
    """Every scenario of ours that a document or a command's help names is there."""
    sources = [*PAGES, *(SOURCES / "tools").glob("*.py")]
    named = {name for source in sources for name in re.findall(r"\bscenarios/[\w-]+\.toml", text(source))}

    assert named
    assert [name for name in sorted(named) if not (SOURCES / name).exists()] == []


def test_readme_has_every_command() -> None:
    """The table of commands names them all, and no other."""
    table = text(README).split("| command |")[1].split("\n\n")[0]

    cells = [re.split(r"(?<!\\)\|", row)[1] for row in table.splitlines()[2:]]
    named = {usage.split()[0] for cell in cells for usage in re.findall(r"`([^`]*)`", cell)}
    assert named == set(COMMANDS)


def told_commands() -> list[str]:
    """Each call of ours in the documents (`$ vmbus-emu …` in a block, or in backquotes) and in the helps' examples."""
    calls = [call for page in PAGES for call in re.findall(r"^(?:\$ )?(vmbus-emu .*)$", text(page), re.MULTILINE)]
    calls += [call for page in PAGES for call in re.findall(r"`(vmbus-emu [^`]*)`", text(page))]
    for name in COMMANDS:
        commands = [vmbus_emu.get_command(click.Context(vmbus_emu), name)]
        while commands:
            command = commands.pop()
            assert command is not None
            calls += re.findall(r"^ *(vmbus-emu .*)$", (command.help or "").replace("\\\n", ""), re.MULTILINE)
            commands += command.commands.values() if isinstance(command, click.Group) else []
    return calls


def test_told_commands_and_their_options_exist() -> None:
    """Whoever copies a line gets what it says: every option is one of that command; `record` takes those of `run`."""
    unknown = []
    for call in told_commands():
        words = re.split(r" -- |  #| [|;>&]|; ", call)[0].replace("…", "").split()[1:]
        command: click.Command | None = vmbus_emu
        options: set[str] = set()
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            options |= {"--help"} if words[0] != "record" else {"--help", *RUN_OPTIONS}
            command = command.get_command(click.Context(command), words.pop(0))
        options |= {name for one in command.params for name in (*one.opts, *one.secondary_opts)} if command else set()
        if command is None or any(word.startswith("--") and word.split("=")[0] not in options for word in words):
            unknown.append(call)

    assert len(told_commands()) > 100
    assert unknown == []


def test_readme_has_every_exit_code() -> None:
    """Its table is `ExitStatus`."""
    table = text(README).split("| code |")[1].split("\n\n")[0]

    codes = {int(code) for row in table.splitlines()[2:] for code in re.findall(r"\d+", row.split("|")[1])}
    assert codes == {int(status) for status in ExitStatus}


def test_one_command_runs_the_tests() -> None:
    """README, docs/testing.md and .ci/run say the same."""
    commands = {
        command
        for page in (README, SOURCES / "docs" / "testing.md", SOURCES / ".ci" / "run")
        for command in TEST_COMMAND.findall(text(page))
    }

    assert len(commands) == 1, commands
    assert all(TEST_COMMAND.search(text(page)) for page in (README, SOURCES / ".ci" / "run"))


@pytest.mark.parametrize("package", ["emu", "hostproc", "guestproc", "tools"])
def test_design_has_every_module(package: str) -> None:
    """Its table of a package names each module of it, and none that is not there; a folder goes on within a row."""
    table = text(DESIGN).split(f"\n**`{package}/`**")[1].split("\n**")[0]
    patterns: list[str] = []
    for row in table.splitlines():
        folder = ""
        for name in re.findall(r"`([\w/*.]+)`", row.split("|")[1]) if row.startswith("| `") else []:
            head, slash, module = name.rpartition("/")
            patterns.append(name if slash else folder + name)
            folder = head + slash if slash and module else folder

    there = SOURCES / package
    modules = [str(path.relative_to(there)) for path in there.rglob("*.py") if not path.name.startswith("__")]
    assert [one for one in modules if not any(_names(pattern, one) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(there.glob(pattern.rstrip("/")))] == []


def _names(pattern: str, module: str) -> bool:
    return module.startswith(pattern) if pattern.endswith("/") else fnmatch(module, pattern)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    """No line is a word that stands for something to come."""
    assert re.findall(r"^[A-Z]+-(?:OUTPUT|TABLE)$|\bTODO\b|\bFIXME\b", text(page), re.MULTILINE) == []


def test_reversed_scenario_says_which_processor_is_which() -> None:
    """CPU number, VP index and position of the VP's page, as the launcher makes them."""
    path = SOURCES / "scenarios" / "reversed.toml"
    scenario = Scenario.load(path)
    positions, indices = cpu_positions(scenario), scenario.machine.vp_indices()

    told = [tuple(map(int, words)) for words in re.findall(r"CPU (\d) is VP (\d) and has page (\d)", text(path))]
    assert len(told) == 2
    assert told == [(cpu, indices[positions[cpu]], positions[cpu]) for cpu, _vp, _page in told]
