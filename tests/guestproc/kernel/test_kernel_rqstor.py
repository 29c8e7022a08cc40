"""Request ids: last in, first out, and nothing the host makes up is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestproc.kernel.rqstor import VMBUS_RQST_ADDR_ANY, VMBUS_RQST_ERROR, Requestor
from tests.guestproc.kernel.fakes import FREE_GPA, Lone


class World:
    """A requestor of a few ids."""

    def __init__(self, size: int = 4) -> None:
        self.lone = Lone()
        self.actor = self.lone.actor
        self.requestor = Requestor(self.lone.ram, FREE_GPA, size)
        self.requestor.init()


def test_ids_start_at_one_and_come_in_order() -> None:
    """A fresh requestor hands out 1, 2, 3, ...; when all are out there is none."""
    world = World()

    ids = [world.requestor.next_request_id(world.actor, 0x1000 + n) for n in range(5)]

    assert ids == [1, 2, 3, 4, VMBUS_RQST_ERROR]
    assert world.requestor.outstanding() == 4


def test_the_id_that_came_back_last_goes_out_first() -> None:
    """The free list is a stack."""
    world = World()
    for address in range(4):
        world.requestor.next_request_id(world.actor, address)

    assert world.requestor.request_addr(world.actor, 2) == 1
    assert world.requestor.request_addr(world.actor, 4) == 3

    assert [world.requestor.next_request_id(world.actor, 9) for _ in range(2)] == [4, 2]


@pytest.mark.parametrize("trans_id", [0, 3, 5, 1 << 40, (1 << 64) - 1])
def test_an_id_that_is_not_out_is_an_error(trans_id: int) -> None:
    """0, one that was never handed out, and any beyond the array."""
    world = World()
    for _ in range(2):
        world.requestor.next_request_id(world.actor, 7)

    assert world.requestor.request_addr(world.actor, trans_id) == VMBUS_RQST_ERROR
    assert world.requestor.outstanding() == 2


def test_a_completion_counts_once() -> None:
    """The second one for the same id finds its bit clear."""
    world = World()
    world.requestor.next_request_id(world.actor, 0xABC)

    assert world.requestor.request_addr(world.actor, 1) == 0xABC
    assert world.requestor.request_addr(world.actor, 1) == VMBUS_RQST_ERROR


def test_a_match_takes_the_id_back_only_for_its_address() -> None:
    """Another address leaves it out, and learns whose it is."""
    world = World()
    world.requestor.next_request_id(world.actor, 0xABC)

    assert world.requestor.request_addr_match(world.actor, 1, 0xDEF) == 0xABC
    assert world.requestor.outstanding() == 1
    assert world.requestor.request_addr_match(world.actor, 1, 0xABC) == 0xABC
    assert world.requestor.outstanding() == 0


def test_the_layout_is_the_documented_one() -> None:
    """Lock, size, head, slots, bitmap: slot i is followed by i + 1, the last by none."""
    world = World(3)

    words = world.lone.ram.words64(FREE_GPA, 6).tolist()

    assert words == [3 << 32, 0, 1, 2, (1 << 64) - 1, 0]
    assert Requestor.footprint(3) == 48
    assert Requestor.footprint(65) == 16 + 65 * 8 + 16


@given(st.integers(1, 70), st.lists(st.integers(0, 80), max_size=120))
def test_the_requestor_matches_a_model(size: int, choices: list[int]) -> None:
    """Even choices ask for an id, odd ones give back whatever id the choice names, out or not."""
    world = World(size)
    stack = list(range(size, 0, -1))
    out: dict[int, int] = {}
    for number, choice in enumerate(choices):
        if choice % 2 == 0:
            expected = stack.pop() if stack else VMBUS_RQST_ERROR
            assert world.requestor.next_request_id(world.actor, number) == expected
            if expected != VMBUS_RQST_ERROR:
                out[expected] = number
        else:
            trans_id = choice // 2
            address = out.pop(trans_id, VMBUS_RQST_ERROR)
            assert world.requestor.request_addr_match(world.actor, trans_id, VMBUS_RQST_ADDR_ANY) == address
            if address != VMBUS_RQST_ERROR:
                stack.append(trans_id)
    assert world.requestor.outstanding() == len(out)
