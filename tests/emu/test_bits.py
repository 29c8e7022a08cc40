"""The table of set bits (`emu.bits`)."""

from hypothesis import given
from hypothesis import strategies as st

from emu.bits import MOST_WORDS, BitNumbers


@given(st.sets(st.integers(min_value=0, max_value=63)))
def test_numbers_of_a_word_are_its_set_bits(numbers: set[int]) -> None:
    """Any word gives its set bits, each once and the lowest first."""
    assert BitNumbers()[sum(1 << number for number in numbers)] == tuple(sorted(numbers))


def test_table_does_not_grow_without_bound() -> None:
    """A peer that writes another word each time costs no more memory than `MOST_WORDS` of them."""
    table = BitNumbers()
    for word in range(2 * MOST_WORDS + 1):
        assert len(table[word]) == word.bit_count()

    assert len(table) <= MOST_WORDS
