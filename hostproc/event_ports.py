"""Event ports: a base flag and a number of flags of one SINT of one VP. Setting one that was clear interrupts.

(TLFS "Inter-Partition Communication", reference 1.6 and 1.7.) What a connection id leads to is in `hostproc.ports`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from emu.synic import Synic
from emu.tracing import E_FLAG_SET, Bound, Recorder
from emu.wire.hypercalls import HvStatus
from emu.wire.synic import HV_EVENT_FLAGS_COUNT

BindInterrupt = Callable[[int, int], Callable[[], None]]
"""Gives what requests a vector (the second number) of the VP at a position."""
_SUCCESS: Final = HvStatus.SUCCESS


class Route:
    """Where a flag lies now, for as long as nothing changes there."""

    __slots__ = ("bit", "changes", "fetch_or", "interrupt", "position", "records", "synic")

    def __init__(
        self,
        synic: Synic,
        position: int,
        fetch_or: Callable[[int], int],
        bit: int,
        interrupt: Callable[[], None] | None,
        records: tuple[Bound, Bound] | None,
    ) -> None:
        """`fetch_or` ors into the flag's byte, where it is `bit`; `interrupt` requests one (None: none is due);
        `records` that the flag was set already, and that it was clear."""
        self.synic: Final = synic
        self.changes: Final = synic.changes
        self.position: Final = position
        self.fetch_or: Final = fetch_or
        self.bit: Final = bit
        self.interrupt: Final = interrupt
        self.records: Final = records


class EventPort:
    """A port whose flags are event flags of one SINT of one guest VP."""

    def __init__(
        self,
        synics: list[Synic],
        request_interrupt: Callable[[int, int], None],
        position: int,
        sint: int,
        base_flag: int,
        flag_count: int = 1,
        trace: Recorder | None = None,
        bind_interrupt: BindInterrupt | None = None,
    ) -> None:
        """`bind_interrupt`: a shorter way to what `request_interrupt` does, if there is one."""
        assert base_flag >= 0 and base_flag + flag_count <= HV_EVENT_FLAGS_COUNT, (base_flag, flag_count)
        self._synics = synics
        self._bind_interrupt = bind_interrupt or partial(partial, request_interrupt)
        self.position = position
        self._route: Route | None = None
        self.sint = sint
        self.base_flag = base_flag
        self.flag_count = flag_count
        self._trace = trace

    def signal(self, flag_number: int = 0) -> HvStatus:
        """Set a flag; an interrupt follows only when it was clear.

        INVALID_SYNIC_STATE: the SINT is masked, or SynIC or event-flag page are off.
        """
        route = self._route
        # A device signals the same flag over and over: where it leads is worked out again only after a change.
        if route is None or flag_number or route.changes != route.synic.changes or route.position != self.position:
            found = self._find_route(flag_number)
            if isinstance(found, HvStatus):
                return found
            route = found
        bit = route.bit
        was_clear = not route.fetch_or(bit) & bit
        if route.records is not None:
            route.records[was_clear]()
        if was_clear and route.interrupt is not None:
            route.interrupt()
        return _SUCCESS

    def close(self) -> None:
        """Signal nobody any more, whoever still calls `signal`."""
        self._route = None
        self.flag_count = 0

    def _find_route(self, flag_number: int) -> Route | HvStatus:
        """Where a flag of this port lies now, or why it cannot be set; kept for the first flag."""
        if flag_number >= self.flag_count:
            return HvStatus.INVALID_PARAMETER
        synic = self._synics[self.position]
        if not synic.events_enabled() or synic.masked(self.sint):
            return HvStatus.INVALID_SYNIC_STATE
        cell = synic.flag_cell(self.sint, self.base_flag + flag_number)
        records = None
        if self._trace:
            words = E_FLAG_SET, self.position, self.sint, self.base_flag + flag_number
            records = self._trace.bind(*words, 1), self._trace.bind(*words, 0)
        vector = synic.vector_to_raise(self.sint)
        interrupt = self._bind_interrupt(self.position, vector) if vector else None
        route = Route(synic, self.position, *cell, interrupt, records)
        if not flag_number:
            self._route = route
        return route


class HostEventPort:
    """A port of the host: a signal calls `wake` (a device's doorbell)."""

    def __init__(self, wake: Callable[[], None], flag_count: int = 1) -> None:
        self._wake = wake
        self.flag_count = flag_count

    def signal(self, flag_number: int = 0) -> HvStatus:
        """Ring; flags of one port are not told apart (reference 1.7)."""
        if flag_number >= self.flag_count:
            return HvStatus.INVALID_PARAMETER
        self._wake()
        return _SUCCESS
