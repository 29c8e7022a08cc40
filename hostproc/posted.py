"""What the guest posted to a port of the host, as it waits there."""

from __future__ import annotations

from emu.values import valueclass


@valueclass()
class PostedMessage:
    """A message that the guest posted to a port of the host."""

    connection_id: int
    message_type: int
    payload: bytes
    serial: int
