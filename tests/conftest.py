"""What all tests share: where the sources are, and the command line run as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import lacking
from tests.command_server import CommandServer

SOURCES = Path(__file__).resolve().parent.parent

RunCli = Callable[..., subprocess.CompletedProcess[str]]

# A loaded machine is slow now and then; that is no finding. Fewer examples in the suite, the same ones each time:
# whether a change is green is not left to chance. Others with `--hypothesis-seed`, and more in the soak.
settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("seeded", deadline=None, max_examples=50)
settings.register_profile("soak", deadline=None, max_examples=2_000)


def pytest_configure(config: pytest.Config) -> None:
    """Let property tests try more when the soak was asked for; let what the tests start find its bytecode."""
    expression: str = config.getoption("markexpr", "")
    seeded = config.getoption("--hypothesis-seed") is not None
    settings.load_profile("soak" if "not soak" not in expression else "seeded" if seeded else "suite")
    keep_bytecode(config)
    # In the background of a shell both are ignored, and so they would be in every program that a test interrupts.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite by two workers, each file of tests by one of them; a part, or the soak, in this process.

    Half of the suite's time is waiting for processes of machines, which another test can use.
    """
    whole = config.args == config.getini("testpaths") and "not soak" in config.getoption("markexpr", "")
    return 2 if whole else 0


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker says what it could not run here."""
    lacking.hand_over(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended."""
    lacking.take_over(node.config, node)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and how to have it."""
    for line in lacking.summary(config):
        terminalreporter.write_line(line)


def keep_bytecode(config: pytest.Config) -> None:
    """Where no bytecode is to be written beside the sources, write it elsewhere.

    The tests start some thousand interpreters. As installed they find bytecode; if each compiled everything
    again, that alone would take longer than most tests.
    """
    cache: pytest.Cache | None = getattr(config, "cache", None)  # `-p no:cacheprovider` leaves none
    if cache is not None and os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache.mkdir("bytecode")))


@pytest.fixture(scope="session", autouse=True)
def _state_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a command keeps that a test calls in this process is not among the user's findings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def command_server() -> Iterator[CommandServer]:
    """Forks the processes of `run_cli`."""
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture
def run_cli(tmp_path: Path, command_server: CommandServer) -> RunCli:
    """Runs `vmbus-emu ARGUMENTS…` in an empty directory with XDG directories of its own, through pipes."""

    def run(
        *arguments: str | Path, env: dict[str, str] | None = None, timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        places = {f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("CONFIG", "STATE", "CACHE")}
        environment = {**os.environ, "PYTHONPATH": str(SOURCES), **places, **(env or {})}
        words = [str(one) for one in arguments]
        if not any(name.startswith("PYTHON") for name in env or ()):
            return command_server.run(words, environment, tmp_path, timeout_s)
        # Said to an interpreter that starts.
        command = [sys.executable, "-m", "tools.cli", *words]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
