"""What whole machines are tested with: a C compiler, where there is one, and what the compiled build is made with.

A test asks for each by taking its fixture. Without it such tests are deselected, and the summary names each of them
with the line that installs it.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import lacking

NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gcc": (lambda: shutil.which("gcc") is not None, "no C compiler (apt-get install gcc libc6-dev)"),
    "mypyc": (lambda: find_spec("mypyc") is not None, "no mypy (pip install -e '.[dev]')"),
    "python_headers": (
        lambda: Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "no C headers of Python (apt-get install python3-dev)",
    ),
}
"""Fixture -> whether there is what it stands for, and what to say where there is not."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs something that is missing, of what was asked for: a soak is not missed by the suite."""
    absent = {name: said for name, (there, said) in NEEDS.items() if not there()}
    missing = {item: name for item in items for name in absent if name in getattr(item, "fixturenames", ())}
    lacking.deselect(config, items, {item: absent[name] for item, name in missing.items()})


@pytest.fixture(scope="session")
def gcc() -> Path:
    """The C compiler."""
    found = shutil.which("gcc")
    assert found is not None
    return Path(found)


@pytest.fixture(scope="session")
def mypyc() -> None:
    """The compiler of Python that comes with mypy."""


@pytest.fixture(scope="session")
def python_headers() -> None:
    """Python.h."""
