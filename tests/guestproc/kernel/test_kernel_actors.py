"""Actor numbers: a slot and a generation in one word."""

from __future__ import annotations

import pytest

from guestproc.kernel.actors import NOBODY, actor_generation, actor_number, actor_slot


@pytest.mark.parametrize(("slot", "generation"), [(0, 1), (4095, 1), (17, (1 << 20) - 1)])
def test_a_number_gives_slot_and_generation_back(slot: int, generation: int) -> None:
    """Both parts survive the packing, and no actor is nobody."""
    number = actor_number(slot, generation)

    assert (actor_slot(number), actor_generation(number)) == (slot, generation)
    assert number != NOBODY and number < 1 << 32


@pytest.mark.parametrize(("slot", "generation"), [(4096, 1), (-1, 1), (0, 0), (0, 1 << 20)])
def test_a_number_that_does_not_fit_is_refused(slot: int, generation: int) -> None:
    """A slot or generation out of range would be another actor's number."""
    with pytest.raises(AssertionError):
        actor_number(slot, generation)
