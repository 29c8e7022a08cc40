"""`bench boot`: from the command line to open channels, and what one more device costs."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Final

from emu.control import Ready
from emu.errors import MissingPrerequisite, UserError, VmbusError
from emu.scenario import parse_device
from tools.anchors import Against, Anchor
from tools.bench_machine import asked_scenario, bench_scenario
from tools.exit_status import ExitStatus
from tools.launch import launch
from tools.own_python import own_environment, own_python
from tools.paths import cache_dir

WALL_GOAL_S: Final = 0.5
DEVICE_GOAL_US: Final = 400.0
GROWTH_GOAL: Final = 1.3
RUNNING_GOAL_S: Final = 0.25
CHANNEL_GOAL_US: Final = 250.0
VCPUS: Final = 8
VCPU_GOAL_MS: Final = 2.0
MANY_VCPUS: Final = 24
CHANNELS: Final = 64
FEW: Final = 200
MANY: Final = 2_000


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """The boot of 4 vCPUs and 8 devices, the cost of a device at 200 and 2,000, alternating, and parts of a boot."""
    walls = [launch_to_open() for _ in range(runs)]
    many = 4 * FEW if short else MANY
    per_device: dict[int, list[float]] = {FEW: [], many: []}
    for _ in range(1 if short else (runs + 1) // 2):
        for count in (FEW, many):
            per_device[count].append(bring_up(count))
    several = [bring_up(CHANNELS) for _ in range(runs)]
    running: list[float] = []
    more: list[float] = []
    for _ in range(runs):
        running.append(launch_to_running(VCPUS))
        more.append(launch_to_running(2 * VCPUS if short else MANY_VCPUS))
    further = (2 * VCPUS if short else MANY_VCPUS) - VCPUS
    one_more = [1e3 * (many - few) / further for few, many in zip(running, more, strict=True)]
    few = sorted(per_device[FEW])[len(per_device[FEW]) // 2]
    return [
        Anchor.of(
            "boot: launch to all channels open, 4 vCPUs, 8 devices", walls, "s", better="lower", goal=WALL_GOAL_S
        ),
        Anchor.of(
            f"boot: {many} devices offered, probed, opened, each",
            per_device[many],
            "us",
            better="lower",
            goal=DEVICE_GOAL_US,
        ),
        Anchor.of(
            f"boot: a device at {many} against one at {FEW}",
            per_device[many],
            "us",
            better="lower",
            against=Against(f"a device at {FEW}", few),
            goal=GROWTH_GOAL,
        ),
        Anchor.of(
            f"boot: a channel when {CHANNELS} come",
            several,
            "us",
            better="lower",
            goal=CHANNEL_GOAL_US,
            floor=CHANNEL_GOAL_US,
        ),
        Anchor.of(
            f"boot: host and {VCPUS} vCPUs running",
            running,
            "s",
            better="lower",
            goal=RUNNING_GOAL_S,
            floor=RUNNING_GOAL_S,
        ),
        Anchor.of("boot: one more vCPU running", one_more, "ms", better="lower", goal=VCPU_GOAL_MS, floor=VCPU_GOAL_MS),
    ]


def launch_to_open() -> float:
    """Seconds from the start of the `vmbus-emu run` process until its last channel was open."""
    path = asked_scenario()
    started = time.monotonic_ns()
    flags = ("--vcpus", "4", "--device", "echo:8", "--duration", "0", "--json")
    command = own_python("tools.entry", "run", *([] if path is None else [str(path)]), *flags)
    # As installed by pip: with bytecode.
    environment = {name: value for name, value in own_environment().items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment.setdefault("PYTHONPYCACHEPREFIX", str(cache_dir() / "bytecode"))
    done = subprocess.run(command, check=False, capture_output=True, timeout=120, env=environment)
    why = done.stderr.decode().strip().removeprefix("vmbus-emu: ")
    if done.returncode == ExitStatus.MISSING:
        raise MissingPrerequisite(why)
    if done.returncode == ExitStatus.USAGE:  # the scenario's machine cannot have four processors, for example
        raise UserError(why)
    # Channels that a fault of the scenario keeps closed are a finding of the run; the others are open by then.
    opened_ns = json.loads(done.stdout)["opened_at_ns"] if done.returncode in (0, ExitStatus.FINDING) else None
    if opened_ns is None:
        raise VmbusError(f"`vmbus-emu run` ended with {done.returncode}: {why}")
    return (int(opened_ns) - started) / 1e9


def bring_up(devices: int) -> float:
    """Microseconds a device from the first offer asked for until all channels were open."""
    scenario = bench_scenario(vcpus=2, devices=[parse_device(f"echo:{devices}")])
    with launch(scenario) as running:
        running.wait_ready()
        control = running.machine.control
        elapsed = control.stage_ns(Ready.CHANNELS_OPEN) - control.stage_ns(Ready.CONNECTED)
        running.shut_down_guest()
    return elapsed / 1e3 / devices


def launch_to_running(vcpus: int) -> float:
    """Seconds from the launch until the host ran and the guest, with all its vCPUs online, had connected to it."""
    scenario = bench_scenario(vcpus=vcpus, devices=[parse_device("echo:8")])
    began = time.monotonic_ns()
    with launch(scenario) as running:
        running.wait_ready()
        control = running.machine.control
        # A stage that was passed together with the next one has no time of its own.
        connected = control.stage_ns(Ready.CONNECTED) or control.stage_ns(Ready.OFFERS_DELIVERED)
        ago = control.clock.now() - connected
        elapsed = time.monotonic_ns() - ago - began
        running.shut_down_guest()
    return elapsed / 1e9
