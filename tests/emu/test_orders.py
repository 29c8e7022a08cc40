"""Orders: letters between a user's command and a machine, whoever dies, gives up or is late."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from emu.control import ORDER_SLOTS, ORDER_TEXT_BYTES, Control
from emu.errors import DeadlinePassed, MachineStopping, UserError
from emu.ipc.segments import object_name
from emu.layout import MachineState
from emu.orders import OrderDesk, OrderRefused, OrderState, Recipient
from tests.processes import Crowd, Forked

HOST, GUEST = Recipient.HOST, Recipient.GUEST
SHORT_S = 0.05


def nobody() -> None:
    """A recipient that looks when the test says so."""


@pytest.fixture
def control(machine_name: str) -> Iterator[Control]:
    """The segment of a machine that runs."""
    control = Control.create(object_name(machine_name, "control"), {})
    control.state_word.store(MachineState.RUNNING)
    yield control
    control.close()


@pytest.fixture
def desk(control: Control) -> OrderDesk:
    """Its letters."""
    return OrderDesk(control)


def answering(desk: OrderDesk, values: dict[str, Any], recipient: Recipient = HOST) -> Callable[[], None]:
    """A recipient that answers all letters as soon as its bell is rung."""

    def serve() -> None:
        for order in desk.take(recipient):
            desk.answer(order, values)

    return serve


def give_up(desk: OrderDesk, wake: Callable[[], None] = nobody) -> None:
    """Ask, and wait no longer than a moment."""
    with pytest.raises(DeadlinePassed, match="an answer to `late`"):
        desk.ask(HOST, "late", wake, timeout_s=SHORT_S)


def test_letter_and_answer(desk: OrderDesk) -> None:
    """What is asked arrives as it is, what is answered comes back as it is, and the slot is free again."""
    seen = []

    def serve() -> None:
        for order in desk.take(GUEST):
            seen.append((order.what, order.arguments, desk.states()[order.slot]))
            desk.answer(order, {"devices": [1, 2], "name": "hv_echo"})

    answer = desk.ask(GUEST, "bind", serve, driver="hv_echo", relid=3)

    assert answer == {"devices": [1, 2], "name": "hv_echo"}
    assert seen == [("bind", {"driver": "hv_echo", "relid": 3}, OrderState.TAKEN)]
    assert set(desk.states()) == {OrderState.FREE}


def test_recipients_do_not_take_each_others_letters(desk: OrderDesk) -> None:
    """A letter to the guest is none of the host's, and stays for the guest."""

    def serve() -> None:
        assert desk.bell(HOST)() == 0 and desk.bell(GUEST)() != 0
        assert desk.take(HOST) == []
        answering(desk, {"by": "guest"}, GUEST)()
        assert desk.bell(GUEST)() == 0

    assert desk.ask(GUEST, "drivers", serve) == {"by": "guest"}


@pytest.mark.parametrize(("answer", "number"), [({"error": "no such"}, 0), ({"error": "-EEXIST: x", "errno": 17}, 17)])
def test_refusal_is_the_users_to_mend(desk: OrderDesk, answer: dict[str, Any], number: int) -> None:
    """An error in an answer is a UserError with its text, and with the errno where there is one."""
    with pytest.raises(OrderRefused, match=answer["error"]) as caught:
        desk.ask(HOST, "offer", answering(desk, answer))

    assert isinstance(caught.value, UserError)
    assert caught.value.errno == number
    assert set(desk.states()) == {OrderState.FREE}


def test_letter_that_is_too_long(desk: OrderDesk) -> None:
    """It is refused before a slot is taken; one that just fits is not."""
    with pytest.raises(UserError, match="shorten"):
        desk.ask(HOST, "offer", nobody, text="x" * ORDER_TEXT_BYTES)

    assert set(desk.states()) == {OrderState.FREE}
    assert desk.ask(HOST, "offer", answering(desk, {}), text="x" * (ORDER_TEXT_BYTES - 20)) == {}


def test_answer_that_is_too_long(desk: OrderDesk) -> None:
    """The asker is told so, rather than given half of it."""
    with pytest.raises(OrderRefused, match=r"drivers: the answer has \d+ bytes"):
        desk.ask(HOST, "drivers", answering(desk, {"text": "x" * ORDER_TEXT_BYTES}))


def test_letter_that_nobody_takes_is_withdrawn(desk: OrderDesk) -> None:
    """Behind its deadline the asker takes it back, and who looks then finds none."""
    give_up(desk)

    assert desk.take(HOST) == []
    assert set(desk.states()) == {OrderState.FREE}


def test_answer_that_comes_too_late(desk: OrderDesk) -> None:
    """A letter that was taken is left to its recipient, who frees the slot by answering."""
    taken = []
    give_up(desk, lambda: taken.extend(desk.take(HOST)))
    (order,) = taken
    assert desk.states()[order.slot] is OrderState.ABANDONED

    desk.answer(order, {"too": "late"})

    assert set(desk.states()) == {OrderState.FREE}


def test_machine_that_stops_ends_the_wait(control: Control, desk: OrderDesk) -> None:
    """MachineStopping at once, with the letter withdrawn."""
    with pytest.raises(MachineStopping):
        desk.ask(HOST, "offer", lambda: control.state_word.store(MachineState.STOPPING), timeout_s=60)

    assert set(desk.states()) == {OrderState.FREE}


def test_asker_that_is_interrupted(desk: OrderDesk) -> None:
    """Ctrl-C in the middle of a wait: the letter is withdrawn, and the slot is free though its asker lives on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.ask(HOST, "offer", interrupt)

    assert set(desk.states()) == {OrderState.FREE}
    assert desk.take(HOST) == []


def test_asker_that_is_interrupted_before_the_bell_has_rung(
    control: Control, desk: OrderDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The letter is withdrawn as well: it would be read at the next bell, long behind its asker's end."""

    def interrupt(_recipient: Recipient) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Control, "order_bell_offset", lambda _self, recipient: interrupt(recipient))
        desk.ask(HOST, "offer", nobody)

    assert desk.newest is OrderState.FREE
    control.view.store_u32(control.order_bell_offset(HOST), 1)
    assert desk.take(HOST) == []
    assert set(desk.states()) == {OrderState.FREE}


def test_desk_knows_what_became_of_a_letter(desk: OrderDesk) -> None:
    """Nothing yet; answered; withdrawn, as nobody had taken it; in somebody's hands, who may carry it out."""

    def read() -> None:
        assert desk.take(HOST)
        raise KeyboardInterrupt

    def interrupt() -> None:
        raise KeyboardInterrupt

    became = [desk.newest]
    desk.ask(HOST, "offer", answering(desk, {}))
    became.append(desk.newest)
    for wake in (interrupt, read):
        with pytest.raises(KeyboardInterrupt):
            desk.ask(HOST, "offer", wake)
        became.append(desk.newest)

    assert became == [OrderState.FREE, OrderState.DONE, OrderState.FREE, OrderState.POSTED]


def test_all_slots_full(desk: OrderDesk) -> None:
    """As many letters as there are slots; one more waits for its turn, and not for ever."""
    taken: list[Any] = []
    threads = [
        threading.Thread(target=lambda: desk.ask(HOST, "offer", nobody, timeout_s=30)) for _ in range(ORDER_SLOTS)
    ]
    for thread in threads:
        thread.start()
    while len(taken) < ORDER_SLOTS:
        taken.extend(desk.take(HOST))
    with pytest.raises(DeadlinePassed, match="a free slot"):
        desk.ask(HOST, "offer", nobody, timeout_s=SHORT_S)
    for order in taken:
        desk.answer(order, {})
    for thread in threads:
        thread.join(30)

    assert desk.ask(HOST, "offer", answering(desk, {})) == {}
    assert set(desk.states()) == {OrderState.FREE}


@pytest.mark.parametrize("when", ["posted", "taken", "answered"])
def test_slot_of_an_asker_that_died(control: Control, desk: OrderDesk, when: str) -> None:
    """It is taken over, but not before its recipient has done with it."""
    asker = Forked(lambda: ask_many(desk, 0))
    taken: list[Any] = []
    while not (desk.bell(HOST)() if when == "posted" else taken):
        taken.extend([] if when == "posted" else desk.take(HOST))
    os.kill(asker.pid, signal.SIGKILL)
    asker.wait()
    slot = next(number for number, state in enumerate(desk.states()) if state is not OrderState.FREE)
    if when == "answered":
        desk.answer(taken[0], {"nobody": "reads it"})

    def busy() -> bool:
        return desk.states()[slot] is not OrderState.FREE

    assert busy()
    assert desk.ask(HOST, "rescind", answering(desk, {"ours": 1})) == {"ours": 1}
    # A letter in a recipient's hands stays there; any other slot was taken over and freed.
    assert busy() == (when == "taken")
    if when == "taken":
        desk.answer(taken[0], {})
        assert desk.states()[slot] is OrderState.DONE
        assert desk.ask(HOST, "rescind", answering(desk, {})) == {}
        assert not busy()


def test_askers_that_come_together(control: Control, desk: OrderDesk) -> None:
    """Many processes, few slots: each gets the answer to its own question."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for order in desk.take(HOST):
                desk.answer(order, {"echo": order.arguments["number"]})

    server = threading.Thread(target=serve)
    with Crowd() as crowd:
        # Forked before the thread is there.
        for first in range(0, 400, 20):
            crowd.start(lambda first=first: ask_many(desk, first))  # type: ignore[misc]
        server.start()
    stop.set()
    server.join()

    assert set(desk.states()) == {OrderState.FREE}


def ask_many(desk: OrderDesk, first: int, count: int = 20) -> None:
    """The questions of one process."""
    for number in range(first, first + count):
        assert desk.ask(HOST, "echo", nobody, timeout_s=60, number=number) == {"echo": number}


def test_askers_that_are_killed_among_others(desk: OrderDesk) -> None:
    """Whenever one dies, the others' slots stay theirs, and its own is used again."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for order in desk.take(HOST):
                desk.answer(order, {"echo": order.arguments["number"]})

    server = threading.Thread(target=serve)
    doomed = [Forked(lambda first=first: ask_many(desk, first * 1_000_000, 1_000_000)) for first in range(6)]  # type: ignore[misc]
    with Crowd() as crowd:
        for first in range(0, 60, 20):
            crowd.start(lambda first=first: ask_many(desk, first))  # type: ignore[misc]
        server.start()
        for asker in doomed:
            assert desk.ask(HOST, "echo", nobody, number=7) == {"echo": 7}
            asker.kill()
    for number in range(2 * ORDER_SLOTS):
        assert desk.ask(HOST, "echo", nobody, number=number) == {"echo": number}
    stop.set()
    server.join()

    assert OrderState.TAKEN not in desk.states()
