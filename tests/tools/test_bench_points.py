"""What `bench points` compares with: a machine that runs no schedule has no sync point on its packet path."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from tests.tools.plain_path import PARTS
from tools.testing import running

ON_THE_PATH = (
    "emu.interrupts",
    "emu.ring_consumer",
    "emu.ring_producer",
    "guestproc.drivers.echo",
    "guestproc.vmbus.chan_sched",
    "guestproc.vmbus.isr",
    "guestproc.vmbus.packets",
    "hostproc.devices.channel",
    "hostproc.devices.echo",
)
"""Where a packet and its interrupt pass, on both ends: none of these modules knows of points."""


def code_of(module: ModuleType) -> Iterator[CodeType]:
    """Every function's code of a module, those within classes and within functions as well."""
    for one in vars(module).values():
        members = vars(one).values() if isinstance(one, type) else (one,)
        for member in members:
            if isinstance(member, FunctionType) and member.__module__ == module.__name__:
                yield from nested(member.__code__)


def nested(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@pytest.mark.parametrize("name", ON_THE_PATH)
def test_no_code_on_the_packet_path_asks_for_a_point(name: str) -> None:
    """No function there loads `armed`, calls `reach` or `hold` of points."""
    codes = list(code_of(importlib.import_module(name)))

    assert codes
    assert [code.co_name for code in codes if {"armed", "reach", "points", "_points"} & set(code.co_names)] == []


def test_processor_of_a_plain_machine_is_made_of_plain_parts() -> None:
    """In the process of a vCPU, seen from the callback that a packet came to: halt, rings, event flags, no tickets."""
    with running(plugins=[Path(__file__).with_name("plain_path.py")], devices=["plain-path"], vcpus=1) as machine:
        machine.wait_for(lambda: machine.driver_state("plain-path")[len(PARTS)] == 1, "a packet's way back")
        seen = machine.driver_state("plain-path")

    assert [part for part, plain in zip(PARTS, seen, strict=False) if not plain] == []
