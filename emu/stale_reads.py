"""Which old values a processor with weak memory ordering may still be given: views, as a model of it.

x86-64 and CPython hide most reorderings, so what an acquire prevents cannot be seen on them by itself. Here each word
keeps its last values with the number of the store that made them, and each actor has a *view*: for each word the
oldest store that it may still be given.

    a plain load      may be given any kept value that is not older than the view, as somebody chose; the newest if
                      nobody did. The view moves up to it: one word never runs backwards for one actor
    a release store   attaches its actor's view to the value
    an acquire load   joins the view that is attached to what it reads into its actor's
    an own store      moves the own view

So once an actor has acquired what was released behind a store, an older value is refused (`TooOld`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final

from emu.errors import VmbusError
from emu.values import valueclass

KEPT: Final = 4
"""Values of a word that are kept."""


class TooOld(VmbusError):
    """A load may not be given the value that was chosen for it: the actor's view is beyond that."""

    def __init__(self, word: str, chosen: int, oldest: int) -> None:
        super().__init__(f"{word} as of store {chosen} is not to be seen any more: the view is at store {oldest}")
        self.chosen = chosen
        self.oldest = oldest


@valueclass()
class Stored:
    """One value of a word: the number of the store, and the view that a release attached to it."""

    number: int
    value: Any
    released: Mapping[str, int] = field(default_factory=dict)


class StaleReads:
    """The words that some actors share; words and actors are named. A word begins with its first store."""

    def __init__(self) -> None:
        self._number = 0
        self._kept: Final[dict[str, deque[Stored]]] = {}
        self._views: Final[dict[str, dict[str, int]]] = {}

    def store(self, actor: str, word: str, value: Any, *, release: bool = False) -> int:
        """A store; its number."""
        self._number += 1
        view = self._view(actor)
        view[word] = self._number
        stored = Stored(self._number, value, dict(view) if release else {})
        self._kept.setdefault(word, deque(maxlen=KEPT)).append(stored)
        return self._number

    def load(self, actor: str, word: str, *, acquire: bool = False, chosen: int = 0) -> Any:
        """A load: the newest value, or that of the store `chosen`. TooOld: that may not be seen by this actor."""
        kept, view = self._kept[word], self._view(actor)
        oldest = max(view.get(word, 0), kept[0].number)
        stored = kept[-1]
        if chosen:
            found = [one for one in kept if one.number == chosen]
            if chosen < oldest or not found:
                raise TooOld(word, chosen, oldest)
            stored = found[0]
        view[word] = max(oldest, stored.number)
        if acquire:
            for other, number in stored.released.items():
                view[other] = max(view.get(other, 0), number)
        return stored.value

    def _view(self, actor: str) -> dict[str, int]:
        return self._views.setdefault(actor, {})
