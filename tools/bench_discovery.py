"""`bench discovery`: a device that is added while the machine runs, one that is taken away, and 2,000 by IPI.

When a channel was open, or gone, is what the guest's kernel told its user space: the time in the channel's own uevent,
the last of an addition (behind probe and bind) and of a removal (behind RELID_RELEASED). Who looked for it all the
time would take a core from those that it measures: a fifth to a quarter of the figure on two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from emu.control import Ready
from emu.errors import DeadlinePassed
from emu.mirror import Mirror
from emu.orders import OrderDesk, Recipient
from emu.scenario import parse_device
from emu.vmexit import HostBell
from guestproc.kernel.layout import Channel, ChannelState, KernelTables
from guestproc.protocol import uevent_text
from guestproc.protocol.uevents import Action
from tools.anchors import Against, Anchor
from tools.bench_machine import bench_scenario
from tools.launch import RunningMachine, launch

HOT_GOAL_MS: Final = 2.0
SEED_GOAL: Final = 1.5
MANY: Final = 2_000
MANY_VCPUS: Final = 8
ROUNDS: Final = 20
"""Hot adds and removes a run; a run's figure is their median."""
_LOOK_S: Final = 2e-3
_DEADLINE_S: Final = 10.0


def measure(runs: int, *, short: bool = False) -> list[Anchor]:
    """Hot add to open channel, rescind to release, and the two eras at 2,000 devices, alternating."""
    added, released = hot(1 if short else ROUNDS, runs)
    many = 100 if short else MANY
    eras: dict[str, list[float]] = {"seed": [], "current": []}
    for _ in range(1 if short else runs):
        for era, figures in eras.items():
            figures.append(bring_up_s(era, many))
    current = sorted(eras["current"])[len(eras["current"]) // 2]
    return [
        Anchor.of("discovery: hot add to open channel", added, "ms", better="lower", goal=HOT_GOAL_MS),
        Anchor.of("discovery: rescind to release", released, "ms", better="lower", goal=HOT_GOAL_MS),
        Anchor.of(
            f"discovery: {many} devices, {MANY_VCPUS} vCPUs, era seed",
            eras["seed"],
            "s",
            better="lower",
            against=Against("era current", current),
            goal=SEED_GOAL,
        ),
    ]


def hot(rounds: int, runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `runs` medians of `rounds` adds, and of as many removes, on one machine at rest."""
    added, released = [], []
    with launch(bench_scenario()) as running:
        running.wait_ready()
        hot_plug = HotPlug(running, KernelTables.attach(running.machine.ram.apart))
        for _ in range(runs):
            pairs = [hot_plug.add_and_remove() for _ in range(rounds)]
            added.append(sorted(pair[0] for pair in pairs)[rounds // 2] / 1e6)
            released.append(sorted(pair[1] for pair in pairs)[rounds // 2] / 1e6)
        running.shut_down_guest()
    return added, released


class HotPlug:
    """Adds and removes one device of a running machine, and watches the guest's records meanwhile."""

    def __init__(self, running: RunningMachine, tables: KernelTables) -> None:
        self._running = running
        self._tables = tables
        self._desk = OrderDesk(running.machine.control)
        self._wake = HostBell(running.machine.doorbells.view, running.machine.wakeup("host")).wake
        self._mirror = Mirror(running.machine.control)
        # The host may not have published yet that all is open: it does so when nobody asks for anything for a while.
        running.wait_until(self._all_open, _DEADLINE_S, "the host to publish its channels", step_s=0.001)
        # The lowest free relid is the next one's.
        self._offers = self._mirror.head().offers
        self._relid = self._offers + 1

    def _all_open(self) -> bool:
        head = self._mirror.head()
        return 0 < head.offers == head.open

    def add_and_remove(self) -> tuple[int, int]:
        """Nanoseconds from an order until the channel is open, and from the other until its relid was released."""
        device = {"class": "echo", "backend": "echo", "count": 1, "instance": ""}
        added = self._timed("offer", self._opened, Action.ADD, device)
        channel = self._tables.relids.lookup(self._relid)
        assert channel is not None
        gone = {"relid": self._relid, "instance": ""}
        removed = self._timed("rescind", lambda: not channel.alive(), Action.REMOVE, gone)
        # Only when the host has the relid back is it the lowest free one again.
        self._running.wait_until(
            lambda: self._mirror.head().offers == self._offers, _DEADLINE_S, "the relid to be back", step_s=0.001
        )
        return added, removed

    def _timed(self, what: str, done: Callable[[], bool], action: Action, arguments: dict[str, Any]) -> int:
        """From the order to the uevent of the channel that it leads to; `done` says that no more will follow."""
        seqnum, began = self._tables.connection.uevent_seqnum, self._running.machine.clock.now()
        slot = self._desk.post(Recipient.HOST, what, self._wake, **arguments)
        end = time.monotonic() + _DEADLINE_S
        while not done():
            time.sleep(_LOOK_S)
            if time.monotonic() > end:
                raise DeadlinePassed(f"the end of what `{what}` began", int(_DEADLINE_S * 1e9))
        self._desk.wait(slot, what)
        told = [one for one in uevent_text.since(self._tables, seqnum) if one.head.endswith(f"/channels/{self._relid}")]
        assert [one.head.partition("@")[0] for one in told] == [action.name.lower()], [one.head for one in told]
        return told[0].machine_ns - began

    def _opened(self) -> bool:
        channel: Channel | None = self._tables.relids.lookup(self._relid)
        # Its driver's probe has ended, too: what comes next shall not run beside the rest of it.
        return (
            channel is not None and channel.state.load() == ChannelState.OPENED_STATE and channel.probe_done.load() == 1
        )


def bring_up_s(era: str, devices: int) -> float:
    """Seconds from the first offer asked for until all channels were open, in an era, with 8 vCPUs."""
    scenario = bench_scenario(vcpus=MANY_VCPUS, devices=[parse_device(f"echo:{devices}")])
    scenario = replace(scenario, machine=replace(scenario.machine, era=era))
    with launch(scenario) as running:
        running.wait_ready()
        control = running.machine.control
        elapsed = control.stage_ns(Ready.CHANNELS_OPEN) - control.stage_ns(Ready.CONNECTED)
        running.shut_down_guest()
    return elapsed / 1e9
