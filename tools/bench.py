"""`vmbus-emu bench`: the figures that this project is held to, measured here and now."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click

from emu.build_kind import BUILD
from emu.errors import MissingPrerequisite, UserError, VmbusError
from tools.anchors import Anchor
from tools.bench_machine import machines_like
from tools.crash import failure_report
from tools.early_signals import raise_noted
from tools.exit_status import ExitStatus, noting_interruption
from tools.options import json_option
from tools.output import narrates, print_json, print_table, say

RUNS: Final = 5
SHORT_RUNS: Final = 1


def _boot(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_boot import measure

    return measure(runs, short=short)


def _ring(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_ring import measure

    return measure(runs, short=short, with_peers=peers)


def _idle(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools import bench_idle, bench_periodic

    return bench_idle.measure(runs, short=short) + bench_periodic.measure(runs, short=short)


def _discovery(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_discovery import measure

    return measure(runs, short=short)


def _doorbell(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_doorbell import measure

    return measure(runs, short=short)


def _echo(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_echo import measure

    return measure(runs, short=short, with_peers=peers)


def _scale(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_scale import measure

    return measure(runs, short=short)


def _record(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_record import measure

    return measure(runs, short=short)


def _points(runs: int, short: bool, peers: bool) -> list[Anchor]:
    from tools.bench_points import measure

    return measure(runs, short=short)


BENCHES: Final[Mapping[str, Callable[[int, bool, bool], list[Anchor]]]] = {
    "ring": _ring,
    "doorbell": _doorbell,
    "echo": _echo,
    "boot": _boot,
    "discovery": _discovery,
    "idle": _idle,
    "scale": _scale,
    "record": _record,
    "points": _points,
}
"""Name -> measurement (runs, short, with peers)."""


@click.command()
@click.argument("names", metavar=f"[{'|'.join(BENCHES)}|all]… [SCENARIO.toml]", nargs=-1, required=True)
@click.option("--peers", is_flag=True, help="Also measure other transports, where a bench has them.")
@click.option("--strict", is_flag=True, help="Exit with 1 when a goal is missed.")
@click.option("--short", is_flag=True, help="One short run of each: for its correctness, not for its figures.")
@click.option(
    "--runs", type=click.IntRange(1, 101), default=RUNS, show_default=True, help="Runs to take the median of."
)
@json_option
def bench(names: tuple[str, ...], peers: bool, strict: bool, short: bool, runs: int, as_json: bool) -> int:
    """Measure, print medians, ratios and goals.

    With a scenario the machines have its era, versions, memory, polling, faults and switches; processors and devices
    are those of each bench, whose goals are of the default.

    \b
    Example:
      vmbus-emu bench boot idle
      vmbus-emu bench echo scale scenarios/reversed.toml
      vmbus-emu bench all --json --strict
    """
    paths = [name for name in names if name.endswith(".toml")]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one scenario at a time; measure with {paths[0]} first")
    names = tuple(name for name in names if name not in paths)
    if not names:
        raise UserError(f"{paths[0]}: what is to be measured with it? Name a bench: {', '.join(BENCHES)} or all")
    chosen = list(BENCHES) if "all" in names else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        raise UserError(f"no bench is called {unknown[0]}; there are {', '.join(BENCHES)} and all")
    anchors: list[Anchor] = []
    # Before anything is measured: its load is that of others.
    described = machine_description()
    left = list(chosen)
    lacking: list[str] = []
    status = ExitStatus.FINE
    failure: VmbusError | None = None
    path = Path(paths[0]) if paths else None
    with machines_like(path), noting_interruption() as interruption:
        raise_noted()
        for name in chosen:
            if not as_json and narrates():
                say(f"measuring {name} …")
            try:
                anchors += BENCHES[name](SHORT_RUNS if short else runs, short, peers)
            except (MissingPrerequisite, UserError) as error:
                # The others can be measured all the same: a scenario may have memory enough for those.
                status = ExitStatus.USAGE if isinstance(error, UserError) else status or ExitStatus.MISSING
                lacking.append(f"{name}: {error}")
                anchors.append(Anchor.of(name, (), "-", better="higher", reason=str(error)))
            except VmbusError as error:
                # What was measured before took long enough: it is told, and then this.
                failure = error
                break
            left.remove(name)
    if as_json:
        asked = {"short": short, "peers": peers, "scenario": None if path is None else str(path)}
        told = {"machine": described, **asked, "results": [one.as_json() for one in anchors]}
        ended = failure_report(failure) if failure else {"interrupted": interruption.status is not None}
        print_json("bench", 1, {**told, **ended})
    elif len(anchors) > len(lacking):
        print_table(
            ("anchor", "median", "unit", "spread", "against", "ratio", "goal", "met"), [row(one) for one in anchors]
        )
    if short and len(anchors) > len(lacking) and not as_json:
        say(
            "vmbus-emu: these are of one short run each (--short): they show that the benches work, and measure nothing"
        )
    if not as_json:
        for line in lacking:
            say(f"vmbus-emu: {line}")
    if failure is not None:
        if not as_json:
            say(f"vmbus-emu: not measured: {', '.join(left)}")
        raise failure
    if interruption.status is not None:
        if not as_json:
            say(f"vmbus-emu: interrupted; not measured: {', '.join(left)}")
        return interruption.status
    if strict and any(one.met is False for one in anchors):
        return ExitStatus.FINDING
    return status


def row(anchor: Anchor) -> tuple[str, ...]:
    """An anchor as a line of the table."""
    against = "-"
    if anchor.against is not None:
        against = anchor.against.name + (f" {anchor.against.value:.4g}" if anchor.against.value is not None else "")
    goal = "-" if anchor.goal is None else f"{'>=' if anchor.better == 'higher' else '<='} {anchor.goal:g}"
    met = {True: "yes", False: "NO", None: anchor.reason or "-"}[anchor.met]
    return (
        anchor.name,
        "-" if anchor.value is None else f"{anchor.value:.4g}",
        anchor.unit,
        "-" if anchor.spread is None else f"{anchor.spread:.0%}",
        against,
        "-" if anchor.ratio is None else f"{anchor.ratio:.3g}",
        goal,
        met,
    )


def machine_description() -> dict[str, Any]:
    """What it ran on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "build": BUILD,
        "load_1m": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
