"""`vmbus-emu profile`: what a machine costs, process by process, joined with what it did for it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from emu.errors import MissingPrerequisite, UserError
from tools.exit_status import ExitStatus, Interruption, noting_interruption
from tools.machines import chosen_machine, find_machines, typed
from tools.named_files import check_apart, check_svg, write_text
from tools.options import FLIGHT_VARIABLE, FileToWrite, Seconds, json_option, machine_option
from tools.output import print_json, print_table, say
from tools.own_python import own_environment, own_python
from tools.profile_picture import svg_of
from tools.profile_samples import MachineWatch, Profile, Watched, attach_machine, identity_of, merged

EVERY_S: Final = 0.1
INTERRUPTED_END_S: Final = 2.0
"""How long a command may take to end by a Ctrl-C of its own."""
ENDED_S: Final = 10.0
"""How long it may take by a signal of ours."""
JOINED: Final = {
    "packets": "a packet",
    "interrupts": "an interrupt",
    "exits": "a VM exit",
    "tasklets": "a tasklet",
    "doorbells": "a doorbell",
}
SHOWN_COUNTERS: Final = (
    "interrupts",
    "merged",
    "spurious",
    "kicks_semaphore",
    "kicks_signal",
    "kicks_none",
    "polls_paid",
    "polls_vain",
    "blocks",
    "exits",
    "doorbells",
    "packets",
)


@click.command(context_settings={"ignore_unknown_options": False})
@click.option(
    "--duration",
    "duration_s",
    type=Seconds(0.2, 3600),
    help="Seconds to watch; default 5, or until COMMAND ends.",
)
@click.option("--plot", type=FileToWrite(), help="Write processor time over time, stacked (SVG).")
@click.option("--flame", type=FileToWrite(), help="Write a flame graph of the first machine (SVG; needs py-spy).")
@machine_option
@json_option
@click.argument("command", metavar="[SCENARIO.toml] [-- COMMAND…]", nargs=-1)
def profile(
    duration_s: float | None,
    plot: Path | None,
    flame: Path | None,
    machine_name: str | None,
    as_json: bool,
    command: tuple[str, ...],
) -> int:
    """Watch what a machine's processes cost, and per packet and interrupt.

    Without COMMAND a running machine is watched; with one of our commands, the machines that it runs, from their
    first instruction on. A SCENARIO.toml alone is run.

    \b
    Example:
      vmbus-emu profile -- run --duration 3
      vmbus-emu profile scenarios/devices.toml
      vmbus-emu profile --machine vm4711 --duration 10 --plot cost.svg
    """
    if command and command[0].endswith(".toml"):
        command = ("run", *command)
    check_apart({"--plot": plot, "--flame": flame})
    spy = _py_spy() if flame is not None else ""
    if command and typed(machine_name) is not None:
        raise UserError("--machine and a COMMAND exclude each other; leave one of them out")
    if command[:1] in (("run",), ("record",)) and "--detach" in command:
        # Its launcher is no child of ours, and its machine outlives the command.
        raise UserError(
            f"`{' '.join(command)}` would leave its machine behind; leave --detach out, "
            "or run it alone and watch the machine with `vmbus-emu profile --machine NAME`"
        )
    check_svg(plot, "--plot", "the picture is")
    check_svg(flame, "--flame", "the graph is")
    with _target(command, machine_name) as target:
        spying = None if flame is None else Spying(spy, flame)
        found, interruption = watch(target, duration_s if duration_s is not None or command else 5.0, spying)
        status = target.end(signum=0 if interruption.status is None else interruption.status - 128)
    if interruption.status is not None:
        status = interruption.status
    if not found.processes:
        if status:
            # The command said itself what was wrong; wrong use has no object, as elsewhere.
            if as_json and status not in (ExitStatus.USAGE, ExitStatus.MISSING):
                print_json(
                    "profile", 1, {**report_of(found, command, status), "interrupted": bool(interruption.status)}
                )
            return status
        within = "" if duration_s is None else f" within {duration_s:g} s"
        cure = "give a command that runs one, like run or latency"
        raise UserError(f"`{' '.join(command)}` ran no machine{within}; {cure}{', or more time' if within else ''}")
    if plot is not None:
        write_text(plot, svg_of(found), "--plot")
    if as_json:
        interrupted = interruption.status is not None
        print_json("profile", 1, {**report_of(found, command, status), "interrupted": interrupted})
    else:
        show(found)
    if spying is not None and spying.trouble:
        if not status:
            raise UserError(spying.trouble)
        say(f"vmbus-emu: {spying.trouble}")
    return status


class _Running:
    """A machine that runs anyway."""

    def __init__(self, name: str) -> None:
        self.name = name

    def machines(self) -> list[str]:
        """Its name."""
        return [self.name]

    def over(self) -> bool:
        """Whether it has ended."""
        return self.name not in {one.name for one in find_machines()}

    def end(self, *, signum: int) -> int:
        """It goes on."""
        return 0


class _Command:
    """A command of ours, which launches machines: those whose launcher it is."""

    def __init__(self, command: tuple[str, ...]) -> None:
        # What it prints is talk here: stdout is for the profile.
        # What is to be measured does not record, unless the command says so.
        environment = {FLIGHT_VARIABLE: "0", **own_environment()}
        self.process = subprocess.Popen(own_python("tools.entry", *command), stdout=sys.stderr, env=environment)
        self._words = " ".join(command)

    def machines(self) -> list[str]:
        """Names of its machines at the moment."""
        return [
            one.name for one in find_machines() if one.launcher is not None and one.launcher.pid == self.process.pid
        ]

    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def end(self, *, signum: int) -> int:
        """Its exit status; it is ended first if it still runs, by the signal that ended us, if one did."""
        if signum == signal.SIGINT:
            # Ctrl-C reached it, too, most likely, and a second signal would meet it while it cleans up.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(INTERRUPTED_END_S)
            signum = signal.SIGTERM
        if self.process.poll() is None:
            # Where a whole group is ended it has had this one already, and ignores the second.
            self.process.send_signal(signum or signal.SIGTERM)
            try:
                self.process.wait(ENDED_S)
            except subprocess.TimeoutExpired:
                # It takes no notice of that one (below `nohup` of a SIGHUP), or stands still.
                self.process.terminate()
                try:
                    self.process.wait(ENDED_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
            return 0
        if self.process.returncode < 0:
            # It could not say so itself.
            how = signal.Signals(-self.process.returncode).name
            say(f"vmbus-emu: `{self._words}` (pid {self.process.pid}) died: killed by {how}")
            return ExitStatus.FAILED
        return self.process.returncode


@contextlib.contextmanager
def _target(command: tuple[str, ...], machine_name: str | None) -> Iterator[_Running | _Command]:
    """Whom to watch; a command that was started does not outlive us."""
    if not command:
        yield _Running(chosen_machine(machine_name))
        return
    target = _Command(command)
    try:
        yield target
    finally:
        if target.process.poll() is None:
            target.end(signum=signal.SIGTERM)


def watch(
    target: _Running | _Command, duration_s: float | None, spying: Spying | None = None
) -> tuple[Profile, Interruption]:
    """Sample until the time is over, there is nothing to watch any more, or somebody interrupts: all are ends."""
    began_s = time.monotonic()
    watches: dict[tuple[str, int], MachineWatch] = {}
    launchers: dict[int, Watched] = {}
    try:
        with noting_interruption() as interruption:
            while not target.over() and (duration_s is None or time.monotonic() - began_s < duration_s):
                _look(target, began_s, watches, launchers)
                if spying is not None and watches:
                    spying.begin(next(iter(watches.values())), duration_s)
                time.sleep(EVERY_S)
        for one in watches.values():
            one.end()
        found = merged(time.monotonic() - began_s, watches.values())
    finally:
        if spying is not None:
            spying.end()
        for one in watches.values():
            one.end()
    return found, interruption


def _look(
    target: _Running | _Command,
    began_s: float,
    watches: dict[tuple[str, int], MachineWatch],
    launchers: dict[int, Watched],
) -> None:
    """Sample every machine that is there; one that was not there before is watched from now on."""
    for identity, watched in watches.items():
        if identity_of(identity[0]) != identity:
            watched.end()
    for name in target.machines():
        identity = identity_of(name)
        if identity not in watches and (machine := attach_machine(name)) is not None:
            from_birth, number = isinstance(target, _Command), len(watches) + 1
            watches[identity] = MachineWatch(machine, began_s, launchers, number, from_birth=from_birth)
        if identity in watches:
            watches[identity].sample()


def _py_spy() -> str:
    found = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if found is None:
        raise MissingPrerequisite("--flame needs py-spy: pip install 'vmbus-emu[profile]'")
    return found


class Spying:
    """py-spy on the zygote of one machine and on all that it forked; `trouble` is why there is no flame graph."""

    def __init__(self, spy: str, flame: Path) -> None:
        self.trouble = ""
        self._spy = spy
        self._flame = flame
        self._process: subprocess.Popen[str] | None = None

    def begin(self, watched: MachineWatch, duration_s: float | None) -> None:
        """Start it, once."""
        if self._process is not None:
            return
        zygote = next(row.pid for row in watched.machine.control.rows() if row.name == "zygote")
        seconds = [] if duration_s is None else ["-d", str(max(1, round(duration_s)))]
        command = [self._spy, "record", "-p", str(zygote), "--subprocesses", "--nonblocking"]
        say(f"py-spy writes {self._flame}")
        self._process = subprocess.Popen(
            [*command, "-o", str(self._flame), *seconds],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def end(self) -> None:
        """Let it write its picture, which it does upon SIGINT."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        said = self._process.communicate()[1].splitlines()
        if self._process.returncode:
            # Above its own words may be a line of its log, below them are its functions.
            errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
            why = next(iter(errors or filter(None, said)), f"it ended with {self._process.returncode}")
            self.trouble = f"--flame {self._flame}: py-spy wrote none: {why}"


def report_of(found: Profile, command: tuple[str, ...], status: int) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "command": list(command),
        "command_status": status,
        "seconds": found.seconds,
        "processes": [asdict(one) for one in found.processes],
        "counters": found.counters,
        "machine_ns": found.machine_ns,
        **{f"per_{what.split()[-1]}_ns": found.per(counter) for counter, what in JOINED.items()},
    }


def show(found: Profile) -> None:
    """A table of processes, then what the machine did, then what each of that cost."""
    rows = []
    for one in sorted(found.processes, key=lambda one: -one.cpu_ns):
        cores = " ".join(f"{core}:{100 * n // sum(one.cores.values())}%" for core, n in sorted(one.cores.items()))
        rows.append(
            (
                found.label(one),
                f"{one.cpu_ns / 1e9:.3f}",
                f"{one.user_s:.2f}",
                f"{one.system_s:.2f}",
                f"{one.rss / 1e6:.1f}",
                f"{one.pss / 1e6:.1f}",
                f"{one.uss / 1e6:.1f}",
                one.voluntary,
                one.involuntary,
                one.minor_faults,
                cores,
            )
        )
    print_table(
        ("process", "CPU s", "user", "system", "RSS MB", "PSS MB", "USS MB", "waits", "preempted", "faults", "cores"),
        rows,
    )
    click.echo(f"\nin {found.seconds:.1f} s: " + ", ".join(f"{found.counters.get(n, 0)} {n}" for n in SHOWN_COUNTERS))
    costs = [f"{value / 1e3:.1f} us {what}" for counter, what in JOINED.items() if (value := found.per(counter))]
    click.echo(
        f"host and guest took {found.machine_ns / 1e9:.3f} s of processor time: {', '.join(costs) or 'for nothing'}"
    )
