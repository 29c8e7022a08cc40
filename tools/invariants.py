"""The rules that a recording alone can decide: what a rule is, and how the records go through all of them once.

A rule is one invariant of the catalogue (docs/seeing.md lists them by number). It is fed the records whose events it
names, in the order of time, and says at once or at the end what breaks it, with the records that show it.

What is not decided is said, too: a rule that something must have happened needs an *orderly end* (the hypervisor and
the processors ended of their own accord), and most rules need every record, so where some were dropped, or the file was
cut off, they are undecided. Records of two actors are ordered by time only as well as the clock and a pre-emption
between doing and recording allow: so no rule depends on that order where the two are not bound to each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from emu.control import ActorKind
from emu.layout import ExitOperation
from emu.recording import Recording, TraceRecord
from tools.nouns import counted

MOST_SHOWN: Final = 100
"""Violations of one rule that are kept; the rest is counted."""

Feed = Callable[[TraceRecord], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that does not hold: which, in what way, and what shows it.

    Of a recording that are records; of a settled machine the channel (0: none) and the actors, by name.
    """

    number: int
    text: str
    records: tuple[TraceRecord, ...] = ()
    relid: int = 0
    actors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The rule as the catalogue calls it."""
        return f"INV-{self.number:02}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of a recorded machine beside its records: `vp_indices[position]`."""

    vp_indices: Sequence[int]

    def position(self, record: TraceRecord) -> int:
        """The VP page that a record's processor has; -1 for none."""
        if record.vp is None or record.vp not in self.vp_indices:
            return -1
        return self.vp_indices.index(record.vp)


class Rule(ABC):
    """One invariant. Subclasses name their events in `feeds` and may say more in `end`."""

    NUMBER: ClassVar[int]
    TITLE: ClassVar[str]
    NEEDS_ALL: ClassVar[bool] = True
    """Whether a missing record may look like a violation."""
    AT_END: ClassVar[bool] = False
    """Whether everything it finds is found at an orderly end."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.violations: list[Finding] = []
        self.count = 0

    @abstractmethod
    def feeds(self) -> Mapping[str, Feed]:
        """What is to be fed with the records of which event."""

    def end(self) -> None:  # noqa: B027 - most rules have said everything before
        """The recording ended in order: say what should have happened by now."""

    def guest_died(self) -> None:  # noqa: B027 - what a rule asks of the host alone goes on
        """Another guest begins, the one before it without a farewell: what that was in the midst of is nobody's."""

    def rest(self) -> None:  # noqa: B027 - most rules have nothing to say of that
        """The machine was left as it is, and nothing more happens in it by itself: say who sleeps for ever."""

    def violate(self, text: str, *records: TraceRecord) -> None:
        """Note a violation."""
        self.count += 1
        if self.count <= MOST_SHOWN:
            self.violations.append(Finding(self.NUMBER, text, records))


@dataclass(slots=True)
class Verdict:
    """What came of one rule: held, broken (with its violations), or undecided and why."""

    rule: type[Rule]
    violations: list[Finding] = field(default_factory=list)
    count: int = 0
    undecided: str = ""

    @property
    def name(self) -> str:
        """The rule as the catalogue calls it."""
        return f"INV-{self.rule.NUMBER:02}"


def is_host(record: TraceRecord) -> bool:
    """Whether the hypervisor made a record."""
    return record.actor.kind == ActorKind.HYPERVISOR.name


def judge(
    rules: Iterable[type[Rule]],
    records: Iterable[TraceRecord],
    machine: Machine,
    *,
    missing: str = "",
    settled: bool = False,
) -> list[Verdict]:
    """Send the records through all rules; `missing` says what of the recording is not there, if anything.

    `settled`: the machine runs still, and nothing will happen in it unless somebody outside does something. What should
    have happened has by now, as at an orderly end.
    """
    made = [rule(machine) for rule in rules if not (missing and rule.NEEDS_ALL)]
    feeds: dict[str, list[Feed]] = {}
    for rule in made:
        for name, feed in rule.feeds().items():
            feeds.setdefault(name, []).append(feed)
    ending = _Ending()
    for record in records:
        ending.take(record)
        if begins_a_guest(record):
            for rule in made:
                rule.guest_died()
        for feed in feeds.get(record.event.name, ()):
            feed(record)
    orderly = ending.orderly or settled
    if orderly and not missing:
        for rule in made:
            rule.end()
            if settled:
                rule.rest()
    by_class = {type(rule): rule for rule in made}
    return [_verdict(one, by_class.get(one), missing, orderly=orderly) for one in rules]


def _verdict(kind: type[Rule], rule: Rule | None, missing: str, *, orderly: bool) -> Verdict:
    if rule is None:
        return Verdict(kind, undecided=missing)
    if kind.AT_END and not orderly:
        return Verdict(kind, undecided="the machine did not end in order, or not within the recording")
    return Verdict(kind, rule.violations, rule.count)


def begins_a_guest(record: TraceRecord) -> bool:
    """Whether a guest has attached to the host: the first thing that it does, and nothing of the one before is left."""
    return record.event.name == "vmexit" and record.values[0] == ExitOperation.ATTACH


class _Ending:
    """Whether the hypervisor, and every processor that began, said that it ends.

    A processor whose process was killed, and that another process is since, need not: that one says so.
    """

    def __init__(self) -> None:
        self._running: dict[int, int] = {}
        """By processor: who is it."""
        self._host_ended = False

    def take(self, record: TraceRecord) -> None:
        """Look at one record."""
        name, actor = record.event.name, record.actor
        if name == "process_start" and actor.kind == ActorKind.VCPU.name:
            self._running[actor.cpu] = actor.slot
        elif name == "process_stop":
            if self._running.get(actor.cpu) == actor.slot:
                del self._running[actor.cpu]
            self._host_ended |= is_host(record)

    @property
    def orderly(self) -> bool:
        """Whether all of them have."""
        return self._host_ended and not self._running


def missing_of(recording: Recording) -> str:
    """What of a recording is not there: "" for a whole one."""
    if recording.damage:
        return "the recording is damaged"
    if recording.flight and recording.begins_late:
        return "a flight recorder keeps the last records only"
    if recording.dropped:
        return f"{counted(recording.dropped, 'record was', 'records were')} dropped"
    return ""
