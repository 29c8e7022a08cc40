"""What the host refuses, as records: the counters and the list of refusals, with a record for each one."""

from __future__ import annotations

from collections import Counter

from emu.tracing import E_IGNORED, E_REFUSED, Recorder, refused_words
from hostproc.protocol.effects import Refused
from hostproc.protocol.refusals import Refusals


class RecordedCounter(Counter[str]):
    """Counts by rule what led to nothing; each one more is a record (`ignored`), whose value is the new count."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __setitem__(self, rule: str, count: int) -> None:
        super().__setitem__(rule, count)
        self._recorder.record(E_IGNORED, *refused_words(rule, count))


class RecordedRefusals(Refusals):
    """Refusals of the server and the rings, each with its rule and the value that broke it."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def add(self, refusal: Refused, times: int = 1) -> None:
        """Count so many, and record them as one."""
        super().add(refusal, times)
        value = refusal.value if isinstance(refusal.value, int) else 0
        self._recorder.record(E_IGNORED if refusal.legal else E_REFUSED, *refused_words(refusal.rule, value))
