"""Orders: what a user asks of a running machine (`vmbus-emu ctl`), as a bounded number of letters in `control`.

A letter goes to the host or to the guest's user space. Who asks claims a slot, fills it, posts it, rings the
recipient's bell and waits; the recipient takes it, does it, and writes the answer into the same slot. What is
asked is a name and plain values (msgpack); an answer is plain values, or an error that names what was wrong.

    FREE -> FILLING -> POSTED (the asker) -> TAKEN -> DONE (the recipient) -> FREE (the asker)
                                                 \\-> ABANDONED (an asker that gave up) -> FREE (the recipient)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Any, Final

import msgpack

from emu.control import ORDER_SLOTS, ORDER_TEXT_BYTES, Control, start_time_of
from emu.errors import DeadlinePassed, MachineStopping, UserError
from emu.layout import MachineState

_HEAD: Final = Struct("<IIIIQ")
"""state, recipient, bytes of text, asker's pid, and when that process started (clock ticks since boot)."""
_LOOK_S: Final = 0.001
ANSWER_TIMEOUT_S: Final = 10.0


class Recipient(IntEnum):
    """Whom a letter is for."""

    HOST = 0
    GUEST = 1


class OrderState(IntEnum):
    """State word of a slot."""

    FREE = 0
    FILLING = 1
    POSTED = 2
    TAKEN = 3
    DONE = 4
    ABANDONED = 5


@dataclass(frozen=True, slots=True)
class Order:
    """A letter that its recipient has taken; to be answered exactly once."""

    slot: int
    what: str
    arguments: dict[str, Any]


class OrderDesk:
    """All slots of one machine, as either side sees them."""

    def __init__(self, control: Control) -> None:
        self._control: Final = control
        self._view: Final = control.view

    def bell(self, recipient: Recipient) -> Callable[[], int]:
        """Load of a recipient's bell: not 0 when there may be a letter."""
        return self._view.cell_u32(self._control.order_bell_offset(recipient)).load

    # -- who asks -----------------------------------------------------------------------------------

    def ask(
        self,
        recipient: Recipient,
        what: str,
        wake: Callable[[], None],
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Post a letter, wake its recipient, wait for the answer.

        Raises UserError when the recipient will not (its text says why), DeadlinePassed when no slot is free or no
        answer comes, MachineStopping when the machine ends meanwhile.
        """
        slot = self.post(recipient, what, wake, timeout_s=timeout_s, **arguments)
        return self.wait(slot, what, timeout_s=timeout_s)

    def post(
        self,
        recipient: Recipient,
        what: str,
        wake: Callable[[], None],
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        **arguments: Any,
    ) -> int:
        """Post a letter and wake its recipient; the slot, for `wait`, which must follow. Raises as `ask` does."""
        text: bytes = msgpack.packb([what, arguments])
        if len(text) > ORDER_TEXT_BYTES:
            raise UserError(f"{what}: arguments of {len(text)} bytes, {ORDER_TEXT_BYTES} is the most; shorten them")
        slot = self._claim(time.monotonic() + timeout_s, timeout_s)
        at = self._control.order_offset(slot)
        pid = os.getpid()
        _HEAD.pack_into(self._control.memory, at, OrderState.FILLING, recipient, len(text), pid, start_time_of(pid))
        self._control.memory[at + _HEAD.size : at + _HEAD.size + len(text)] = text
        self._view.store_u32(at, OrderState.POSTED)
        # Rung behind the state: a recipient takes the bell first and looks at the slots second.
        self._view.store_u32(self._control.order_bell_offset(recipient), 1)
        wake()
        return slot

    def wait(self, slot: int, what: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the answer to a letter that was posted, and free its slot. Raises as `ask` does."""
        at = self._control.order_offset(slot)
        end = time.monotonic() + timeout_s
        while self._view.load_u32(at) != OrderState.DONE:
            stopping = self._control.state_word.load() == MachineState.STOPPING
            if stopping or time.monotonic() > end:
                self._give_up(at)
                if stopping:
                    raise MachineStopping(f"the machine stopped before it answered `{what}`")
                raise DeadlinePassed(f"an answer to `{what}`", int(timeout_s * 1e9))
            time.sleep(_LOOK_S)
        answer = self._text(at)
        self._view.store_u32(at, OrderState.FREE)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _claim(self, end: float, timeout_s: float) -> int:
        """A slot in state FILLING; one whose asker died is taken over."""
        while True:
            for slot in range(ORDER_SLOTS):
                at = self._control.order_offset(slot)
                state = self._view.load_u32(at)
                if state in (OrderState.TAKEN, OrderState.ABANDONED):
                    continue  # its recipient still writes there
                if state != OrderState.FREE and not self._orphan(at):
                    continue
                if self._view.cas_u32(at, state, OrderState.FILLING) == state:
                    return slot
            if time.monotonic() > end:
                raise DeadlinePassed("a free slot for an order", int(timeout_s * 1e9))
            time.sleep(_LOOK_S)

    def _orphan(self, at: int) -> bool:
        _state, _recipient, _length, pid, started = _HEAD.unpack_from(self._control.memory, at)
        return bool(pid) and start_time_of(pid) != int(started)

    def _give_up(self, at: int) -> None:
        # Whoever swaps first decides: a letter that was taken is freed by its recipient, an answer that came is ours.
        if self._view.cas_u32(at, OrderState.POSTED, OrderState.FREE) == OrderState.POSTED:
            return
        if self._view.cas_u32(at, OrderState.TAKEN, OrderState.ABANDONED) != OrderState.TAKEN:
            self._view.store_u32(at, OrderState.FREE)

    def _text(self, at: int) -> dict[str, Any]:
        length = _HEAD.unpack_from(self._control.memory, at)[2]
        value: dict[str, Any] = msgpack.unpackb(self._control.memory[at + _HEAD.size : at + _HEAD.size + length])
        return value

    # -- who is asked -------------------------------------------------------------------------------

    def take(self, recipient: Recipient) -> list[Order]:
        """Every letter that waits for this recipient; each must be answered."""
        bell = self._control.order_bell_offset(recipient)
        if not self._view.load_u32(bell):
            return []
        self._view.store_u32(bell, 0)
        taken = []
        for slot in range(ORDER_SLOTS):
            at = self._control.order_offset(slot)
            _state, asked, length, _pid, _started = _HEAD.unpack_from(self._control.memory, at)
            if asked != recipient or self._view.cas_u32(at, OrderState.POSTED, OrderState.TAKEN) != OrderState.POSTED:
                continue
            what, arguments = msgpack.unpackb(self._control.memory[at + _HEAD.size : at + _HEAD.size + length])
            taken.append(Order(slot, what, arguments))
        return taken

    def answer(self, order: Order, values: dict[str, Any]) -> None:
        """Answer a letter that was taken; an answer too long for a slot is an error instead."""
        text: bytes = msgpack.packb(values)
        if len(text) > ORDER_TEXT_BYTES:
            text = msgpack.packb({"error": f"{order.what}: the answer has {len(text)} bytes, more than fit"})
        at = self._control.order_offset(order.slot)
        self._control.memory[at + _HEAD.size : at + _HEAD.size + len(text)] = text
        self._view.store_u32(at + 8, len(text))
        if self._view.cas_u32(at, OrderState.TAKEN, OrderState.DONE) == OrderState.ABANDONED:
            self._view.store_u32(at, OrderState.FREE)
