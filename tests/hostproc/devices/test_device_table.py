"""Devices of a scenario: what is offered for each class, and which back ends there are."""

from __future__ import annotations

from uuid import UUID

import pytest

from emu.scenario import BACKENDS as SCENARIO_BACKENDS
from emu.wire.device_classes import CLASSES
from emu.wire.messages import ChannelFlags
from hostproc.devices.echo import Echo
from hostproc.devices.table import BACKENDS, DEVICES, new_backend, offer_of

INSTANCE = UUID(int=5)


def test_a_scenario_may_name_every_back_end() -> None:
    """What a scenario accepts is what there is."""
    assert set(SCENARIO_BACKENDS) == set(BACKENDS)
    assert isinstance(new_backend("echo"), Echo)


@pytest.mark.parametrize("name", list(DEVICES))
def test_an_offer_carries_its_classes_flags_and_pipe_mode(name: str) -> None:
    """A pipe offer begins with its mode; every class can be offered."""
    kind = DEVICES[name]

    offer = offer_of(name, INSTANCE)

    assert (offer.if_type, offer.if_instance, offer.sub_channel_index) == (kind.guid, INSTANCE, 0)
    assert offer.chn_flags == kind.chn_flags
    pipe = bool(kind.chn_flags & ChannelFlags.NAMED_PIPE_MODE)
    assert offer.user_def == (int(kind.pipe_mode or 0).to_bytes(4, "little") if pipe else b"")


def test_every_class_has_a_name() -> None:
    """The table leaves none out."""
    assert len(DEVICES) == len(CLASSES)
