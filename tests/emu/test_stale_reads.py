"""The model of weak memory: what a load may be given, and what acquire and release take away from that."""

from __future__ import annotations

import pytest

from emu.stale_reads import KEPT, StaleReads, TooOld


def published(*, release: bool = True) -> tuple[StaleReads, int]:
    """Bytes, then an index that covers newer bytes; and the number of the old bytes' store."""
    shim = StaleReads()
    old = shim.store("host", "bytes", "old")
    shim.store("host", "index", 0)
    shim.store("host", "bytes", "new")
    shim.store("host", "index", 8, release=release)
    return shim, old


@pytest.mark.parametrize(("release", "acquire"), [(False, False), (True, False), (False, True)])
def test_new_index_and_old_bytes(release: bool, acquire: bool) -> None:
    """D5: where one of the two ends does without its half, a load of the bytes may be given what was there before."""
    shim, old = published(release=release)
    assert shim.load("guest", "index", acquire=acquire) == 8
    assert shim.load("guest", "bytes", chosen=old) == "old"
    assert shim.load("guest", "bytes") == "new"


def test_acquire_of_what_was_released_refuses_the_old_bytes() -> None:
    """The choice is refused by number, and the newest value is there."""
    shim, old = published()
    assert shim.load("guest", "index", acquire=True) == 8
    with pytest.raises(TooOld) as refused:
        shim.load("guest", "bytes", chosen=old)
    assert (refused.value.chosen, refused.value.oldest) == (old, 3)
    assert shim.load("guest", "bytes") == "new"


def test_one_word_never_runs_backwards_for_one_actor() -> None:
    """Who has seen the new value is not given the old one; another may be, and who stored it never is."""
    shim, old = published()
    assert shim.load("guest", "bytes") == "new"
    for actor in ("guest", "host"):
        with pytest.raises(TooOld):
            shim.load(actor, "bytes", chosen=old)
    assert shim.load("other", "bytes", chosen=old) == "old"


def test_no_more_than_the_last_values_are_kept() -> None:
    """Whoever was away for long finds none of those before."""
    shim = StaleReads()
    numbers = [shim.store("host", "word", n) for n in range(KEPT + 1)]
    with pytest.raises(TooOld):
        shim.load("guest", "word", chosen=numbers[0])
    assert shim.load("guest", "word", chosen=numbers[1]) == 1
