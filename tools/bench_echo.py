"""`bench echo`: a round trip through two rings, two interrupts, a tasklet and a callback, one after the other.

Hot, both ends poll: against what Python programs use otherwise, each waiting in its own way, pinned to the same two
cores in the same run, in turn. Cold, both ends are really halted at each half: against two C processes that wake
each other by semaphores.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Final

from emu.scenario import parse_device
from emu.task_board import Program
from tools import peers
from tools.anchors import Against, Anchor
from tools.bench_machine import bench_scenario
from tools.device_list import list_devices
from tools.launch import RunningMachine, launch
from tools.nameless_file import nameless_file
from tools.pinned import pin, two_cores
from tools.sem_pair import NAME, sem_pair

SIZE: Final = 64
WINDOW_S: Final = 0.5
SHORT_S: Final = 0.05
PAIR_TRIPS: Final = 3_000
PEER_TRIPS: Final = 2_000
RIVALS: Final = ("pyzmq ipc", "multiprocessing.Pipe", "SEQPACKET pair", "faster-fifo")
"""Of `peers.PEERS`, those that a goal is against."""
PEER_GOAL: Final = 1 / 8
COLD_GOAL: Final = 1.25
P99_FLOOR: Final = 1 / 3
HOT: Final = 1 / 10
_TIMEOUT_S: Final = 60.0
_HOT: Final = f"echo-{SIZE}B-hot"
_COLD: Final = f"echo-{SIZE}B-cold-p50"


def measure(runs: int, *, short: bool = False, with_peers: bool = False) -> list[Anchor]:
    """Hot and cold round trips of 64 bytes beside the C pair's and, if asked for, other transports'."""
    cores = two_cores()
    pair, reason = sem_pair()
    window_s = SHORT_S if short else WINDOW_S
    hot: list[list[float]] = []
    cold: list[list[float]] = []
    blocking: list[float] = []
    rivals = Rivals(RIVALS if with_peers else (), PEER_TRIPS // 20 if short else PEER_TRIPS, cores)
    with echo_machine("adaptive", cores) as polling, echo_machine("off", cores) as halting:
        for _ in range(runs):
            if pair is not None:
                blocking.append(pair.run(PAIR_TRIPS, cores).p50_ns / 1e3)
            hot.append(round_trips(polling, window_s))
            cold.append(round_trips(halting, window_s))
            rivals.measure()
    against = Against(f"round trip of the {NAME}", median(blocking) if blocking else None)
    p50, p99 = [median(one) for one in hot], [p99_of(one) for one in hot]
    halted = [median(one) for one in cold]
    return [
        Anchor.of(f"{_HOT}-p50", p50, "us", better="lower", against=against, goal=HOT, floor=HOT, reason=reason),
        Anchor.of(f"{_HOT}-p99", p99, "us", better="lower", against=against, goal=1.0, floor=P99_FLOOR, reason=reason),
        Anchor.of(_COLD, halted, "us", better="lower", against=against, goal=COLD_GOAL, reason=reason),
        *rivals.anchors(p50),
    ]


class Rivals:
    """Round trips of other transports, each with what kept it from being measured."""

    def __init__(self, names: tuple[str, ...], trips: int, cores: tuple[int, int]) -> None:
        self._p50: dict[str, list[float]] = {name: [] for name in names}
        self._reasons: dict[str, str] = {}
        self._trips = trips
        self._cores = cores

    def measure(self) -> None:
        """One run of each."""
        for name, runs in self._p50.items():
            if name not in self._reasons:
                try:
                    runs.append(median(peers.round_trips(name, SIZE, self._trips, self._cores)) / 1e3)
                except peers.LeftOut as left_out:
                    self._reasons[name] = str(left_out)

    def anchors(self, ours: list[float]) -> list[Anchor]:
        """Ours against each of them."""
        return [
            Anchor.of(
                f"{_HOT}-against-{name.split()[0].split('.')[-1].lower()}",
                ours,
                "us",
                better="lower",
                against=Against(name, median(runs) if runs else None),
                goal=PEER_GOAL,
                floor=PEER_GOAL,
                reason=self._reasons.get(name),
            )
            for name, runs in self._p50.items()
        ]


def p99_of(values: list[float]) -> float:
    """The 99th percentile."""
    return quantiles(values, n=100)[98]


@contextmanager
def echo_machine(poll: str, cores: tuple[int, int]) -> Iterator[RunningMachine]:
    """A machine of one vCPU and one echo device; hypervisor and vCPU on these cores."""
    scenario = bench_scenario(vcpus=1, poll=poll, devices=[parse_device("echo:1")])
    with launch(scenario) as running:
        running.wait_ready()
        pin(running, *cores)
        yield running
        running.shut_down_guest()


def round_trips(running: RunningMachine, seconds: float, device: int = 0) -> list[float]:
    """Microseconds of each round trip with a device, one after the other, for so long."""
    channel = list_devices(running.machine)[device].channels[0]
    with nameless_file() as path:
        row = running.order(
            Program.PING, channel.cpu, relid=channel.relid, wanted=int(seconds * 1e9), size=SIZE, path=str(path)
        )
        running.take_tasks([row], seconds + _TIMEOUT_S)
        pairs = array("Q", path.read_bytes())
    return [(done - due) / 1e3 for due, done in zip(pairs[::2], pairs[1::2], strict=True)]
