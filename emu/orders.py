"""Orders: what a user asks of a running machine (`vmbus-emu ctl`), as a bounded number of letters in `control`.

A letter goes to the host or to the guest's user space. Who asks claims a slot, fills it, posts it, rings the
recipient's bell and waits; the recipient takes it, does it, and writes the answer into the same slot. What is
asked is a name and plain values (msgpack); an answer is plain values, or an error that names what was wrong.

    FREE -> FILLING -> POSTED (the asker) -> TAKEN -> DONE (the recipient) -> FREE (the asker)
                                                 \\-> ABANDONED (an asker that gave up) -> FREE (the recipient)

State and asker are one word, changed by compare-and-swap only, so a slot whose asker died is taken over by one
process, and never while the asker lives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import Any, Final

import msgpack

from emu.control import ORDER_SLOTS, ORDER_TEXT_BYTES, Control, start_time_of
from emu.errors import DeadlinePassed, MachineStopping, UserError
from emu.layout import MachineState
from emu.values import valueclass

_HEAD: Final = Struct("<QII")
"""The slot's word, recipient, bytes of text."""
_LENGTH: Final = 12
_STATE_MASK: Final = 0xFF
"""The word: state, then 24 bits of the asker's pid, then 32 of its start time (clock ticks since boot)."""
_LOOK_S: Final = 0.001
ANSWER_TIMEOUT_S: Final = 10.0


class Recipient(IntEnum):
    """Whom a letter is for."""

    HOST = 0
    GUEST = 1


class OrderState(IntEnum):
    """State of a slot."""

    FREE = 0
    FILLING = 1
    POSTED = 2
    TAKEN = 3
    DONE = 4
    ABANDONED = 5


class OrderRefused(UserError):
    """The recipient will not: `errno` is the guest kernel's, 0 when there is none."""

    def __init__(self, text: str, errno: int = 0) -> None:
        super().__init__(text)
        self.errno = errno


@valueclass()
class Order:
    """A letter that its recipient has taken; to be answered exactly once."""

    slot: int
    what: str
    arguments: dict[str, Any]


def _word(state: int, pid: int, started: int) -> int:
    """A slot's word."""
    return state | (pid & 0xFFFFFF) << 8 | (started & 0xFFFFFFFF) << 32


def _state(word: int) -> int:
    return word & _STATE_MASK


def _orphan(word: int) -> bool:
    """Whether the asker that a word names is no more."""
    return start_time_of(word >> 8 & 0xFFFFFF) & 0xFFFFFFFF != word >> 32


class OrderDesk:
    """All slots of one machine, as either side sees them."""

    def __init__(self, control: Control) -> None:
        self._control: Final = control
        self._view: Final = control.view
        self._slots: Final = tuple(control.order_offset(slot) for slot in range(ORDER_SLOTS))
        self._started: dict[int, int] = {}
        """This process's start time, by its pid: a fork has another."""
        self.newest: OrderState = OrderState.FREE
        """What became of the letter that was posted last from here.

        FREE: nobody has read it, nor will; POSTED: it may be carried out, or was; DONE: its answer was read.
        """

    def bell(self, recipient: Recipient) -> Callable[[], int]:
        """Load of a recipient's bell: not 0 when there may be a letter."""
        return self._view.cell_u32(self._control.order_bell_offset(recipient)).load

    def states(self) -> list[OrderState]:
        """The state of each slot (for reports)."""
        words = (self._view.load_u64(at) for at in self._slots)
        return [OrderState(_state(word)) for word in words]

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

        Raises OrderRefused when the recipient will not (its text says why), DeadlinePassed when no slot is free or
        no answer comes, MachineStopping when the machine ends meanwhile.
        """
        return self.wait(self.post(recipient, what, wake, timeout_s=timeout_s, **arguments), what, timeout_s=timeout_s)

    def post(
        self,
        recipient: Recipient,
        what: str,
        wake: Callable[[], None],
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        **arguments: Any,
    ) -> int:
        """Post a letter and wake its recipient; returns what `wait` wants, which must follow. Raises as `ask`."""
        self.newest = OrderState.FREE
        text: bytes = msgpack.packb([what, arguments])
        if len(text) > ORDER_TEXT_BYTES:
            raise UserError(f"{what}: arguments of {len(text)} bytes, {ORDER_TEXT_BYTES} is the most; shorten them")
        pid = os.getpid()
        if pid not in self._started:
            self._started = {pid: start_time_of(pid)}
        started = self._started[pid]
        at = self._claim(pid, started, time.monotonic() + timeout_s, timeout_s)
        try:
            self._control.memory[at + _HEAD.size : at + _HEAD.size + len(text)] = text
            self._view.store_u32(at + 8, recipient)
            self._view.store_u32(at + _LENGTH, len(text))
            self.newest = OrderState.POSTED
            self._view.store_u64(at, _word(OrderState.POSTED, pid, started))
            # Rung behind the state: a recipient takes the bell first and looks at the slots second.
            self._view.store_u32(self._control.order_bell_offset(recipient), 1)
            wake()
        except BaseException:  # also who is interrupted leaves no slot behind, nor a letter that is read some time
            self._give_up(at)
            raise
        return at

    def state(self, at: int) -> OrderState:
        """How far the letter that was posted at `at` is."""
        return OrderState(_state(self._view.load_u64(at)))

    def wait(self, at: int, what: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Wait for the answer to the letter that was posted at `at`, and free its slot. Raises as `ask`."""
        try:
            self._await_answer(at, what, time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            self._give_up(at)
            raise
        answer = self._text(at)
        self._view.store_u64(at, OrderState.FREE)
        self.newest = OrderState.DONE
        if "error" in answer:
            raise OrderRefused(answer["error"], answer.get("errno", 0))
        return answer

    def _await_answer(self, at: int, what: str, end: float, timeout_s: float) -> None:
        while _state(self._view.load_u64(at)) != OrderState.DONE:
            if self._control.state_word.load() == MachineState.STOPPING:
                raise MachineStopping(f"the machine stopped before it answered `{what}`")
            if time.monotonic() > end:
                raise DeadlinePassed(f"an answer to `{what}`", int(timeout_s * 1e9))
            time.sleep(_LOOK_S)

    def _claim(self, pid: int, started: int, end: float, timeout_s: float) -> int:
        """Where a slot lies that is FILLING for this process; one whose asker died is taken over."""
        while True:
            for at in self._slots:
                word = self._view.load_u64(at)
                state = _state(word)
                if state in (OrderState.TAKEN, OrderState.ABANDONED):
                    continue  # its recipient still writes there
                if state != OrderState.FREE and not _orphan(word):
                    continue
                if self._view.cas_u64(at, word, _word(OrderState.FILLING, pid, started)) == word:
                    return at
            if time.monotonic() > end:
                raise DeadlinePassed("a free slot for an order", int(timeout_s * 1e9))
            time.sleep(_LOOK_S)

    def _give_up(self, at: int) -> None:
        # The slot is ours until it is FREE, so only its state changes meanwhile. Whoever swaps first decides: a letter
        # that was taken is freed by its recipient, an answer that came is ours.
        asker = self._view.load_u64(at) & ~_STATE_MASK
        posted, taken = asker | OrderState.POSTED, asker | OrderState.TAKEN
        if self._view.cas_u64(at, posted, OrderState.FREE) == posted:
            self.newest = OrderState.FREE
            return
        if self._view.cas_u64(at, taken, asker | OrderState.ABANDONED) != taken:
            self._view.store_u64(at, OrderState.FREE)

    def _text(self, at: int) -> dict[str, Any]:
        length = self._view.load_u32(at + _LENGTH)
        value: dict[str, Any] = msgpack.unpackb(self._control.memory[at + _HEAD.size : at + _HEAD.size + length])
        return value

    # -- who is asked -------------------------------------------------------------------------------

    def take(self, recipient: Recipient) -> list[Order]:
        """Every letter that waits for this recipient; each must be answered."""
        bell = self._control.order_bell_offset(recipient)
        if not self._view.load_u32(bell):
            return []
        # A full barrier between the bell and the slots: a letter posted behind the look rings again.
        self._view.exchange_u32(bell, 0)
        taken = []
        memory, posted = self._control.memory, int(OrderState.POSTED)
        for slot, at in enumerate(self._slots):
            word, asked, length = _HEAD.unpack_from(memory, at)
            if word & _STATE_MASK != posted or asked != recipient:
                continue
            if self._view.cas_u64(at, word, word & ~_STATE_MASK | OrderState.TAKEN) != word:
                continue  # who asked gave up, or died and somebody else has the slot
            what, arguments = msgpack.unpackb(memory[at + _HEAD.size : at + _HEAD.size + length])
            taken.append(Order(slot, what, arguments))
        return taken

    def answer(self, order: Order, values: dict[str, Any]) -> None:
        """Answer a letter that was taken; an answer too long for a slot is an error instead."""
        text: bytes = msgpack.packb(values)
        if len(text) > ORDER_TEXT_BYTES:
            text = msgpack.packb({"error": f"{order.what}: the answer has {len(text)} bytes, more than fit"})
        at = self._slots[order.slot]
        self._control.memory[at + _HEAD.size : at + _HEAD.size + len(text)] = text
        self._view.store_u32(at + _LENGTH, len(text))
        word = self._view.load_u64(at)
        done = word & ~_STATE_MASK | OrderState.DONE
        if _state(word) == OrderState.TAKEN and self._view.cas_u64(at, word, done) == word:
            return
        self._view.store_u64(at, OrderState.FREE)
