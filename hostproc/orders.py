"""What a user may order of the host while the machine runs: offer a device, take one back.

An order is done at once and answered at once; what follows from it (the guest's opening, its release) is for whoever
ordered to watch in the mirror. What is wrong with an order is the user's to mend: the answer says what and how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Final
from uuid import UUID

from emu.control import Control
from emu.errors import UserError
from emu.orders import Order, OrderDesk, Recipient
from emu.ring_packets import PacketTooLong
from emu.scenario import backend_fault, backend_of, derived_instance, subchannels_of
from emu.wire.packets import COMPLETION_REQUESTED
from hostproc.bus import Bus
from hostproc.devices.table import BACKENDS, DEVICES, new_backend, offer_of
from hostproc.protocol.offers import identity_of

Values = dict[str, Any]


class HostOrders:
    """The host's counter for orders: `loads` says whether there may be one, `serve` does all there are."""

    def __init__(self, control: Control, bus: Bus) -> None:
        self._desk: Final = OrderDesk(control)
        self._bus: Final = bus
        self._derived: Final[dict[str, list[UUID]]] = {}
        """Derived instances of a class, in their order: each costs a SHA-1, and the first are asked for again."""
        self.loads: Final = (self._desk.bell(Recipient.HOST),)
        self._orders: Final[Mapping[str, Callable[[Values], Values]]] = {
            "offer": self._offer,
            "rescind": self._rescind,
            "rescind-again": self._rescind_again,
            "offer-subchannel": self._offer_subchannel,
            "lives": self._lives,
            "send": self._send,
        }

    def serve(self) -> bool:
        """Do what was ordered; whether there was anything."""
        orders = self._desk.take(Recipient.HOST)
        for order in orders:
            self._desk.answer(order, self._do(order))
        return bool(orders)

    def _do(self, order: Order) -> Values:
        try:
            if order.what not in self._orders:
                raise UserError(f"no order {order.what}; there are {', '.join(self._orders)}")
            return self._orders[order.what](order.arguments)
        except UserError as error:
            return {"error": str(error)}

    def _offer(self, asked: Values) -> Values:
        """Offer `count` devices of `class`, with the back end `backend` (empty: the class's); or one of `instance`.

        `subchannels`, if it is there, is how many each has for a guest that asks; otherwise it is the class's.
        """
        class_name = asked["class"]
        backend = asked["backend"] or backend_of(class_name)
        if class_name not in DEVICES:
            raise UserError(f"{class_name} is not a device class; there are {', '.join(sorted(DEVICES))}")
        if backend not in BACKENDS:
            raise UserError(f"{backend} is not a back end; there are {', '.join(sorted(BACKENDS))}")
        if (fault := backend_fault(class_name, backend)) is not None:
            raise UserError(f"{fault}; {fault.cure}")
        subchannels = asked.get("subchannels", subchannels_of(class_name, self._bus.server.limits.vp_count))
        offered = []
        for _ in range(asked["count"]):
            instance = UUID(asked["instance"]) if asked["instance"] else self._unused_instance(class_name)
            parameters = offer_of(class_name, instance)
            if self._bus.server.offered(parameters.identity):
                raise UserError(f"device {instance} is offered already; choose another --instance")
            key = self._bus.add(parameters, new_backend(backend, subchannels=subchannels))
            offered.append({**self._name_of(key), "instance": str(instance), "class": class_name})
        return {"offered": offered}

    def _name_of(self, key: int) -> Values:
        """A device's relid, and how often that was offered: one life of the number (0 and 0 without a guest)."""
        relid = self._bus.server.relid_of(key)
        return {"relid": relid, "generation": self._bus.server.generation(relid) if relid else 0}

    def _unused_instance(self, class_name: str) -> UUID:
        """The first derived instance of a class that no device has; a guest may still hold one that went."""
        if_type, known, derived = (
            DEVICES[class_name].guid,
            self._bus.server.known,
            self._derived.setdefault(class_name, []),
        )
        for index in count():
            if index == len(derived):
                derived.append(derived_instance(class_name, index))
            if not known(identity_of(if_type, derived[index])):
                return derived[index]
        raise AssertionError("a count has no end")

    def _rescind(self, asked: Values) -> Values:
        """Take back the device whose channel has `relid`, or whose instance is `instance`."""
        found = [
            (key, parameters)
            for key, parameters in self._bus.offered().items()
            # A device whose relid the guest gave back has relid 0, and so has an order that names an instance.
            if (asked["relid"] and asked["relid"] == self._bus.server.relid_of(key))
            or asked["instance"] == str(parameters.if_instance)
        ]
        if not found:
            wanted = f"relid {asked['relid']}" if asked["relid"] else f"instance {asked['instance']}"
            raise UserError(f"no device with {wanted} is offered; `vmbus-emu ls` lists them")
        # A sub-channel alone is named by its relid; an instance means the device, and its sub-channels go with it.
        key, parameters = min(found, key=lambda one: one[1].sub_channel_index)
        answer = {**self._name_of(key), "instance": str(parameters.if_instance)}
        self._bus.remove(key)
        return answer

    def _rescind_again(self, asked: Values) -> Values:
        """Send the RESCIND of a relid that was taken back, and not given back yet, once more."""
        relid, server = asked["relid"], self._bus.server
        if not server.holds(relid) or server.key_of(relid):
            raise UserError(f"relid {relid} was not taken back, or is given back already; rescind it first")
        self._bus.rescind_again(relid)
        return {"relid": relid}

    def _offer_subchannel(self, asked: Values) -> Values:
        """Offer the `index`-th sub-channel of the open channel `relid`."""
        key = self._bus.server.key_of(asked["relid"])
        if not key or self._bus.channel(key) is None:
            raise UserError(f"no open channel has relid {asked['relid']}; `vmbus-emu ls` lists them")
        before = set(self._bus.offered())
        self._bus.offer_subchannels(key, (asked["index"],))
        new = set(self._bus.offered()) - before
        if not new:
            raise UserError(f"sub-channel {asked['index']} is offered already, or there is no relid; use another index")
        return self._name_of(new.pop())

    def _send(self, asked: Values) -> Values:
        """Let a device write `count` packets of `size` bytes of its own accord, sleeping whenever the ring is full.

        As many as fit are written at once. `id` (0: none): they ask for completions, with ids from this one on.
        """
        relid, count, size = asked["relid"], asked["count"], asked["size"]
        for key in self._bus.offered():
            channel = self._bus.channel(key)
            if channel is not None and channel.relid == relid:
                break
        else:
            raise UserError(f"no open channel has relid {relid}; `vmbus-emu ls` lists them")
        payloads = self._bus.backends()[key].unasked(channel, count, size)
        first, flags = asked.get("id", 0), COMPLETION_REQUESTED if asked.get("id") else 0
        sent = 0
        try:
            while sent < count and channel.send(payloads[sent], first and first + sent, flags):
                sent += 1
        except PacketTooLong as error:
            raise UserError(f"{error}; send less, or give the device more ring_pages") from None
        if sent < count:
            self._bus.run_beside(key, channel.send_all(payloads[sent:], first and first + sent, flags))
        return {"sent": sent}

    def _lives(self, _asked: Values) -> Values:
        """Relids offered, given back, held (while a guest is connected, the first is their sum), and rescinded."""
        offered, released, held, rescinded = self._bus.server.lives()
        return {"offered": offered, "released": released, "held": held, "rescinded": rescinded}
