"""`vmbus-emu demo`: a machine boots, devices appear one at a time, one is taken away again; every step is told.

Nothing is staged: the steps and their times are what the machine's processes recorded (see `tools.demo_steps`).
Plain lines, 80 columns, no cursor movement, so it reads the same on a terminal and through a pipe.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import click

from emu.control import ActorRow, ActorState, Control
from emu.mirror import Mirror
from emu.recording import TraceRecord
from emu.scenario import MachineSpec, Scenario
from emu.task_board import Program
from emu.wire.versions import version_text
from tools.demo_steps import Step, milestones, steps_of
from tools.nouns import counted
from tools.options import json_option
from tools.output import colored, print_json
from tools.testing import LiveMachine, Offered, running

VCPUS: Final = 2
DEVICES: Final = ("echo", "scsi", "kbd")
PACKETS: Final = 32
LAST_OFFER: Final = "probe"
LAST_RESCIND: Final = "release"
TIMEOUT_S: Final = 30.0

LINE_S: Final = 0.15
QUICK_LINE_S: Final = 0.08
SECTION_S: Final = 0.4

WHAT: Final = "step (guest: the kernel's function)"

ROLES: Final = {
    "hypervisor": "the host: VMBus server, SynIC, device back ends",
    "vcpu0": "a virtual processor: interrupts, tasklets, tasks",
    "vcpu1": "another one",
    "workqueue": "the guest's work queues, where its kernel may sleep",
}
COLORS: Final = {"hypervisor": "35", "vcpu0": "36", "vcpu1": "36", "workqueue": "33"}
BOLD: Final = "1"
DIM: Final = "2"

NEXT: Final = (
    ("vmbus-emu run", "8 devices, until Ctrl-C"),
    ("vmbus-emu run --stream /bin/ls", "a real file through a channel and back"),
    ("vmbus-emu run --duration 1 --record r", "every step into a file,"),
    ("vmbus-emu trace r", "and out of it, as JSON"),
    ("vmbus-emu run --plugin FILE.py", "yours: docs/writing-a-driver.md"),
)


class Narrator:
    """Writes lines and waits between them, unless it is in a hurry; colours on a terminal only."""

    def __init__(self, pause: Callable[[float], object]) -> None:
        self._pause: Final = pause
        self._colored: Final = colored(sys.stdout)

    def paint(self, text: str, style: str) -> str:
        """The text in a style, where styles are shown."""
        return f"\x1b[{style}m{text}\x1b[0m" if self._colored and style else text

    def line(self, text: str = "", pause_s: float = 0.0) -> None:
        """One line, at once also through a pipe."""
        sys.stdout.write(text.rstrip() + "\n")
        sys.stdout.flush()
        self._pause(pause_s)

    def section(self, number: int, title: str) -> None:
        """A heading."""
        self._pause(SECTION_S)
        self.line()
        self.line(self.paint(f"{number}. {title}", BOLD), SECTION_S)

    def steps(self, steps: list[Step], line_s: float) -> None:
        """A table of steps; process and context are named when they change."""
        self.line(self.paint(f" {'at µs':>6} {'took':>6}  {'process':<10}  {'context':<14}  {WHAT}", DIM))
        process = context = ""
        for number, step in enumerate(steps):
            took = f"{step.took_ns / 1e3:6.0f}" if number else " " * 6
            times = self.paint(f" {step.at_ns / 1e3:6.0f} {took}", DIM)
            moved = step.process != process
            who = step.process if moved else ""
            where = step.context if moved or step.context != context else ""
            process, context = step.process, step.context
            style = COLORS.get(process, "")
            self.line(f"{times}  {self.paint(f'{who:<10}', style)}  {where:<14}  {step.text}", line_s)


@dataclass(slots=True)
class Story:
    """The run, as it is told: to people while it goes, to programs at its end."""

    machine: LiveMachine
    narrator: Narrator | None
    told: dict[str, Any] = field(default_factory=dict)

    def boot(self) -> None:
        """The machine is up: its processes, and what guest and host agreed on."""
        control = self.machine.machine.control
        inner = [name for name in self.machine.running.inner if name in ROLES]
        # A processor that gets no core may be later than what guest and host agree on without it.
        self.machine.running.wait_until(
            lambda: {row.name for row in _alive(control)} >= {*inner}, TIMEOUT_S, "all processes to be there"
        )
        rows = _alive(control)
        processes = [_process(name, rows) for name in inner]
        boot_s = self.machine.boot_s
        mirror = Mirror(control)
        # A host that gets no core tells of a connection later than the guest.
        self.machine.running.wait_until(lambda: mirror.head().version != 0, TIMEOUT_S, "the host to tell its version")
        version = version_text(mirror.head().version)
        self.told.update(version=version, boot_s=round(boot_s, 6), vcpus=VCPUS, processes=processes, devices=[])
        if (out := self.narrator) is None:
            return
        out.section(1, f"A machine boots: {VCPUS} virtual processors, no device yet")
        for one in processes:
            name = out.paint(f"{one['name']:<10}", COLORS[one["name"]])
            out.line(f"   {name}  pid {one['pid']:<7}  {ROLES[one['name']]}", LINE_S)
        out.line(f"   After {boot_s * 1e3:.0f} ms they agree on VMBus {version}, and the guest awaits offers.")

    def appear(self, number: int, class_name: str) -> Offered:
        """The host offers one device: from the first message to the open channel."""
        (offered,) = self.machine.offer(class_name)
        records = self._until(LAST_OFFER, offered.relid)
        steps = steps_of(records, offered.relid, LAST_OFFER)
        listed = self.machine.device(offered.relid)
        cpu = listed.channels[0].cpu
        took_ms = steps[-1].at_ns / 1e6
        told = {"class": class_name, "relid": offered.relid, "vcpu": cpu, "took_ms": round(took_ms, 6)}
        self.told["devices"].append({**told, "steps": _reports(steps)})
        if (out := self.narrator) is None:
            return offered
        first = number == 0
        also = "" if first else " (milestones only)"
        out.section(2 + number, f"The host offers a device of class {class_name}{also}")
        if first:
            out.line("   Read it downwards: who runs is named where that changes. The guest's kernel")
            out.line("   runs in an ISR, in a tasklet or in a work queue; only there it may sleep.", SECTION_S)
        out.steps(steps if first else milestones(steps), LINE_S if first else QUICK_LINE_S)
        out.line(f"   From offer to open channel: {took_ms:.2f} ms. Its interrupts will go to vcpu{cpu}.")
        return offered

    def echo(self) -> None:
        """Packets through what was opened."""
        launched = self.machine.running
        cpus = sorted({channel.cpu for device in self.machine.devices() for channel in device.channels})
        rows = launched.wait_tasks([launched.order(Program.ECHO_CHECK, cpu, wanted=PACKETS) for cpu in cpus], TIMEOUT_S)
        packets, errors = sum(row.packets for row in rows), sum(row.errors for row in rows)
        self.told["echo"] = {"packets": packets, "errors": errors}
        # What the packets recorded is no step of a removal.
        self.machine.records()
        if (out := self.narrator) is None:
            return
        out.section(2 + len(DEVICES), "The guest's programs send packets through the rings")
        what = "every byte compared" if not errors else counted(errors, "ERROR", "ERRORS")
        out.line(f"   {counted(packets, 'packet')} there and back over {len(DEVICES)} channels, {what}.")

    def vanish(self, offered: Offered) -> None:
        """The host takes one device back, under the guest's feet."""
        self.machine.rescind(offered.relid)
        steps = steps_of(self._until(LAST_RESCIND, offered.relid), offered.relid, LAST_RESCIND)
        took_ms = steps[-1].at_ns / 1e6
        self.told["removal"] = {"relid": offered.relid, "took_ms": round(took_ms, 6), "steps": _reports(steps)}
        if (out := self.narrator) is None:
            return
        out.section(3 + len(DEVICES), f"The host takes the {offered.class_name} device back, without asking")
        out.steps(steps, LINE_S)
        out.line(f"   From rescind to release: {took_ms:.2f} ms. Relid {offered.relid} is free again.")

    def end(self) -> None:
        """Everything is gone; what to try next."""
        self.told["leaked"] = 0
        if (out := self.narrator) is None:
            return
        out.section(4 + len(DEVICES), "The guest shuts down")
        out.line("   Drivers removed, UNLOAD answered, processes ended, shared memory unlinked;")
        out.line("   leaked: nothing.", SECTION_S)
        out.line()
        out.line(out.paint("Every number above was measured in this run. What to try next:", BOLD))
        for command, what in NEXT:
            out.line(f"   {out.paint(f'{command:<37}', COLORS['vcpu0'])}  {what}")

    def _until(self, event: str, relid: int) -> list[TraceRecord]:
        """The records up to the guest's last one of a device's coming or going."""
        records: list[TraceRecord] = []

        def there() -> bool:
            records.extend(self.machine.records())
            return any(
                record.event.name == event and record.arguments["relid"] == relid and record.context == "QUEUE"
                for record in records
            )

        self.machine.wait_for(there, f"the record of {event} of relid {relid}", TIMEOUT_S)
        return sorted(records, key=lambda record: record.t_ns)


def _alive(control: Control) -> list[ActorRow]:
    return [row for row in control.rows() if row.state == ActorState.ALIVE]


def _process(name: str, rows: list[ActorRow]) -> dict[str, Any]:
    pid = next(row.pid for row in rows if row.name == name)
    return {"name": name, "pid": pid, "actors": sum(row.pid == pid for row in rows)}


def _reports(steps: list[Step]) -> list[dict[str, Any]]:
    return [step.report() for step in steps]


@click.command()
@click.option("--fast", is_flag=True, help="Without pauses.")
@json_option
def demo(fast: bool, as_json: bool) -> None:
    """Watch a machine boot and its devices appear, one step at a time.

    It takes about 15 seconds, and the times that it tells are those of this run.

    \b
    Example:
      vmbus-emu demo
      vmbus-emu demo --fast | less
    """
    if not as_json:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a µ that cannot be written is no reason to stop
        narrate_title()
    with running(Scenario(MachineSpec(vcpus=VCPUS), ()), record=True) as machine:

        def pause(seconds: float) -> None:
            if fast:
                return
            if machine.running.closed:
                time.sleep(seconds)
            else:
                # It is watched meanwhile: a process that dies ends the demo, with its traceback.
                machine.running.watch(seconds)

        story = Story(machine, None if as_json else Narrator(pause))
        story.boot()
        machine.records()
        offered = [story.appear(number, class_name) for number, class_name in enumerate(DEVICES)]
        story.echo()
        story.vanish(offered[0])
        story.told["machine"] = machine.name
    story.end()
    if as_json:
        print_json("demo", 1, story.told)


def narrate_title() -> None:
    """What is going to happen, while the machine boots."""
    out = Narrator(lambda seconds: None)
    out.line(out.paint("vmbus-emu: both ends of Hyper-V's VMBus, as processes on this computer", BOLD))
    out.line("There is no hypervisor here: one process plays it, one process is each virtual")
    out.line("processor, one is where the guest's kernel may sleep. They share memory.")
