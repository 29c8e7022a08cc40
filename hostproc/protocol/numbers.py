"""Numbers that are given out, the lowest free one first: relids and monitor ids."""

from __future__ import annotations

from heapq import heappop, heappush


class LowestFree:
    """The numbers from `first` to `last`; giving one out costs the same however many are taken."""

    __slots__ = ("_first", "_given_back", "_last", "_untouched")

    def __init__(self, first: int, last: int) -> None:
        self._first = first
        self._last = last
        self._untouched = first
        self._given_back: list[int] = []

    def take(self) -> int | None:
        """Return the lowest number that nobody has, or None when there is none."""
        if self._given_back:
            return heappop(self._given_back)
        if self._untouched > self._last:
            return None
        self._untouched += 1
        return self._untouched - 1

    def give_back(self, number: int) -> None:
        """Take `number` back; it was given out."""
        assert self._first <= number < self._untouched, number
        heappush(self._given_back, number)
