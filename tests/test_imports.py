"""The direction of imports: emu, then the two ends that never see each other, then the tools."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent
OURS = {"emu", "hostproc", "guestproc", "tools", "tests"}
ALLOWED = {
    "emu": {"emu"},
    "hostproc": {"emu", "hostproc"},
    "guestproc": {"emu", "guestproc"},
    "tools": {"emu", "hostproc", "guestproc", "tools"},
}
INNER = ("emu", "hostproc", "guestproc")


def modules(package: str) -> list[Path]:
    """Source files of a package."""
    return sorted((SOURCES / package).rglob("*.py"))


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Every module that a file names in an import, anywhere in it, relative imports resolved."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    package = path.relative_to(SOURCES).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*above, *([node.module] if node.module else [])])


def dotted(path: Path) -> str:
    """Name by which a source file is imported."""
    parts = path.relative_to(SOURCES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    """emu imports nothing of ours, host and guest nothing of each other, and nobody the tests."""
    wrong = [
        f"{path.relative_to(SOURCES)} imports {name}"
        for path in modules(package)
        for name in imported(path)
        if name.split(".")[0] in OURS - ALLOWED[package]
    ]

    assert wrong == []


def test_one_module_knows_the_atomics_package() -> None:
    """atomicshm is young: only emu.ipc.atomics names it."""
    importers = [
        str(path.relative_to(SOURCES))
        for package in ALLOWED
        for path in modules(package)
        if any(name.split(".")[0] == "atomicshm" for name in imported(path))
    ]

    assert importers == ["emu/ipc/atomics.py"]


@pytest.mark.parametrize("package", INNER)
def test_inner_packages_never_name_the_terminal_stack(package: str) -> None:
    """click and rich are the command line's alone: no source of an inner process names them."""
    wrong = [
        f"{path.relative_to(SOURCES)} imports {name}"
        for path in modules(package)
        for name in imported(path)
        if name.split(".")[0] in {"click", "rich"}
    ]

    assert wrong == []


def test_inner_processes_load_no_terminal_stack() -> None:
    """Nor is it loaded by the way, through something else: all their modules imported, it is not there."""
    names = [dotted(path) for package in INNER for path in modules(package) if path.name != "__main__.py"]
    program = (
        "import sys\n"
        "from importlib import import_module\n"
        "for name in sys.argv[1:]: import_module(name)\n"
        "print(sorted({'click', 'rich', 'tools', 'pytest'} & {name.split('.')[0] for name in sys.modules}))\n"
    )

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *names],
        cwd=SOURCES,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
