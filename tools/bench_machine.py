"""What the machines of a bench are like: the default, or what a scenario says.

That is era, versions, memory, polling, faults and switches. Processors and devices are the bench's own, and polling
where it compares ways to poll. A name is of no use, as several machines run at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from emu.scenario import DeviceSpec, Scenario
from tools.guest_death import refuse_guest_deaths
from tools.guest_versions import check_versions
from tools.plugins import scenario_of

_asked: list[Path] = []
"""The scenario of the bench that runs now, if it was given one."""


@contextmanager
def machines_like(path: Path | None) -> Iterator[None]:
    """Within the block `bench_scenario` begins with this file; UserError for one that no bench can run on."""
    if path is None:
        yield
        return
    scenario = scenario_of(path)
    refuse_guest_deaths(scenario, "bench")
    check_versions(scenario)
    _asked.append(path)
    try:
        yield
    finally:
        _asked.pop()


def asked_scenario() -> Path | None:
    """The file that was asked for, for what is run by its command line."""
    return _asked[-1] if _asked else None


def bench_scenario(
    *,
    vcpus: int | None = None,
    devices: Sequence[DeviceSpec] = (),
    poll: str | None = None,
    plugins: Iterable[Path] = (),
) -> Scenario:
    """The scenario of a machine to measure, with the default's processors and devices where none are said.

    They are on as many nodes as the file says, or on one each where they are fewer than that. UserError where its
    machine cannot have so many processors.
    """
    scenario, default = scenario_of(asked_scenario(), plugins), Scenario.default()
    count = vcpus or default.machine.vcpus
    nodes = min(scenario.machine.numa, count)
    scenario = replace(scenario, machine=replace(scenario.machine, name=None, numa=nodes))
    return scenario.with_overrides(vcpus=count, poll=poll, devices=devices or default.device_specs)
