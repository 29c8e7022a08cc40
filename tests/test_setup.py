"""setup.py: what it adds where compiled modules are asked for, what it refuses in one line, and what it compiles."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import SOURCES

ASKED: Final = "VMBUS_EMU_COMPILE"
PACKAGES: Final = ("emu", "hostproc", "guestproc", "tools")

INTERPRETED: Final = {"Protocol", "NamedTuple", "TypedDict", "Enum", "Flag", "IntEnum", "IntFlag"}
"""What mypyc leaves ordinary classes, which any class may be derived from; exceptions are none of them."""

# A hook of the back end as an installer calls it, or `build_ext` by hand; there is no mypyc, and a header where one is
# said to be.
HOOK: Final = """
import runpy, sys, sysconfig
from setuptools import build_meta
sys.modules["mypyc"] = None
real = sysconfig.get_path
include, hook, *arguments = sys.argv[1:]
sysconfig.get_path = lambda name, *more, **others: include if name == "include" else real(name, *more, **others)
if hook == "build_ext":
    sys.argv = ["setup.py", hook, *arguments]
    with build_meta.no_install_setup_requires():
        runpy.run_path("setup.py", run_name="__main__")
else:
    print("->", getattr(build_meta, hook)(*arguments))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one module that is built as ours is; beside it the folder `include` has Python's header."""
    project = tmp_path / "project"
    (project / "emu").mkdir(parents=True)
    (project / "emu" / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(SOURCES / name, project)
    shutil.copytree(SOURCES / "stubs", project / "stubs")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    return project


def call(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call a hook in the project, where everything that a build looks for is there unless `variables` say otherwise."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VMBUS_EMU"))}
    return subprocess.run(
        [sys.executable, "-c", HOOK, str(project.parent / "include"), *words],
        cwd=project,
        env={**usual, "CC": sys.executable, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answer(done: subprocess.CompletedProcess[str]) -> str:
    """What the hook returned, as it is printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rpartition("-> ")[2].strip()


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_being_asked_it_adds_nothing(project: Path, tmp_path: Path, value: str | None) -> None:
    """No requirement, and a wheel of pure Python; a computer without a compiler does as well."""
    variables = {"PATH": str(tmp_path), "CC": ""} | ({} if value is None else {ASKED: value})

    assert answer(call(project, "get_requires_for_build_wheel", **variables)) == "[]"
    assert answer(call(project, "build_wheel", str(tmp_path), **variables)) == "vmbus_emu-0.1.0-py3-none-any.whl"


def test_who_compiles_needs_mypy(project: Path) -> None:
    """The back end says so before there is any, and metadata are told without it."""
    required = answer(call(project, "get_requires_for_build_wheel", **{ASKED: "1"}))

    assert required == "['mypy>=2.4.1,<2.5']"
    assert answer(call(project, "prepare_metadata_for_build_wheel", ".", **{ASKED: "1"})) == "vmbus_emu-0.1.0.dist-info"


def test_source_distribution_has_what_is_compiled_with(project: Path, tmp_path: Path) -> None:
    """setup.py itself and the stubs, which no package has."""
    assert answer(call(project, "build_sdist", str(tmp_path))) == "vmbus_emu-0.1.0.tar.gz"
    with tarfile.open(tmp_path / "vmbus_emu-0.1.0.tar.gz") as archive:
        names = archive.getnames()

    wanted = ["setup.py", *(f"stubs/{path.name}" for path in SOURCES.glob("stubs/*.pyi"))]
    assert len(wanted) > 1
    assert [name for name in wanted if f"vmbus_emu-0.1.0/{name}" not in names] == []


@pytest.mark.parametrize(
    ("value", "words", "lack", "line"),
    [
        ("yes", ("get_requires_for_build_wheel",), "", f"{ASKED}=yes: it is 1 (compile the hot modules) or 0"),
        ("1", ("get_requires_for_build_wheel",), "compiler", "needs a C compiler, and there is no "),
        ("1", ("get_requires_for_build_wheel",), "headers", "needs Python's C headers, and there is no "),
        ("1", ("build_wheel", "."), "", "needs mypyc, which comes with mypy; pip install 'mypy>=2.4.1,<2.5'"),
        ("1", ("build_editable", "."), "", "an editable install stays pure Python, as compiled modules would go stale"),
        ("1", ("build_ext", "--inplace"), "", "no build beside the sources, where it would go stale silently"),
    ],
    ids=["value", "compiler", "headers", "mypyc", "editable", "inplace"],
)
def test_what_cannot_be_meant_is_one_line(
    project: Path, tmp_path: Path, value: str, words: tuple[str, ...], lack: str, line: str
) -> None:
    """It names the variable and the cure, and nothing is left that looks like a build."""
    variables = {"PATH": str(tmp_path), "CC": ""} if lack == "compiler" else {}
    if lack == "headers":
        (tmp_path / "include" / "Python.h").unlink()

    done = call(project, *words, **{ASKED: value, **variables})

    assert done.returncode == 1
    assert done.stderr.startswith(f"vmbus-emu: {ASKED}={value}") and done.stderr.count("\n") == 1
    assert line in done.stderr
    assert "apt-get install gcc python3-dev" in done.stderr or not lack
    assert not [path for kind in ("*.whl", "*.so", "*.c") for path in tmp_path.rglob(kind)]


def compiled() -> tuple[str, ...]:
    """The paths that setup.py compiles."""
    for node in ast.parse((SOURCES / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "COMPILED":
            assert node.value is not None
            return tuple(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no COMPILED")


def classes(path: Path) -> Iterator[ast.ClassDef]:
    """Every class that a file defines, anywhere in it."""
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef))


def bases(node: ast.ClassDef) -> set[str]:
    """Their last names."""
    return {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}


def test_every_compiled_module_is_there_once() -> None:
    """Sorted, as it is read; the module that tells of the build is one of them, and none with a loop of tasks."""
    paths = compiled()

    assert list(paths) == sorted(set(paths))
    assert [path for path in paths if not (SOURCES / path).is_file()] == []
    assert "emu/build_kind.py" in paths
    assert "guestproc/tasks.py" not in paths


def test_every_subclass_of_a_compiled_class_is_compiled() -> None:
    """An interpreted class inherits from a compiled one only where that says so; else its instance is a TypeError."""
    paths = compiled()
    native = {
        node.name
        for path in paths
        for node in classes(SOURCES / path)
        if not (
            bases(node) & INTERPRETED or any("interpreted_subclasses" in ast.unparse(d) for d in node.decorator_list)
        )
    }

    lacking = [
        f"{path.relative_to(SOURCES)}: {node.name}"
        for package in PACKAGES
        for path in sorted((SOURCES / package).rglob("*.py"))
        for node in classes(path)
        if bases(node) & native and str(path.relative_to(SOURCES)) not in paths
    ]

    assert native
    assert lacking == []


CLOSED_BY_WHO_MADE_THEM: Final = {
    "guestproc/vmbus/device.py: held_device",  # a context manager
    "hostproc/bus.py: _run",
    "hostproc/fault_bus.py: _run_stalling",
}


def test_no_compiled_generator_has_to_learn_that_it_was_left() -> None:
    """Python closes one that nobody has any more; of a compiled one what it still had to do would be left undone."""
    careful = {
        f"{path}: {function.name}"
        for path in compiled()
        for function in ast.walk(ast.parse((SOURCES / path).read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function))
        and any(isinstance(node, ast.Try | ast.With) for node in ast.walk(function))
    }

    assert careful == CLOSED_BY_WHO_MADE_THEM
