"""The command line as a user meets it: help, versions, wrong words, and exceptions as exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import click
import pytest

from emu.build_kind import BUILD
from emu.errors import (
    DeadlinePassed,
    MissingPrerequisite,
    NotOpened,
    RingFull,
    UserError,
)
from tools import cli, version
from tools.ctl import ctl
from tools.exit_status import ExitStatus

SOURCES = Path(__file__).resolve().parents[2]

RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], None]]:
    """Makes the table hold one command, `fail`, that raises what it is told; signal handlers are put back."""
    raised: list[BaseException] = []

    @click.command()
    def fail() -> NoReturn:
        raise raised[0]

    monkeypatch.setattr(cli, "COMMANDS", {"fail": cli.Entry("Machines", "Fail.")})
    monkeypatch.setattr(cli.CommandTable, "get_command", lambda *_arguments: fail)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield raised.append
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_of_the_table_has_help_and_an_example(name: str) -> None:
    """Each line of the table is a command whose help begins as the table says and shows an example."""
    with click.Context(cli.vmbus_emu, info_name="vmbus-emu") as ctx:
        command = cli.vmbus_emu.get_command(ctx, name)
        assert command is not None
        text = command.get_help(click.Context(command, info_name=name, parent=ctx))

    entry = cli.COMMANDS[name]
    assert (command.help or "").splitlines()[0] == entry.summary
    assert entry.section in cli.HEADINGS
    assert "Example:" in text
    assert f"vmbus-emu {name}" in text


def every_command(command: click.Command, parent: click.Context | None, name: str) -> Iterator[click.Context]:
    """A command and all below it, each as a context that gives its help as an 80-column terminal shows it."""
    with click.Context(command, info_name=name, parent=parent, terminal_width=80) as ctx:
        yield ctx
        if isinstance(command, click.Group):
            for word in command.list_commands(ctx):
                below = command.get_command(ctx, word)
                assert below is not None
                yield from every_command(below, ctx, word)


def test_every_help_has_an_example_and_fits_80_columns() -> None:
    """Also of what is below a command; an example that is longer would be broken where nobody can copy it."""
    shown = {ctx.command_path: ctx.get_help() for ctx in every_command(cli.vmbus_emu, None, "vmbus-emu")}

    assert "vmbus-emu races list" in shown and "vmbus-emu ctl offer" in shown
    assert [path for path, text in shown.items() if "Example:" not in text] == []
    assert [line for text in shown.values() for line in text.splitlines() if len(line) > 80] == []


def test_every_command_can_print_an_object() -> None:
    """Also those below a command; a group has nothing to tell, `vmbus-emu` itself has its version."""
    lacking = [
        ctx.command_path
        for ctx in every_command(cli.vmbus_emu, None, "vmbus-emu")
        if not isinstance(ctx.command, click.Group) and not any("--json" in one.opts for one in ctx.command.params)
    ]

    assert lacking == []


def test_help_lists_every_command_without_importing_one(run_cli: RunCli) -> None:
    """`--help` comes from the table alone, and so does a call without any word."""
    done = run_cli("--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert run_cli().stdout == done.stdout
    loaded = run_cli("--help", env={"PYTHONPROFILEIMPORTTIME": "1"}).stderr
    modules = {line.rpartition("|")[2].strip() for line in loaded.splitlines()}
    assert "tools.options" in modules
    assert not modules & ({f"tools.{name}" for name in cli.COMMANDS} | {"rich"})


def test_version_is_one_line(run_cli: RunCli) -> None:
    """`--version` prints name, version and which build it is."""
    done = run_cli("--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"vmbus-emu 0.1.0 ({BUILD})\n", "")


@pytest.mark.parametrize("arguments", [("--version", "--json"), ("--json", "--version")])
def test_version_as_json_says_what_a_report_needs(run_cli: RunCli, arguments: tuple[str, ...]) -> None:
    """`--version --json` names commit, build, Python, kernel and the VMBus versions spoken."""
    done = run_cli(*arguments)

    report = json.loads(done.stdout)
    assert report["schema"] == {"name": "vmbus-emu.version", "version": 1}
    assert report["vmbus_versions"] == ["0.13", "1.1", "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3", "6.0"]
    assert report["eras"] == ["current", "seed"]
    assert report["build"] == BUILD
    assert {"version", "commit", "python", "kernel", "abi"} <= report.keys()


def test_commit_is_that_of_our_own_working_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sources that were unpacked inside somebody else's working copy have none, though git would say one there."""
    (tmp_path / "git").write_text("#!/bin/sh\necho 0123abcd\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / ".git").mkdir()
    found = []
    for place in (tmp_path, tmp_path / "unpacked"):
        monkeypatch.setattr(version, "_SOURCES", place)
        found.append(version.commit())

    assert found == ["0123abcd", None]


def test_patience_for_a_guest_that_nobody_waits_for_is_refused(run_cli: RunCli) -> None:
    """`--guest-timeout` without `--no-guest` would be silently without effect."""
    done = run_cli("run", "--guest-timeout", "1")

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert done.stderr == ("vmbus-emu: --guest-timeout is for somebody else's guest; add --no-guest, or leave it out\n")


@pytest.mark.parametrize(
    ("arguments", "word", "command"),
    [
        (("frobnicate",), "frobnicate", "vmbus-emu"),
        (("--frobnicate",), "--frobnicate", "vmbus-emu"),
        (("--json",), "--json", "vmbus-emu"),
        (("doctor", "--frobnicate"), "--frobnicate", "vmbus-emu doctor"),
        (("doctor", "frobnicate"), "frobnicate", "vmbus-emu doctor"),
        # A comparison with its bounds lets either pass, and a machine would end at once, or never.
        (("run", "--duration", "nan"), "nan is no number of seconds", "vmbus-emu run"),
        (("run", "--no-guest", "--guest-timeout", "inf"), "inf is no number of seconds", "vmbus-emu run"),
        (("trace", "boot.rec", "-o"), "-o", "vmbus-emu trace"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(
    run_cli: RunCli, arguments: tuple[str, ...], word: str, command: str
) -> None:
    """What was typed wrong is one line on stderr that says where the help is; stdout stays empty."""
    done = run_cli(*arguments)

    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    assert done.stderr.startswith("vmbus-emu: ")
    assert word in done.stderr
    assert done.stderr.endswith(f"; see `{command} --help`\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("x.toml: machine.vcpus: 0; cure"), ExitStatus.USAGE),
        (UserError("two\nlines"), ExitStatus.USAGE),
        (MissingPrerequisite("no /dev/shm"), ExitStatus.MISSING),
        (DeadlinePassed("offers", 5_000_000_000), ExitStatus.TIME_LIMIT),
        (NotOpened(4, "no driver has taken it"), ExitStatus.FINDING),
        (RingFull(24, 16), ExitStatus.FAILED),
        (KeyboardInterrupt(), ExitStatus.INTERRUPTED),
    ],
)
def test_exceptions_become_their_exit_status(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: ExitStatus,
) -> None:
    """Whose fault it is decides the status; a person gets one line, or none after Ctrl-C."""
    failing(error)

    assert cli.main(["fail"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == (0 if status == ExitStatus.INTERRUPTED else 1)


def test_our_own_error_shows_its_traceback(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What nobody foresaw is status 4, with the traceback."""
    failing(AssertionError("broken invariant"))

    assert cli.main(["fail"]) == ExitStatus.FAILED
    err = capsys.readouterr().err
    assert err.startswith("vmbus-emu: internal error\nTraceback")
    assert "AssertionError: broken invariant" in err


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, ExitStatus.TERMINATED),
        (signal.SIGHUP, ExitStatus.HANGUP),
        (signal.SIGINT, ExitStatus.INTERRUPTED),
    ],
)
def test_signals_unwind_what_runs(number: signal.Signals, status: ExitStatus) -> None:
    """A signal that ends the program lets every `finally` run first."""
    program = (
        "import os, signal, sys, click\n"
        "from tools import cli\n"
        # Whoever runs these tests may ignore SIGHUP (nohup does), and a program begins as its parent leaves it.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "@click.command()\n"
        "def wait():\n"
        "    try:\n"
        "        print('waits', flush=True)\n"
        "        sys.stdin.read()\n"
        "    finally:\n"
        "        print('let go', flush=True)\n"
        "cli.CommandTable.get_command = lambda *arguments: wait\n"
        "sys.exit(cli.main(['wait']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=SOURCES,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        assert process.stdout.readline() == "let go\n"
        assert process.wait(timeout=10) == status


def test_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """`vmbus-emu … | head` ends quietly with SIGPIPE's status."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", "doctor", "--json"],
            cwd=SOURCES,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writing)

    assert (done.returncode, done.stderr) == (ExitStatus.READER_LEFT, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_without_room_is_one_line(unbuffered: str) -> None:
    """`vmbus-emu … > /dev/full` names what could not be written, whether Python buffers stdout or not."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", "--version"],
            cwd=SOURCES,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )

    said = "vmbus-emu: cannot write to stdout: No space left on device; make room, or send it somewhere else\n"
    assert (done.returncode, done.stderr) == (ExitStatus.USAGE, said)


@pytest.mark.parametrize(
    ("words", "status"), [(("check", "no.rec"), ExitStatus.USAGE), (("clean", "--dry-run"), ExitStatus.FINE)]
)
def test_who_has_no_room_for_what_is_said_gets_the_status(words: tuple[str, ...], status: ExitStatus) -> None:
    """`vmbus-emu … 2> /dev/full`: what the user did wrong is no finding, and what he asked for is done."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", *words], cwd=SOURCES, stderr=full, timeout=30, check=False
        )

    assert done.returncode == status


def test_who_hears_no_complaint_gets_the_status() -> None:
    """The reader of stderr has left: wrong use is no finding, and the interpreter ends with nothing to say."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tools.cli", "check", "no.rec"], cwd=SOURCES, stderr=writing, timeout=30, check=False
        )
    finally:
        os.close(writing)

    assert done.returncode == ExitStatus.USAGE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ctl", "move", "1", "x"), "Invalid value for 'CPU': 'x' is no whole number"),
        (("top", "--interval", "x"), "Invalid value for '--interval': 'x' is no number"),
    ],
)
def test_what_is_no_number_is_called_that(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    """Not by the name that click has for a range."""
    command = "ctl move" if words[0] == "ctl" else words[0]

    assert cli.main(words) == ExitStatus.USAGE
    assert capsys.readouterr().err == f"vmbus-emu: {said}; see `vmbus-emu {command} --help`\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed(run_cli: RunCli, shell: str) -> None:
    """Each shell gets its completion script from the program itself."""
    done = run_cli(env={"_VMBUS_EMU_COMPLETE": f"{shell}_source"})

    assert done.returncode == 0
    assert "_VMBUS_EMU_COMPLETE" in done.stdout


def test_completion_knows_the_commands(run_cli: RunCli) -> None:
    """The shell's question for the first word is answered from the table."""
    question = {"_VMBUS_EMU_COMPLETE": "bash_complete", "COMP_WORDS": "vmbus-emu doc", "COMP_CWORD": "1"}

    assert run_cli(env=question).stdout == "plain,doctor\n"


@pytest.mark.parametrize("name", sorted(ctl.commands))
def test_every_order_has_help_and_an_example(name: str) -> None:
    """What it does in a sentence, an example that begins with the program's name, --machine and --json."""
    with ctl.commands[name].make_context(name, [], resilient_parsing=True) as context:
        text = ctl.commands[name].get_help(context)

    assert f"vmbus-emu ctl {name}" in text and "Example:" in text
    assert "--machine" in text and "--json" in text
