"""Names of machines for tests: unique, and nothing of them is left afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from emu.ipc.segments import objects_of, unlink_objects
from emu.machine import Machine

MakeMachine = Callable[..., Machine]

_numbers = count(1)


@pytest.fixture
def machine_name() -> Iterator[str]:
    """A name that no other test or user has; whatever carries it is removed at the end."""
    name = f"t{os.getpid()}-{next(_numbers)}"
    yield name
    unlink_objects(name)
    assert objects_of(name) == []


@pytest.fixture
def make_machine(machine_name: str) -> Iterator[MakeMachine]:
    """Makes the machine of that name (one in a test) with a few MiB of RAM and two VPs unless told otherwise."""
    made: list[Machine] = []

    def make(*, vp_indices: list[int] | None = None, config: dict[str, Any] | None = None) -> Machine:
        made.append(
            Machine.create(
                machine_name,
                config or {},
                ram_bytes=4 << 20,
                vp_indices=[0, 1] if vp_indices is None else vp_indices,
                cpuid=[],
            )
        )
        return made[-1]

    yield make
    for machine in made:
        machine.close()
