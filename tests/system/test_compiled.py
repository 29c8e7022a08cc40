"""The build with compiled modules (setup.py), installed by itself: its machines do what those of these sources do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.commands import ROOT, assert_gone, ended, environment, inner_pids, report, wait_for, wait_until_open
from tools.races import exhibits
from tools.sources_first import PURE

SHM = Path("/dev/shm")
BUILT_FROM = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("emu", "hostproc", "guestproc", "tools", "stubs")

# The first of them makes the wheel.
pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


class Installed:
    """`vmbus-emu` as it was installed into a folder, called from another one that has nothing of it."""

    def __init__(self, folder: Path, home: Path) -> None:
        """Of the packages in `folder`; state and files go below `home`."""
        self.home = home
        self.environment = {**environment(home), "PYTHONPATH": str(folder)}
        self._before = shared_objects()

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command; its output is piped."""
        return subprocess.Popen(
            [sys.executable, "-m", "tools.entry", *words],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def told(self, *words: str, status: int = 0) -> dict[str, Any]:
        """Run a command to its end; the object that it printed."""
        with ended(self.start(*words, "--json")) as process:
            output, errors = process.communicate(timeout=90)
        assert process.returncode == status, output + errors
        return report(output)

    def assert_nothing_left(self) -> None:
        """No shared object is there that was not before."""
        wait_for(lambda: not shared_objects() - self._before, "shared objects to be gone")


def shared_objects() -> set[str]:
    """Those of all machines."""
    return {one.name for one in SHM.iterdir() if "vmbus-emu." in one.name}


def pip(*words: str | Path, **variables: str) -> None:
    """Run pip without a network."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words), "--no-deps", "--no-index"],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, gcc: Path, mypyc: None, python_headers: None) -> Path:
    """Where a wheel was installed that was made of a copy of these sources, with the mypy that is here."""
    place = tmp_path_factory.mktemp("compiled")
    sources, wheels = place / "sources", place / "wheels"
    sources.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, sources)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "-w", wheels, sources, VMBUS_EMU_COMPILE="1")
    (wheel,) = wheels.iterdir()
    assert not wheel.name.endswith("-none-any.whl")
    pip("install", "--target", place / "installed", wheel)
    return place / "installed"


@pytest.fixture
def compiled(folder: Path, tmp_path: Path) -> Installed:
    """The command line of that build."""
    return Installed(folder, tmp_path)


def test_compiled_build_says_so(compiled: Installed) -> None:
    """`--version`, and the reports of what it measures."""
    assert compiled.told("--version")["build"] == "compiled"
    told = compiled.told("latency", "--duration", "1")
    assert (told["build"], told["lost"]) == ("compiled", 0)
    assert told["stages"]["round_trip"]["count"] > 100
    compiled.assert_nothing_left()


def test_compiled_machine_runs_and_is_stressed(compiled: Installed) -> None:
    """Packets come back, each byte right, and no invariant is broken in what was recorded."""
    told = compiled.told("run", "--duration", "1")
    assert told["channels_open"] == told["offers"] > 0
    assert (told["task_errors"], told["leaked"], told["state_violations"]) == (0, 0, [])
    told = compiled.told("stress", "--duration", "3")
    assert told["build"] == "compiled" and told["packets"] > 0
    assert (told["lost"], told["corrupt"], told["leaked"], told["violations"]) == (0, 0, 0, [])
    compiled.assert_nothing_left()


def test_recording_of_a_compiled_machine_holds(compiled: Installed) -> None:
    """`check` finds all that it looks for in it."""
    compiled.told("run", "--duration", "1", "--record", "run.rec")
    told = compiled.told("check", "run.rec")
    assert told["violations"] == []
    compiled.assert_nothing_left()


@pytest.mark.parametrize(("fix", "verdict"), [("off", "violated"), ("on", "held")])
@pytest.mark.parametrize("name", sorted(exhibits()))
def test_compiled_exhibits_are_what_they_were(compiled: Installed, name: str, fix: str, verdict: str) -> None:
    """Broken with the fix off, quiet with it on; their halts and rings with sync points are compiled, too."""
    told = compiled.told("races", "run", name, "--fix", fix, status=0 if fix == "on" else 1)
    assert (told["verdict"], told["expected"]) == (verdict, True)
    compiled.assert_nothing_left()


def test_explorer_of_a_compiled_build_looks_into_its_sources(compiled: Installed) -> None:
    """It finds nothing wrong, in many states; and whoever asks for the sources gets them, machines and all."""
    told = compiled.told("explore", "--depth", "5")
    assert (told["violation"], told["states"] > 100) == (None, True)
    compiled.environment[PURE] = "1"
    assert compiled.told("--version")["build"] == "pure Python"
    assert compiled.told("run", "--duration", "0")["channels_open"] > 0
    compiled.assert_nothing_left()


def test_killed_vcpu_of_a_compiled_machine_is_told(compiled: Installed) -> None:
    """`kill -9`: named with its signal, exit code 4, nothing left; what it ran was compiled."""
    name = "t-compiled-kill"
    with ended(compiled.start("run", "--name", name, "--json")) as process:
        wait_until_open(name, process)
        pid = inner_pids(name)["vcpu1"]
        mapped = Path(f"/proc/{pid}/maps").read_text()
        os.kill(pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=20)

    assert "vmbus_emu__mypyc." in mapped
    assert process.returncode == 4, errors
    assert "vcpu1" in errors and "SIGKILL" in errors
    assert any("vcpu1" in death for death in report(output)["deaths"])
    assert_gone(name)
    compiled.assert_nothing_left()
