"""What whole machines are tested with: a C compiler, where there is one.

A test asks for it by taking the fixture `gcc`. Without a compiler such tests are deselected, and the summary
names each of them with the line that installs one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

INSTALL = "apt-get install gcc libc6-dev"

_without_compiler = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a C compiler if there is none."""
    if shutil.which("gcc") is not None:
        return
    lacking = [item for item in items if "gcc" in getattr(item, "fixturenames", ())]
    if lacking:
        items[:] = [item for item in items if item not in lacking]
        config.hook.pytest_deselected(items=lacking)
        config.stash[_without_compiler] = [item.nodeid for item in lacking]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and how to have it."""
    for name in config.stash.get(_without_compiler, []):
        terminalreporter.write_line(f"deselected, no C compiler: {name} ({INSTALL})")


@pytest.fixture(scope="session")
def gcc() -> Path:
    """The C compiler."""
    found = shutil.which("gcc")
    assert found is not None
    return Path(found)
