"""What can go wrong, sorted by whose fault it is.

The peer's fault (`ProtocolViolation`) is refused, counted and traced; nobody's fault (`RingFull`) is part of an
interface; the user's (`UserError`) is one clear line; ours is an `assert`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class VmbusError(Exception):
    """Root of everything the emulator raises on purpose."""


class ProtocolViolation(VmbusError):
    """The peer broke a rule: refuse what it sent, count it under `rule`, go on.

    `rule` is a short kebab-case name for counting, `field` the offending field and `value` what it held.
    """

    def __init__(self, text: str, *, rule: str, field: str = "", value: int | str | bytes | None = None) -> None:
        super().__init__(text)
        self.rule = rule
        self.field = field
        self.value = value


class RingFull(VmbusError):
    """A packet needs more room than the ring has free; both numbers are bytes, trailer included."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"ring full: packet needs {needed} bytes, {free} free")
        self.needed = needed
        self.free = free


class GeneralProtection(VmbusError):
    """A #GP: the guest touched a register in a way the processor refuses (a fault, not a status)."""

    def __init__(self, operation: str, register: int, value: int = 0) -> None:
        super().__init__(f"#GP: {operation} of {register:#x} (value {value:#x})")
        self.register = register
        self.value = value


class MachineStopping(VmbusError):
    """The machine's state word says STOPPING; whoever waits gives up and leaves."""


class OutOfMemory(VmbusError):
    """No memory for what was asked: guest RAM is used up, or the tmpfs behind it is full."""


class DeadlinePassed(VmbusError):
    """A wait ended by its deadline; `what` names the thing waited for."""

    def __init__(self, what: str, timeout_ns: int) -> None:
        super().__init__(f"{what}: no answer within {timeout_ns / 1e9:.3g} s")
        self.what = what
        self.timeout_ns = timeout_ns
        self.recording: Path | None = None
        """The machine's last seconds before it, where somebody saved them."""
        self.finding: Path | None = None
        """The folder in which it was kept as a finding, if it was."""


class OwnLimit(DeadlinePassed):
    """A time limit that a user set has passed before `what` ended: nothing hung, so it is no finding."""

    def __init__(self, what: str, limit_s: float) -> None:
        super().__init__(what, 0)
        self.args = (f"{what} did not end within the --time-limit of {limit_s:g} s",)


class NotOpened(VmbusError):
    """A channel that should be open is not, and it is known that it will not be: why, in one line; exit code 1."""

    def __init__(self, relid: int, why: str) -> None:
        super().__init__(f"relid {relid} will not be open: {why}")
        self.relid = relid
        self.why = why
        self.finding: Path | None = None
        """As of a `DeadlinePassed`."""


class UserError(VmbusError):
    """Somebody typed something wrong: one line that names the thing and the cure; exit code 2."""


class NameTaken(UserError):
    """A shared object of that name exists: it belongs to whoever made it."""


class MissingPrerequisite(VmbusError):
    """This computer lacks something: one line that says what and how to get it; exit code 3."""
