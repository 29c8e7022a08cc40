"""The one guest that is connected, or nobody; and the effects of the input that is being handled.

What channels and GPADLs share: to whom messages go, in which version, and where decisions are collected.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Protocol

from emu.errors import ProtocolViolation
from emu.wire.messages import MESSAGES, Message
from emu.wire.versions import FeatureFlags
from hostproc.protocol.effects import Effect, Refused, SendMessage
from hostproc.protocol.policy import Policy
from hostproc.protocol.states import ChannelState, GpadlState
from hostproc.protocol.versions import VERSIONS, VMBUS_SINT, Limits, Version

NOBODY: Final = VERSIONS[min(VERSIONS)]


class Link(Enum):
    """Whether a guest is connected."""

    DISCONNECTED = "disconnected"
    CONNECTED = "connected"
    DISCONNECTING = "disconnecting"
    """Devices are closing; the guest is told nothing of it."""


class StateWatcher(Protocol):
    """Whoever wants to know of every change of state; it decides nothing."""

    def channel(self, relid: int, generation: int, old: ChannelState, new: ChannelState | None) -> None:
        """A channel changed its state; None: its record is deleted."""

    def gpadl(self, relid: int, handle: int, old: GpadlState, new: GpadlState | None) -> None:
        """A GPADL did."""


class Session:
    """The connection's facts, and the effects so far."""

    __slots__ = (
        "_effects",
        "_held",
        "_known",
        "features",
        "limits",
        "link",
        "monitored",
        "offers_requested",
        "paused",
        "policy",
        "version",
        "vp_index",
        "watcher",
    )

    def __init__(self, limits: Limits, policy: Policy) -> None:
        self.limits = limits
        self.policy: Policy = policy
        self.link = Link.DISCONNECTED
        self.version = NOBODY
        self.features = FeatureFlags(0)
        self.vp_index = 0
        self.monitored = False
        self.offers_requested = False
        self.paused = False
        self.watcher: StateWatcher | None = None
        self._known: frozenset[type[Message]] = frozenset()
        self._held: list[Effect] = []
        self._effects: list[Effect] = []

    def connect(self, version: Version, features: FeatureFlags, vp_index: int, *, monitored: bool) -> None:
        """Begin a connection; `monitored`: the guest gave monitor pages."""
        self.link = Link.CONNECTED
        self.version = version
        self.features = features
        self.vp_index = vp_index
        self.monitored = monitored
        self._known = frozenset(
            spec.cls for spec in MESSAGES.values() if spec.least_version <= version.number and spec.feature in features
        )

    def disconnecting(self) -> None:
        """From here on the guest is sent nothing; what was held back for it is dropped."""
        self.link = Link.DISCONNECTING
        self.offers_requested = False
        self.paused = False
        self._held.clear()

    def disconnected(self) -> None:
        """Nobody is connected."""
        self.link = Link.DISCONNECTED
        self.features = FeatureFlags(0)
        self.monitored = False

    def resume(self) -> None:
        """Send what was held back while the guest had us pause."""
        self.paused = False
        self._effects += self._held
        self._held.clear()

    @property
    def connected(self) -> bool:
        """Whether there is a guest to send to."""
        return self.link is Link.CONNECTED

    def knows(self, message: type[Message]) -> bool:
        """Whether the negotiated version and features have this message."""
        return message in self._known

    def emit(self, effect: Effect) -> None:
        """Decide something."""
        self._effects.append(effect)

    def send(self, message: Message) -> None:
        """Tell the connected guest, if there is one and its version knows the message."""
        if self.link is not Link.CONNECTED or type(message) not in self._known:
            return
        effect = SendMessage(message, self.vp_index, VMBUS_SINT)
        if self.paused:
            self._held.append(effect)
        else:
            self._effects.append(effect)

    def refuse(self, rule: str, text: str, field: str = "", value: int | str | bytes | None = None) -> None:
        """Record that the guest broke `rule`."""
        self._effects.append(Refused(rule, text, field, value))

    def ignore(self, rule: str, text: str, field: str = "", value: int | str | bytes | None = None) -> None:
        """Record something legal that led to nothing."""
        self._effects.append(Refused(rule, text, field, value, legal=True))

    def refuse_violation(self, violation: ProtocolViolation) -> None:
        """Record what a parser or a state table found."""
        self._effects.append(Refused(violation.rule, str(violation), violation.field, violation.value))

    def take_effects(self) -> list[Effect]:
        """Return the decisions since the last call."""
        effects, self._effects = self._effects, []
        return effects
