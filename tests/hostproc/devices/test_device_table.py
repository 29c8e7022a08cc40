"""Devices of a scenario: what is offered for each class, and which back ends there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from emu.errors import UserError
from emu.plugin import Plugins
from emu.scenario import BACKENDS as SCENARIO_BACKENDS
from emu.wire.device_classes import CLASSES, DeviceClass
from emu.wire.messages import ChannelFlags
from hostproc.devices.echo import Echo
from hostproc.devices.table import BACKENDS, DEVICES, add_plugins, new_backend, offer_of

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


class Mine(Echo):
    """A plugin's back end."""

    name = "mine"


class Unmade(Echo):
    """One that cannot be made."""

    name = "unmade"

    def __init__(self) -> None:
        raise ValueError("no such sensor")


def plugins(backend: type[object]) -> Plugins:
    """What a plugin registers: a class, and this back end."""
    made = Plugins(backends={backend.name: backend})  # type: ignore[attr-defined]
    made.owned("back end", backend.name, Path("mine.py"))  # type: ignore[attr-defined]
    made.classes["mine"] = DeviceClass(16, "mine", "HV_UNKNOWN", UUID(int=7), False, False, "Mine", None)
    return made


@pytest.fixture
def tables() -> Iterator[None]:
    """Both tables are as before afterwards."""
    backends, devices = dict(BACKENDS), dict(DEVICES)
    yield
    BACKENDS.clear()
    BACKENDS.update(backends)
    DEVICES.clear()
    DEVICES.update(devices)


@pytest.mark.usefixtures("tables")
def test_a_plugin_adds_its_lines_to_both_tables() -> None:
    """Its back end is made and its class offered as any of ours."""
    add_plugins(plugins(Mine))

    assert isinstance(new_backend("mine"), Mine)
    assert offer_of("mine", INSTANCE).if_type == UUID(int=7)


@pytest.mark.usefixtures("tables")
def test_a_back_end_that_cannot_be_made_says_why() -> None:
    """One line for who offered it; the cause is kept for the log."""
    add_plugins(plugins(Unmade))

    with pytest.raises(UserError, match="back end unmade: ValueError while it was made: no such sensor") as refused:
        new_backend("unmade")
    assert isinstance(refused.value.__cause__, ValueError)


def test_a_plugins_back_end_is_a_back_end_of_its_own_name() -> None:
    """Neither one of ours nor something else; the complaint names the file."""

    class Stranger:
        name = "stranger"

    with pytest.raises(UserError, match=r"^plugin mine\.py: back end echo is one of ours; choose another name$"):
        add_plugins(plugins(Echo))
    with pytest.raises(UserError, match=r"^plugin mine\.py: back end stranger is none; derive it from "):
        add_plugins(plugins(Stranger))
