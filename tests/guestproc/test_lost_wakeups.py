"""No doorbell between host and processors is lost, in whatever way they poll, halt or compute (`wakeup_hunt`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from emu.ipc.segments import objects_of, unlink_objects
from tests.guestproc.wakeup_hunt import POLLS, hunt, main, new_machine

SEED = int(os.environ.get("WAKEUP_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
"""A run is repeated with the seed that it printed, in WAKEUP_SEED."""
MOST_HUNTS = 30


@pytest.fixture
def name() -> Iterator[str]:
    """A machine's name, of which nothing is left."""
    name = f"hunt{os.getpid()}"
    yield name
    unlink_objects(name)
    assert objects_of(name) == []


@pytest.mark.parametrize(("poll", "vcpus"), list(zip(POLLS, (3, 1, 3), strict=True)))
def test_no_doorbell_is_lost(name: str, poll: str | int, vcpus: int) -> None:
    """Rung at random moments, halted or not: every answer comes, no token and no request is left.

    Hunted until a processor was met both blocked and computing, which a quick computer that polls owes nobody.
    """
    seen: Counter[str] = Counter()
    for seed in range(SEED, SEED + MOST_HUNTS):
        print(f"seed {seed}")
        machine = new_machine(name, poll, vcpus)
        try:
            hunted = hunt(machine, poll, 2_400, seed)
        finally:
            machine.close()
            unlink_objects(name)

        assert hunted.doorbells >= 2_400
        assert (hunted.tokens, hunted.requests) == ([], [])
        seen.update(hunted.counters)
        if seen["preemptions"] and seen["blocks"]:
            return
    raise AssertionError(f"in {MOST_HUNTS} hunts {seen['preemptions']} preemptions, {seen['blocks']} blocks")


@pytest.mark.soak
@pytest.mark.timeout(7_200)
def test_no_doorbell_of_ten_millions_is_lost() -> None:
    """With a million real blocks among them, and more processors than cores."""
    assert main(["--seed", str(SEED)]) == 0
