"""Public: machines for tests, of this project's and of yours. What stands here keeps its names and meanings.

    with running(plugins=["tempsensor.py"], devices=["tempsensor"]) as machine:
        machine.wait_for(lambda: machine.driver_state("tempsensor")[0] == 10, "ten readings")

`running` launches a machine of real processes, waits until its channels are open, and takes it away again on
every way out. If the block ended well, the guest is shut down and must have given everything back: a leak is an
AssertionError, as is any object that is left. `docs/writing-a-driver.md` shows a whole test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psutil

from emu import plugin
from emu.control import ActorState, Control, Ready
from emu.errors import NotOpened, UserError
from emu.ipc.segments import object_name
from emu.machine import Machine
from emu.mirror import Mirror, MirrorChannel
from emu.recording import TraceRecord
from emu.scenario import Scenario, parse_device
from guestproc.kernel.layout import KernelTables
from guestproc.view import GuestView, settled
from hostproc.protocol.states import ChannelState
from tools.ctl import ask_host, offer_devices, wait_until_open, wait_until_released
from tools.device_list import ListedDevice, guest_devices
from tools.launch import MachineDied, RunningMachine, launch
from tools.live_records import LiveRecords
from tools.plugins import check_plugins, scenario_of

__all__ = [
    "LiveMachine",
    "MachineDied",
    "NotOpened",
    "Offered",
    "Ready",
    "Scenario",
    "assert_gone",
    "inner_pids",
    "objects",
    "processes",
    "running",
    "wait_for",
]

TIMEOUT_S: Final = 30.0
_LOOK_S: Final = 0.01
SHM: Final = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Offered:
    """A device that was offered while the machine ran: `relid` and `generation` together are one life of a number."""

    relid: int
    generation: int
    instance: UUID
    class_name: str


class LiveMachine:
    """A running machine, to be looked at and to be troubled."""

    def __init__(self, running: RunningMachine) -> None:
        self.running: Final = running
        self.name: Final = running.name
        self.scenario: Final = running.scenario
        self.machine: Final[Machine] = running.machine
        self._records: Final = LiveRecords(running.machine)
        self._tables: KernelTables | None = None
        plugin.known_from(running.machine.config)

    # -- waiting ------------------------------------------------------------------------------------

    def wait_ready(self, stage: Ready = Ready.CHANNELS_OPEN, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the machine has come as far as `stage`, and the host has published what it then knows."""
        self.running.wait_ready(stage, timeout_s)
        if stage >= Ready.CHANNELS_OPEN:
            # The host tells what it knows a few milliseconds later than it tells the guest.
            self.wait_for(self._both_ends_agree, "both ends to agree on what is open", timeout_s)

    def _both_ends_agree(self) -> bool:
        opened = {one.relid for device in self.devices() for one in device.channels if one.state == "opened"}
        return opened == {one.relid for one in self.channels() if one.state == ChannelState.OPEN}

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until a condition holds; DeadlinePassed when it does not, MachineDied when a process ends instead."""
        self.running.wait_until(condition, timeout_s, what, step_s=_LOOK_S)

    @property
    def boot_s(self) -> float:
        """Seconds from the launch until all channels of the scenario were open."""
        control = self.machine.control
        opened_at_ns = time.monotonic_ns() - (control.clock.now() - control.booted_ns)
        return opened_at_ns / 1e9 - self.running.launched_at

    # -- looking ------------------------------------------------------------------------------------

    @property
    def log(self) -> list[str]:
        """The guest kernel's lines and the tracebacks of back ends, each with who wrote it."""
        self.running.pump(0)
        return self.running.log

    def devices(self) -> list[ListedDevice]:
        """The guest's devices, as `vmbus-emu ls` lists them, by relid."""
        return guest_devices(self._guest())

    def device(self, which: str | int | UUID) -> ListedDevice:
        """The only device of a class, the one of a relid, or the one of an instance; AssertionError otherwise."""
        devices = self.devices()
        found = [one for one in devices if which in (one.class_name, one.relid, one.device_id)]
        names = ", ".join(f"{one.relid} {one.class_name}" for one in devices)
        assert len(found) == 1, f"{len(found)} devices are called {which}; there are: {names or 'none'}"
        return found[0]

    def channels(self) -> list[MirrorChannel]:
        """The host's channels, by relid; `state` is a `hostproc.protocol.states.ChannelState`."""
        return list(Mirror(self.machine.control).channels())

    def counters(self) -> dict[str, int]:
        """Sums of all actors' counters, as each last published them (`emu.counters.COUNTERS`)."""
        return self.machine.control.counter_totals()

    def refused(self) -> dict[str, int]:
        """What the host refused, by rule; `backend-error` counts the exceptions of back ends."""
        return self.machine.control.refusals()[0]

    def refusals(self) -> list[dict[str, Any]]:
        """The newest refusals in full, those that are alike once, with their `count`; the last is the newest."""
        return self.machine.control.refusals()[1]

    def driver_state(self, which: str | int | UUID) -> list[int]:
        """The 32 words in guest RAM that belong to a device's driver."""
        wire = self.device(which).device_id.bytes_le
        view = GuestView(self._guest())

        def look() -> list[int]:
            device = view.device(wire)
            assert device is not None, f"device {which} is gone"
            return list(device.driver_state)

        return settled(look)

    def _guest(self) -> KernelTables:
        """The guest's records, once its boot CPU has laid them out."""
        if self._tables is None:
            self.wait_for(lambda: self.machine.control.guest_formatted, "the guest to lay out its RAM")
            self._tables = KernelTables.attach(self.machine.ram.apart)
        return self._tables

    def records(self) -> list[TraceRecord]:
        """What was recorded since the last call, by time (with `running(record=True)`)."""
        return self._records.take()

    # -- troubling ----------------------------------------------------------------------------------

    def offer(self, device: str, *, backend: str | None = None, wait: bool = True) -> list[Offered]:
        """Offer devices (hot add), `CLASS[:COUNT]`; with `wait`, until the guest has opened every channel.

        NotOpened as soon as it is known that it will not.
        """
        offered = offer_devices(self.machine, device, backend=backend)
        if wait:
            for one in offered:
                wait_until_open(self.machine, one["relid"], one["generation"])
        return [Offered(one["relid"], one["generation"], UUID(one["instance"]), one["class"]) for one in offered]

    def rescind(self, relid: int, *, wait: bool = True) -> None:
        """Take a device back (hot remove); with `wait`, until the guest has released the relid."""
        answer = ask_host(self.machine, "rescind", relid=relid, instance="")
        if wait and answer["relid"]:
            wait_until_released(self.machine, answer["relid"], answer["generation"])

    @contextlib.contextmanager
    def held(self, process: str) -> Iterator[None]:
        """Hold one process still (`vcpu1`, `workqueue`, `hypervisor`), and machine time with it."""
        pid = self.running.inner[process].pid
        clock = self.machine.clock
        clock.hold()
        try:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"{process} to stand still")
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            clock.release()

    def kill(self, process: str) -> None:
        """Kill one process; the next wait raises MachineDied."""
        self.running.kill(process)

    def shut_down(self) -> None:
        """Let the guest remove its devices and unload; AssertionError when it does not, or when anything leaked."""
        self.running.pump(0)
        assert self.running.shut_down_guest(), self._with_log(f"machine {self.name} did not shut down")
        leaked = self.running.leaked()
        assert not leaked, self._with_log(f"machine {self.name} leaked {leaked} records, pages or GPADLs")

    def _with_log(self, text: str) -> str:
        return "\n".join([text, *self.running.log])


@contextlib.contextmanager
def running(
    scenario: Scenario | Path | str | None = None,
    *,
    plugins: Sequence[Path | str] = (),
    devices: Sequence[str] = (),
    vcpus: int | None = None,
    name: str | None = None,
    record: bool = False,
    wait: bool = True,
) -> Iterator[LiveMachine]:
    """A machine of real processes for as long as the block runs.

    `scenario` is a file's path, a `Scenario`, or None for the default one; `plugins`, `devices` (`CLASS[:COUNT]`,
    instead of the scenario's), `vcpus` and `name` are the options of `vmbus-emu run`. A `Scenario` brings its own
    plugins. UserError for what cannot be; nothing is left behind then. `wait=False` returns while it boots.
    """
    if isinstance(scenario, Scenario):
        if plugins:
            raise UserError("a Scenario brings its own plugins; give them to Scenario.load or Scenario.default")
        check_plugins(scenario.plugins)
        chosen = scenario
    else:
        chosen = scenario_of(None if scenario is None else Path(scenario), [Path(one) for one in plugins])
    specs = [parse_device(one, chosen.plugins) for one in devices]
    chosen = chosen.with_overrides(name=name, vcpus=vcpus, devices=specs)
    with launch(chosen, record=record) as launched:
        machine = LiveMachine(launched)
        if wait:
            machine.wait_ready()
        yield machine
        if not launched.closed:
            machine.shut_down()
    assert_gone(launched.name)


# -- from outside: what there is of a machine -------------------------------------------------------------


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Poll a condition of other processes; AssertionError when it stays false."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        # What is waited for is the condition, not the time.
        time.sleep(_LOOK_S)


def objects(name: str) -> list[str]:
    """The shared objects that there are of a machine."""
    return sorted(one.name for one in SHM.iterdir() if f"vmbus-emu.{name}." in one.name)


def processes(name: str) -> list[psutil.Process]:
    """The processes that have a machine mapped, this one excepted."""
    found = []
    # A machine of the same name in another /dev/shm, a container's for example, is another machine.
    device = SHM.stat().st_dev
    wanted = f" {os.major(device):02x}:{os.minor(device):02x} "
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            mine = any(f"vmbus-emu.{name}." in line and wanted in line for line in maps)
            if process.pid != os.getpid() and mine:
                found.append(process)
    return found


def inner_pids(name: str) -> dict[str, int]:
    """Names and pids of a machine's living actors, read from its process table."""
    control = Control.attach(object_name(name, "control"))
    try:
        return {row.name: row.pid for row in control.rows() if row.state == ActorState.ALIVE}
    finally:
        control.close()


def assert_gone(name: str, timeout_s: float = 10) -> None:
    """Nothing of a machine is left: no process, no shared object."""
    wait_for(lambda: not processes(name) and not objects(name), f"machine {name} to be gone", timeout_s)
