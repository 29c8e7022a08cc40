"""What the host is ordered to do: done as it is said, or refused at once with the cure."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import pytest

from emu.control import Control
from emu.layout import MachineState
from emu.orders import OrderDesk, OrderRefused, Recipient
from hostproc.orders import HostOrders
from tests.emu.bare_control import bare_control
from tests.hostproc.test_bus import Guest

OFFERED = UUID("00000000-0000-0000-0000-0000000000ab")


class Ordered(Guest):
    """A guest with an open echo channel, whose host takes orders."""

    def __init__(self, control: Control) -> None:
        super().__init__()
        self.boot()
        self.open()
        self._desk = OrderDesk(control)
        self._orders = HostOrders(control, self.bus)

    def order(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Order something; OrderRefused."""
        return self._desk.ask(Recipient.HOST, what, lambda: None if self._orders.serve() else None, **arguments)


@pytest.fixture
def guest() -> Ordered:
    """On the control of a machine that runs."""
    control = bare_control()
    control.state_word.store(MachineState.RUNNING)
    return Ordered(control)


def test_a_packet_that_never_fits_is_refused(guest: Ordered) -> None:
    """Nobody waits for room that no reader can make; one that fits is written."""
    with pytest.raises(OrderRefused, match=r"packet needs 60024 bytes of a ring .*; send less, "):
        guest.order("send", relid=1, count=1, size=60_000)

    assert guest.order("send", relid=1, count=1, size=8) == {"sent": 1}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"class": "nothing"}, "nothing is not a device class; there are "),
        ({"backend": "nothing"}, "nothing is not a back end; there are "),
        ({"backend": "netlike"}, 'back end "netlike" and class "echo" do not go together; set backend to "echo"'),
        ({"instance": str(OFFERED)}, f"device {OFFERED} is offered already; choose another --instance"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_an_offer_that_cannot_be_is_refused(guest: Ordered, asked: dict[str, str], why: str) -> None:
    """Nothing is offered; the line says what there is, or what to choose."""
    order = {"class": "echo", "backend": None, "count": 1, "instance": None}
    guest.order("offer", **order | {"instance": str(OFFERED)})
    before = set(guest.bus.backends())

    with pytest.raises(OrderRefused, match=re.escape(why)):
        guest.order("offer", **order | asked)

    assert set(guest.bus.backends()) == before


@pytest.mark.parametrize(("asked", "wanted"), [({}, 1), ({"subchannels": 0}, 0), ({"subchannels": 3}, 3)])
def test_an_offer_has_the_sub_channels_that_were_ordered(guest: Ordered, asked: dict[str, int], wanted: int) -> None:
    """As many as are said; without a word as many as its class has on a machine of two processors."""
    before = set(guest.bus.backends())
    guest.order("offer", **{"class": "netlike"}, backend=None, count=1, instance=None, **asked)

    (key,) = set(guest.bus.backends()) - before
    assert guest.bus.backends()[key].subchannels == wanted
