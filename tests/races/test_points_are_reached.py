"""Claims about the points themselves: each is somewhere in the code, and the catalogue's names are ours."""

from __future__ import annotations

import pytest

from emu.switches import SWITCHES
from emu.syncpoint import Point, Scope
from tests.conftest import SOURCES
from tools.races import exhibits
from tools.schedule import Schedule

CODE = "\n".join(
    path.read_text() for folder in ("guestproc", "hostproc") for path in sorted((SOURCES / folder).rglob("*.py"))
)
SCHEDULES = {name: Schedule.load(path) for name, path in exhibits().items()}


@pytest.mark.parametrize("point", Point, ids=lambda point: point.text)
def test_a_point_is_reached_somewhere(point: Point) -> None:
    """A name that nobody ever comes to would be armed in vain."""
    assert f"Point.{point.name}" in CODE


@pytest.mark.parametrize("point", Point, ids=lambda point: point.text)
def test_a_point_of_the_host_is_the_hosts(point: Point) -> None:
    """Its name says whose window it is; the loop that runs a VP is the one that our guest has itself."""
    assert (point.scope is Scope.HOST) == (point.text.startswith("h.") and not point.text.startswith("h.vp."))


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_shown(switch: str) -> None:
    """Each switch is off in an exhibit, each of its variants in one."""
    shown = [one.scenario.fix for one in SCHEDULES.values() if switch in one.scenario.fix.off()]
    assert shown
    assert set(SWITCHES[switch].variants) <= {fix.variant for fix in shown}


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_exhibit_is_of_its_switchs_entry(name: str) -> None:
    """The file's id is one that its switch names, without the letter of a variant."""
    number = SCHEDULES[name].path.stem.split("-")[0].upper()[:2]
    assert any(number in SWITCHES[switch].exhibits for switch in SCHEDULES[name].scenario.fix.off())
