"""The states of the host's channels and GPADLs, as records: the server's watcher on a machine that records."""

from __future__ import annotations

from typing import Final

from emu.tracing import E_GPADL_STATE, E_HOST_STATE, Recorder
from hostproc.protocol.states import ChannelState, GpadlState

REMOVED: Final = 255
"""The state behind the last one: the record is deleted."""


class StateTrace:
    """A `StateWatcher` that records."""

    def __init__(self, recorder: Recorder) -> None:
        self._record = recorder.record

    def channel(self, relid: int, generation: int, old: ChannelState, new: ChannelState | None) -> None:
        """A channel went from one state to another, or was deleted."""
        self._record(E_HOST_STATE, relid, generation, old, REMOVED if new is None else new)

    def gpadl(self, relid: int, handle: int, old: GpadlState, new: GpadlState | None) -> None:
        """A GPADL did."""
        self._record(E_GPADL_STATE, relid, handle, old, REMOVED if new is None else new)
