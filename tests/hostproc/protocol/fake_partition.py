"""A server with a guest and devices around it, for tests: the devices answer at once, or when the test says.

Every effect goes through a ledger of what the outside has open, so that each test also shows that the effects
make sense to whoever carries them out: nothing is opened twice, closed twice, or left behind after a
disconnect.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import count
from uuid import UUID

from emu.wire.messages import (
    InitiateContact,
    Message,
    OfferChannel,
    OpenChannel,
    RelidReleased,
    RequestOffers,
    VersionResponse,
    gpadl_messages,
)
from emu.wire.versions import VERSION_WIN10_V5, VERSION_WIN10_V5_3
from hostproc.protocol.effects import (
    BindEvent,
    CloseDevice,
    CloseDoorbell,
    Connected,
    Disconnected,
    DropDevice,
    Effect,
    MapGpadl,
    OpenDevice,
    OpenDoorbell,
    Refused,
    RetargetEvent,
    SendMessage,
    UnbindEvent,
    UnmapGpadl,
)
from hostproc.protocol.offers import OfferParameters
from hostproc.protocol.policy import DEFAULT_POLICY, Policy
from hostproc.protocol.server import Server
from hostproc.protocol.states import ChannelState
from hostproc.protocol.versions import Limits

CLASS = UUID("11111111-0000-4000-8000-000000000000")
RING = 0xE1E10
RAM_BYTES = 64 << 20


def instance(number: int) -> UUID:
    """Return the instance GUID of the n-th test device."""
    return UUID(int=0x22222222_0000_4000_8000_000000000000 + number)


def parameters(number: int = 0, **changes: object) -> OfferParameters:
    """Describe the n-th test device."""
    fields: dict[str, object] = {"if_type": CLASS, "if_instance": instance(number), **changes}
    return OfferParameters(**fields)  # type: ignore[arg-type]


class Ledger:
    """What the effects so far have opened and not closed; asserts that each effect is possible."""

    def __init__(self) -> None:
        self.gpadls: set[tuple[int, int]] = set()
        self.opened: dict[int, str] = {}
        self.bound: set[int] = set()
        self.doorbells: dict[int, int] = {}
        self.dropped: set[int] = set()

    def enter(self, effect: Effect) -> None:
        """Follow one effect."""
        key = getattr(effect, "key", None)
        assert key not in self.dropped, f"{effect} for a device that is gone"
        match effect:
            case MapGpadl():
                assert (effect.key, effect.gpadl) not in self.gpadls
                self.gpadls.add((effect.key, effect.gpadl))
            case UnmapGpadl():
                assert (effect.key, effect.gpadl) in self.gpadls
            case OpenDevice():
                assert effect.key not in self.opened and effect.key in self.doorbells
                assert (effect.key, effect.ring_gpadl) in self.gpadls
                self.opened[effect.key] = "opening"
            case CloseDevice():
                assert self.opened[effect.key] == "open" and effect.key not in self.bound
                self.opened[effect.key] = "closing"
            case DropDevice():
                self.dropped.add(effect.key)
                self.opened.pop(effect.key, None)
                self.gpadls = {pair for pair in self.gpadls if pair[0] != effect.key}
                assert effect.key not in self.bound and effect.key not in self.doorbells
            case BindEvent():
                assert effect.key not in self.bound
                self.bound.add(effect.key)
            case RetargetEvent():
                assert effect.key in self.bound
            case UnbindEvent():
                self.bound.remove(effect.key)
            case OpenDoorbell():
                assert effect.key not in self.doorbells
                self.doorbells[effect.key] = effect.connection_id
            case CloseDoorbell():
                assert self.doorbells.pop(effect.key) == effect.connection_id
            case Disconnected():
                assert not self.gpadls and not self.opened and not self.bound and not self.doorbells
            case _:
                pass


class World:
    """A server, its devices, and what it said.

    `quick`: devices answer at once. Otherwise `waiting` holds the effects that they have not answered.
    """

    def __init__(self, *, limits: Limits | None = None, policy: Policy = DEFAULT_POLICY, quick: bool = True) -> None:
        self.server = Server(limits or Limits(vp_count=4, ram_bytes=RAM_BYTES), policy)
        self.ledger = Ledger()
        self.quick = quick
        self.waiting: list[Effect] = []
        self.effects: list[Effect] = []
        self._keys = count(100)

    # -- what goes in -------------------------------------------------------------------------------

    def take(self, effects: Iterable[Effect]) -> None:
        """Carry effects out, and what follows from them."""
        queue = deque(effects)
        while queue:
            effect = queue.popleft()
            self.ledger.enter(effect)
            self.effects.append(effect)
            if isinstance(effect, DropDevice):
                self.waiting = [other for other in self.waiting if getattr(other, "key", None) != effect.key]
            if not isinstance(effect, MapGpadl | UnmapGpadl | OpenDevice | CloseDevice | RetargetEvent):
                continue
            if self.quick:
                queue.extend(self._answer(effect, yes=True))
            else:
                self.waiting.append(effect)

    def answer(self, kind: type[Effect], *, yes: bool = True) -> None:
        """Let a device answer the oldest effect of this kind that waits."""
        effect = next(effect for effect in self.waiting if isinstance(effect, kind))
        self.waiting.remove(effect)
        self.take(self._answer(effect, yes=yes))

    def post(self, *messages: Message, connection_id: int = 1) -> None:
        """Let the guest post messages."""
        for message in messages:
            self.post_bytes(message.pack(), connection_id=connection_id)

    def post_bytes(self, payload: bytes, connection_id: int = 1) -> None:
        """Let the guest post bytes."""
        self.take(self.server.receive(payload, connection_id=connection_id))

    def offer(self, number: int = 0, **changes: object) -> int:
        """Offer the n-th test device; return its key."""
        key = next(self._keys)
        self.take(self.server.offer(key, parameters(number, **changes)))
        return key

    def revoke(self, key: int) -> None:
        """Take a device away."""
        self.take(self.server.revoke(key))

    # -- what comes out -----------------------------------------------------------------------------

    def sent(self) -> list[Message]:
        """Return the messages to the guest since the last look; effects and refusals go with them."""
        messages = [effect.message for effect in self.effects if isinstance(effect, SendMessage)]
        self.effects.clear()
        return messages

    def refused(self) -> list[str]:
        """Return the rules that were refused or led to nothing since the last look; all else stays."""
        rules = [effect.rule for effect in self.effects if isinstance(effect, Refused)]
        self.effects = [effect for effect in self.effects if not isinstance(effect, Refused)]
        return rules

    def happened(self, *kinds: type) -> list[Effect]:
        """Return the effects of these kinds since the last look, and leave them."""
        return [effect for effect in self.effects if isinstance(effect, kinds)]

    def forget(self) -> None:
        """Look away."""
        self.effects.clear()

    def states(self) -> dict[int, str]:
        """Return the state of each channel that has a relid."""
        return {row.relid: ChannelState(row.state).name for row in self.server.channels() if row.relid}

    def counted(self) -> Counter[str]:
        """Return all channels' states, counted."""
        return Counter(ChannelState(row.state).name for row in self.server.channels())

    # -- a guest's habits -----------------------------------------------------------------------------

    def connect(self, version: int = VERSION_WIN10_V5_3, **changes: int) -> None:
        """Negotiate `version`, which must work."""
        self.contact(version, **changes)
        response = self.happened(Connected)
        assert response, self.effects
        self.forget()

    def contact(self, version: int = VERSION_WIN10_V5_3, **changes: int) -> VersionResponse:
        """Post INITIATE_CONTACT as Linux does; return the last answer, if it came."""
        if version >= VERSION_WIN10_V5:
            changes.setdefault("msg_sint", 2)
        message = InitiateContact(vmbus_version_requested=version, **changes)  # type: ignore[arg-type]
        self.post(message, connection_id=4 if version >= VERSION_WIN10_V5 else 1)
        responses = [
            effect.message
            for effect in self.effects
            if isinstance(effect, SendMessage) and isinstance(effect.message, VersionResponse)
        ]
        return responses[-1]

    def request_offers(self) -> list[OfferChannel]:
        """Ask for the offers, and return them."""
        self.post(RequestOffers())
        return [message for message in self.sent() if isinstance(message, OfferChannel)]

    def boot(self, devices: int = 1, version: int = VERSION_WIN10_V5_3) -> list[int]:
        """Offer so many devices, connect, ask for the offers; return the keys of relids 1, 2, ..."""
        keys = [self.offer(number) for number in range(devices)]
        self.connect(version)
        assert len(self.request_offers()) == devices
        return keys

    def lend(self, relid: int = 1, gpadl: int = RING, pages: int = 8, first_pfn: int = 256) -> None:
        """Establish a GPADL of one range."""
        self.post(*gpadl_messages(relid, gpadl, range(first_pfn, first_pfn + pages)))

    def open(self, relid: int = 1, gpadl: int = RING, **changes: int) -> None:
        """Lend a ring of 4 + 4 pages and post OPENCHANNEL."""
        self.lend(relid, gpadl)
        self.post(open_channel(relid, gpadl, **changes))

    def release(self, relid: int = 1) -> None:
        """Post RELID_RELEASED."""
        self.post(RelidReleased(relid))

    # -- inside ---------------------------------------------------------------------------------------

    def _answer(self, effect: Effect, *, yes: bool) -> list[Effect]:
        server, ledger = self.server, self.ledger
        match effect:
            case MapGpadl():
                if yes:
                    return server.gpadl_accepted(effect.key, effect.gpadl)
                ledger.gpadls.discard((effect.key, effect.gpadl))
                return server.gpadl_refused(effect.key, effect.gpadl)
            case UnmapGpadl():
                ledger.gpadls.remove((effect.key, effect.gpadl))
                return server.gpadl_torn_down(effect.key, effect.gpadl)
            case OpenDevice():
                if yes:
                    ledger.opened[effect.key] = "open"
                    return server.device_opened(effect.key)
                del ledger.opened[effect.key]
                return server.device_refused(effect.key, 0xC000_0001)
            case CloseDevice():
                del ledger.opened[effect.key]
                return server.device_closed(effect.key)
            case RetargetEvent():
                return server.event_retargeted(effect.key, done=yes)
        raise AssertionError(effect)


def open_channel(relid: int = 1, gpadl: int = RING, **changes: int | bytes) -> OpenChannel:
    """Write an OPENCHANNEL for a ring of 4 + 4 pages."""
    fields = {"openid": relid, "target_vp": 0, "downstream_ringbuffer_pageoffset": 4, **changes}
    return OpenChannel(child_relid=relid, ringbuffer_gpadlhandle=gpadl, **fields)  # type: ignore[arg-type]
