"""The documents agree with the repository: links, paths, commands, exit codes."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import pytest

from tools.cli import COMMANDS
from tools.exit_status import ExitStatus

SOURCES: Final = Path(__file__).resolve().parents[2]
README: Final = SOURCES / "README.md"
DESIGN: Final = SOURCES / "docs" / "design.md"
PAGES: Final = [README, *sorted((SOURCES / "docs").glob("*.md"))]

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
