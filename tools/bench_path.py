"""The whole channel path: send → ring → signal rules → event flag → interrupt → ISR → mask, drain, unmask → callback.

A machine as any other, with the plugin of `tools.bench_path_plugin`: its device sends batches for a while, its driver's
callback counts. Hypervisor and vCPU are on a core each, like the two ends of whoever it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from emu.errors import VmbusError
from emu.scenario import parse_device
from tools.anchors import Against, Anchor
from tools.bench_machine import bench_scenario
from tools.bench_path_plugin import BEGIN, CALLBACKS, END, SIZE, TAKEN, WRONG
from tools.draining import recording
from tools.pinned import pin
from tools.two_ends import Cpus

PLUGIN: Final = Path(__file__).with_name("bench_path_plugin.py")
PEER_GOAL: Final = 1.8
PEER_FLOOR: Final = 1.3
C_GOAL: Final = 0.8
C_FLOOR: Final = 0.6
INTERRUPTS_GOAL: Final = 1.0
_NAME: Final = f"path-{SIZE}B-batch"


@dataclass(frozen=True, slots=True)
class Streamed:
    """What one run gave: packets a second, interrupts for each 100 packets; records that were dropped."""

    rate: float
    interrupts: float
    dropped: int


def stream(cpus: Cpus | None, record_into: Path | None = None) -> Streamed:
    """One run, in a machine of its own that records into a file if there is one, drained as `run --record` does.

    VmbusError when a packet was not what it should be. `cpus`: where hypervisor and vCPU are; None: anywhere.
    """
    from tools.testing import running

    scenario = bench_scenario(vcpus=1, devices=[parse_device("echo")], plugins=[PLUGIN])
    with (
        running(scenario, record=record_into is not None) as machine,
        recording(machine.running, record_into) as recorded,
    ):
        if cpus is not None:
            pin(machine.running, *cpus)
        before = machine.counters()["interrupts"]
        (source,) = machine.offer("path-bench")
        machine.wait_for(lambda: machine.driver_state(source.relid)[END] != 0, "the end of the run")
        state = machine.driver_state(source.relid)
        interrupts = machine.counters()["interrupts"] - before
    if state[WRONG] or not state[TAKEN]:
        raise VmbusError(f"bench path: {state[WRONG]} of {state[CALLBACKS]} batches were wrong")
    rate = state[TAKEN] * 1e9 / (state[END] - state[BEGIN])
    return Streamed(rate, 100 * interrupts / state[TAKEN], 0 if recorded is None else recorded.dropped)


@dataclass(slots=True)
class PathFigures:
    """What each run gave: packets a second, interrupts for each 100 packets."""

    rates: list[float] = field(default_factory=list)
    interrupts: list[float] = field(default_factory=list)

    def measure(self, cpus: Cpus) -> None:
        """One run."""
        streamed = stream(cpus)
        self.rates.append(streamed.rate)
        self.interrupts.append(streamed.interrupts)

    def anchors(self, best_peer: Against, c_ring: Against, no_peer: str | None, no_ring: str | None) -> list[Anchor]:
        """Against the best peer, against the C ring, and interrupts under load; why there is no peer, or ring."""
        peers, ring = (
            Anchor.of(
                f"{_NAME}-{name}",
                self.rates,
                "packets/s",
                better="higher",
                against=against,
                goal=goal,
                floor=floor,
                reason=None if against.value else reason or "nothing to compare with",
            )
            for name, against, goal, floor, reason in (
                ("peers", best_peer, PEER_GOAL, PEER_FLOOR, no_peer),
                ("ring", c_ring, C_GOAL, C_FLOOR, no_ring),
            )
        )
        interrupts = Anchor.of(
            f"path-{SIZE}B-interrupts",
            self.interrupts,
            "per 100 packets",
            better="lower",
            goal=INTERRUPTS_GOAL,
            floor=INTERRUPTS_GOAL,
        )
        return [peers, ring, interrupts]
