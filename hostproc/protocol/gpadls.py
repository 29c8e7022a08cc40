"""The guest pages that a host may use: every GPADL of every channel, from its header to its TORNDOWN.

A request gets exactly one answer, also a refusal, with two exceptions that the wire imposes: a body that
belongs to nothing names no channel to answer for, and a teardown of what is not there has no status to say
so. A handle that is being assembled is unique over all channels, because GPADL_BODY names no relid.
"""

from __future__ import annotations

from emu.errors import ProtocolViolation
from emu.wire.gpa_range import PAGE_SIZE
from emu.wire.messages import (
    STATUS_SUCCESS,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    MessageType,
)
from hostproc.protocol.channel_table import ChannelTable
from hostproc.protocol.effects import MapGpadl, UnmapGpadl
from hostproc.protocol.gpadl_ranges import WORD, GpadlRecord
from hostproc.protocol.offers import Channel
from hostproc.protocol.policy import Answer, Moment
from hostproc.protocol.session import Session
from hostproc.protocol.states import (
    REVOKED_STATES,
    ChannelState,
    GpadlEvent,
    GpadlState,
    advance_gpadl,
    named,
)
from hostproc.protocol.versions import FAILED

_Fault = tuple[str, str, int, str]
"""Rule, field, value, text."""


class Gpadls:
    """The GPADLs; each is kept in its channel's record, by handle. Here is what they have in common."""

    __slots__ = ("_count", "_in_progress", "_page_limit", "_pages", "_ram_pages", "_session", "_table")

    def __init__(self, session: Session, table: ChannelTable) -> None:
        limits = session.limits
        self._session = session
        self._table = table
        self._in_progress: dict[int, tuple[Channel, GpadlRecord]] = {}
        self._count = 0
        self._pages = 0
        self._ram_pages = limits.ram_bytes // PAGE_SIZE
        self._page_limit = self._ram_pages if limits.gpadl_pages is None else limits.gpadl_pages

    @property
    def count(self) -> int:
        """How many there are, in whatever state."""
        return self._count

    @property
    def pages(self) -> int:
        """How many pages they name, at most."""
        return self._pages

    @property
    def in_progress(self) -> int:
        """How many wait for bodies."""
        return len(self._in_progress)

    # -- from the guest ---------------------------------------------------------------------------

    def header(self, message: GpadlHeader, channel: Channel | None) -> None:
        """Begin a GPADL; `channel` is the one that the message names, if there is one."""
        fault = self._header_fault(message, channel)
        if fault is not None or channel is None:
            assert fault is not None
            rule, field, value, text = fault
            self._session.refuse(rule, f"GPADL_HEADER {message.gpadl:#x}: {text}", field, value)
            self._session.send(GpadlCreated(message.child_relid, message.gpadl, FAILED))
            return
        gpadl = GpadlRecord(message.gpadl, message.range_buflen // WORD, message.rangecount)
        channel.gpadls[gpadl.handle] = gpadl
        self._count += 1
        self._pages += gpadl.most_pages
        self._in_progress[gpadl.handle] = (channel, gpadl)
        if gpadl.append(message.ranges):
            self._completed(channel, gpadl)

    def body(self, message: GpadlBody) -> None:
        """Go on with a GPADL."""
        found = self._in_progress.get(message.gpadl)
        if found is None:
            text = f"GPADL_BODY for {message.gpadl:#x}, which waits for none"
            self._session.refuse("gpadl-body-without-header", text, "gpadl", message.gpadl)
            return
        if len(message.data) < WORD:
            text = f"GPADL_BODY for {message.gpadl:#x} without a PFN"
            self._session.refuse("gpadl-body-empty", text, "pfn", len(message.data))
            return
        channel, gpadl = found
        if gpadl.append(message.data):
            self._completed(channel, gpadl)

    def teardown(self, message: GpadlTeardown, channel: Channel | None) -> None:
        """Begin to give a GPADL back."""
        if channel is None:
            self._refuse_teardown("gpadl-teardown-unknown-relid", "child_relid", message.child_relid)
            return
        gpadl = channel.gpadls.get(message.gpadl)
        if gpadl is None:
            self._refuse_teardown("gpadl-teardown-unknown", "gpadl", message.gpadl)
        elif channel.state in REVOKED_STATES:
            self._teardown_without_device(channel, gpadl)
        else:
            self._advance(channel, gpadl, GpadlEvent.TEARDOWN_REQUESTED)
            gpadl.answer = True
            if channel.ring_gpadl != gpadl.handle:
                self._session.emit(UnmapGpadl(channel.key, gpadl.handle))
            elif channel.state in (ChannelState.OPENING, ChannelState.OPEN):
                # The device is using the ring: TORNDOWN must wait until it is closed, whenever that will be.
                text = f"GPADL_TEARDOWN of {gpadl.handle:#x}, the ring of a channel that is {channel.state.name}"
                self._session.refuse("gpadl-teardown-of-open-ring", text, "gpadl", gpadl.handle)

    def note_incomplete(self) -> None:
        """The guest leaves: tell of each GPADL that waits for more than ever came, and so had no answer."""
        for channel, gpadl in self._in_progress.values():
            text = (
                f"GPADL {gpadl.handle:#x} of channel {channel.relid}: {len(gpadl.data)} of the {gpadl.words * WORD} "
                "bytes of ranges came that range_buflen says, so GPADL_CREATED did not"
            )
            self._session.ignore("gpadl-never-complete", text, "range_buflen", gpadl.words * WORD)

    # -- from the device --------------------------------------------------------------------------

    def accepted(self, channel: Channel, handle: int) -> None:
        """The device has the pages."""
        gpadl = self._find(channel, handle)
        if self._advance(channel, gpadl, GpadlEvent.DEVICE_ACCEPTED) is GpadlState.ACCEPTED:
            self._session.send(GpadlCreated(channel.relid, handle, STATUS_SUCCESS))
        else:
            self._session.emit(UnmapGpadl(channel.key, handle))

    def refused(self, channel: Channel, handle: int, status: int) -> None:
        """The device has no use for these pages, or no room."""
        gpadl = self._find(channel, handle)
        offered = gpadl.state is GpadlState.OFFERED
        self._advance(channel, gpadl, GpadlEvent.DEVICE_REFUSED)
        if offered:
            self._session.send(GpadlCreated(channel.relid, handle, status))

    def torn_down(self, channel: Channel, handle: int) -> None:
        """The device does not touch the pages any more."""
        gpadl = self._find(channel, handle)
        self._advance(channel, gpadl, GpadlEvent.DEVICE_TORN_DOWN)
        if gpadl.answer:
            self._session.send(GpadlTorndown(handle))

    # -- with the channel -------------------------------------------------------------------------

    def ring_released(self, channel: Channel) -> None:
        """The device does not use its ring any more; a teardown may have waited for that."""
        handle, channel.ring_gpadl = channel.ring_gpadl, None
        gpadl = None if handle is None else channel.gpadls.get(handle)
        if gpadl is not None and gpadl.state is GpadlState.TEARING_DOWN:
            self._session.emit(UnmapGpadl(channel.key, gpadl.handle))

    def release(self, channel: Channel) -> None:
        """The guest let go of the channel: give everything back, and tell nobody."""
        for gpadl in list(channel.gpadls.values()):
            accepted = gpadl.state is GpadlState.ACCEPTED
            self._advance(channel, gpadl, GpadlEvent.CHANNEL_RELEASED)
            gpadl.answer = False
            if accepted and channel.ring_gpadl != gpadl.handle:
                self._session.emit(UnmapGpadl(channel.key, gpadl.handle))

    def revoke(self, channel: Channel) -> None:
        """The device is gone: answer whoever waited for it, by the policy. Handles that it had accepted stay taken."""
        channel.ring_gpadl = None
        for gpadl in list(channel.gpadls.values()):
            if gpadl.state is GpadlState.OFFERED:
                self._create_at_revoke(channel, gpadl)
                continue
            answer = gpadl.state is GpadlState.TEARING_DOWN and gpadl.answer
            self._advance(channel, gpadl, GpadlEvent.CHANNEL_REVOKED)
            if answer and self._session.policy[MessageType.GPADL_TEARDOWN, Moment.REVOKING] is Answer.ACCEPT:
                self._session.send(GpadlTorndown(gpadl.handle))

    def forget(self, channel: Channel) -> None:
        """Drop what is left of a revoked channel's; there is no device to ask."""
        for gpadl in list(channel.gpadls.values()):
            self._drop(channel, gpadl)

    # -- inside -----------------------------------------------------------------------------------

    def _header_fault(self, message: GpadlHeader, channel: Channel | None) -> _Fault | None:
        """Say why a GPADL cannot even begin."""
        if channel is None:
            return (
                "gpadl-unknown-relid",
                "child_relid",
                message.child_relid,
                f"no channel {message.child_relid}",
            )
        if message.gpadl in channel.gpadls or message.gpadl in self._in_progress:
            return "gpadl-handle-in-use", "gpadl", message.gpadl, "the handle is in use"
        words = message.range_buflen // WORD
        if message.rangecount == 0:
            return "gpadl-no-range", "rangecount", 0, "no range"
        if words < 2 * message.rangecount:
            text = f"{words} words for {message.rangecount} ranges"
            return "gpadl-range-buflen", "range_buflen", message.range_buflen, text
        return self._limit_fault(words - message.rangecount, channel)

    def _limit_fault(self, pages: int, channel: Channel) -> _Fault | None:
        """Say which of the host's limits stands against one more GPADL."""
        limits = self._session.limits
        if len(channel.gpadls) >= limits.gpadls_per_channel:
            return "gpadl-too-many-on-channel", "gpadl", len(channel.gpadls), "the channel has too many"
        if self._count >= limits.gpadls:
            return "gpadl-too-many", "gpadl", self._count, "there are too many"
        if len(self._in_progress) >= limits.gpadls_in_progress:
            return "gpadl-too-many-in-progress", "gpadl", len(self._in_progress), "too many wait for bodies"
        if self._pages + pages > self._page_limit:
            return "gpadl-too-many-pages", "range_buflen", pages, f"{pages} pages more than the host takes"
        return None

    def _completed(self, channel: Channel, gpadl: GpadlRecord) -> None:
        """All words are there: hand the pages to the device, or say why not."""
        del self._in_progress[gpadl.handle]
        try:
            ranges = gpadl.take_ranges(self._ram_pages)
        except ProtocolViolation as violation:
            self._session.refuse_violation(violation)
            self._answer_refusal(channel, gpadl)
            return
        if channel.state in REVOKED_STATES:
            self._create_without_device(channel, gpadl)
            return
        self._advance(channel, gpadl, GpadlEvent.COMPLETED)
        self._session.emit(MapGpadl(channel.key, channel.relid, gpadl.handle, ranges))

    def _create_at_revoke(self, channel: Channel, gpadl: GpadlRecord) -> None:
        """Answer for a GPADL about which the device, now gone, had not decided."""
        answer = self._session.policy[MessageType.GPADL_HEADER, Moment.REVOKING]
        if answer is Answer.ACCEPT:
            self._advance(channel, gpadl, GpadlEvent.COMPLETED_WITHOUT_DEVICE)
            self._session.send(GpadlCreated(channel.relid, gpadl.handle, STATUS_SUCCESS))
            return
        self._advance(channel, gpadl, GpadlEvent.CHANNEL_REVOKED)
        if answer is Answer.REFUSE:
            self._session.send(GpadlCreated(channel.relid, gpadl.handle, FAILED))

    def _create_without_device(self, channel: Channel, gpadl: GpadlRecord) -> None:
        """Answer for a channel whose device is gone."""
        text = f"GPADL {gpadl.handle:#x} for revoked channel {channel.relid}"
        self._session.ignore("gpadl-on-revoked-channel", text, "child_relid", channel.relid)
        match self._session.policy[MessageType.GPADL_HEADER, channel.state]:
            case Answer.ACCEPT:
                self._advance(channel, gpadl, GpadlEvent.COMPLETED_WITHOUT_DEVICE)
                self._session.send(GpadlCreated(channel.relid, gpadl.handle, STATUS_SUCCESS))
            case Answer.REFUSE:
                self._answer_refusal(channel, gpadl)
            case Answer.SILENT:
                self._advance(channel, gpadl, GpadlEvent.REFUSED)

    def _answer_refusal(self, channel: Channel, gpadl: GpadlRecord) -> None:
        self._advance(channel, gpadl, GpadlEvent.REFUSED)
        self._session.send(GpadlCreated(channel.relid, gpadl.handle, FAILED))

    def _teardown_without_device(self, channel: Channel, gpadl: GpadlRecord) -> None:
        text = f"GPADL_TEARDOWN of {gpadl.handle:#x} for revoked channel {channel.relid}"
        answer = self._session.policy[MessageType.GPADL_TEARDOWN, channel.state]
        if answer is Answer.ACCEPT:
            self._advance(channel, gpadl, GpadlEvent.TEARDOWN_WITHOUT_DEVICE)
            self._session.send(GpadlTorndown(gpadl.handle))
        self._session.ignore("gpadl-teardown-on-revoked-channel", text, "child_relid", channel.relid)

    def _refuse_teardown(self, rule: str, field: str, value: int) -> None:
        self._session.refuse(rule, f"GPADL_TEARDOWN: {field} {value:#x} names nothing", field, value)

    def _find(self, channel: Channel, handle: int) -> GpadlRecord:
        gpadl = channel.gpadls.get(handle)
        if gpadl is None:
            raise ProtocolViolation(
                f"a device answered for GPADL {handle:#x}, which is not there",
                rule="late-gpadl-answer",
                field="gpadl",
                value=handle,
            )
        return gpadl

    def _advance(self, channel: Channel, gpadl: GpadlRecord, event: GpadlEvent) -> GpadlState | None:
        """Follow the table; None: the record is gone."""
        before = gpadl.state
        try:
            state = advance_gpadl(before, event)
        except ProtocolViolation as violation:
            raise named(violation, f"GPADL {gpadl.handle:#x} of channel {channel.relid}") from None
        if self._session.watcher is not None:
            self._session.watcher.gpadl(channel.relid, gpadl.handle, before, state)
        if state is None:
            self._drop(channel, gpadl)
        else:
            gpadl.state = state
        self._table.changed(channel)
        return state

    def _drop(self, channel: Channel, gpadl: GpadlRecord) -> None:
        """Forget a GPADL wherever it is known; a trace left behind would block its handle for ever."""
        del channel.gpadls[gpadl.handle]
        # The same handle may be in progress on another channel; that one is not ours to forget.
        found = self._in_progress.get(gpadl.handle)
        if found is not None and found[1] is gpadl:
            del self._in_progress[gpadl.handle]
        self._count -= 1
        self._pages -= gpadl.most_pages
