"""The table of faults and its text: what is understood, what is said of the rest, and that both forms agree."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, takewhile
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errors import UserError
from emu.faults import (
    BY_FAULT_NAME,
    FAULTS,
    KEYS,
    MAX_FAULTS,
    MAX_SLOT_OFFSET,
    MAX_TIME_NS,
    MOST_TIMES,
    PLACES,
    REQUESTS,
    Fault,
    FaultKind,
    FaultSpec,
    Form,
    message_kinds,
    parse,
    read_table,
    spec_of,
)
from emu.scenario import Scenario
from emu.wire.device_classes import BY_NAME
from emu.wire.messages import MessageType

_KEY_VALUES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "relid": st.integers(1, 2047).map(lambda n: {"relid": n}),
    "vp": st.integers(0, 63).map(lambda n: {"vp": n}),
    "sint": st.integers(0, 15).map(lambda n: {"sint": n}),
    "class": st.sampled_from(sorted(BY_NAME)).map(lambda name: {"class_name": name}),
    "device": st.integers(1, (1 << 128) - 1).map(lambda n: {"device": UUID(int=n)}),
    "kind": st.sampled_from(sorted(message_kinds().values())).map(lambda n: {"kind": n}),
    "status": st.integers(1, 0xFFFF_FFFF).map(lambda n: {"status": n}),
    "nth": st.integers(1, MOST_TIMES).map(lambda n: {"nth": n}),
    "times": st.integers(1, MOST_TIMES).map(lambda n: {"times": n}),
}


def _value(spec: FaultSpec) -> st.SearchStrategy[dict[str, Any]]:
    slot = spec.kind is FaultKind.HOST_MUTATE_SLOT
    offsets = st.integers(0, MAX_SLOT_OFFSET if slot else 0xFFFF_FFFF)
    forms: dict[Form, st.SearchStrategy[dict[str, Any]]] = {
        Form.NONE: st.nothing(),
        Form.TIME: st.integers(1, MAX_TIME_NS).map(lambda n: {"number": n}),
        Form.TIME_OR_NONE: st.integers(1, MAX_TIME_NS).map(lambda n: {"number": n}),
        Form.PLACE: st.sampled_from(PLACES).map(lambda word: {"word": word}),
        Form.REQUEST: st.sampled_from(REQUESTS).map(lambda word: {"word": word}),
        Form.POKE: st.tuples(offsets, st.integers(0, 255)).map(lambda pair: {"number": pair[0] << 8 | pair[1]}),
        Form.NUMBER: st.integers(0, 0xFFFF_FFFF).map(lambda n: {"number": n}),
        Form.NUMBER_OR_NONE: st.integers(0, (1 << 64) - 1).map(lambda n: {"number": n}),
    }
    said = forms[spec.form].map(lambda fields: {**fields, "has_value": True})
    if spec.form in (Form.NONE, Form.TIME_OR_NONE, Form.NUMBER_OR_NONE):
        return st.just({}) | said
    return said


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    """Any fault that can be written down."""
    spec = draw(st.sampled_from(FAULTS))
    fields = draw(_value(spec))
    for key in spec.keys:
        if key in spec.needs or draw(st.booleans()):
            fields |= draw(_KEY_VALUES[key])
    return replace(Fault(spec), **fields)


@given(faults())
def test_fault_is_what_its_text_says(fault: Fault) -> None:
    """As a flag and as a scenario's table, each fault reads back as itself."""
    assert parse(fault.text, classes=()) == fault
    assert read_table(fault.table(), "here", "fault#1", ()) == fault


@given(st.text(max_size=60) | st.from_regex(r"[a-z._]{1,20}(=[a-z0-9:.]{0,9})?(@[a-z=,0-9]{0,30})?", fullmatch=True))
def test_any_text_is_a_fault_or_one_line(text: str) -> None:
    """Whatever is typed: a fault, or a complaint of one line that names the flag."""
    try:
        fault = parse(text, classes=())
    except UserError as error:
        assert str(error).startswith("command line: --fault: ") and len(str(error).splitlines()) == 1
    else:
        assert fault.spec.name in BY_FAULT_NAME


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "nothing: "),
        ("delay_irk=5us", "did you mean delay_irq?"),
        ("delay_irq", "delay_irq needs a value; write delay_irq=200us"),
        ("delay_irq=", '"" is no time'),
        ("delay_irq=5", '"5" is no time; write a number and ns, us, ms or s'),
        ("delay_irq=0us", "is not between 1ns and 3600s"),
        ("delay_irq=0.5ns", "no whole number of nanoseconds"),
        ("delay_irq=1us@relid", '"relid" is no KEY=VALUE; write it like delay_irq@nth=2,times=3'),
        ("delay_irq=1us@", "is no KEY=VALUE"),
        ("delay_irq=1us@relid=0", "relid: 0 is not between 1 and 2047"),
        ("delay_irq=1us@relid=x", 'relid: "x" is no whole number'),
        ("delay_irq=1us@relid=1,relid=2", "relid is said twice"),
        ("delay_irq=1us@kind=offerchannel", "delay_irq takes no kind; known: relid, vp, sint, nth, times"),
        ("delay_irq=1us@rel=1", "did you mean relid?"),
        ("reply.drop", "reply.drop needs kind; add @kind=…"),
        ("reply.drop=1s@kind=openchannel_result", "reply.drop takes no value"),
        ("reply.drop@kind=openchannel_resul", "did you mean openchannel_result?"),
        ("alloc.fail=probes", "did you mean probe?"),
        ("host.refuse=close", "known: gpadl, open"),
        ("host.refuse=open@status=0", "status: 0 is not between 1 and 4294967295"),
        ("host.mutate_slot=4", "is no OFFSET:BYTE; write host.mutate_slot=4:0xff"),
        ("host.mutate_slot=240:1", "the offset: 240 is not between 0 and 239"),
        ("host.mutate_pkt=0:256", "the byte: 256 is not between 0 and 255"),
        ("vsp.stall@class=ecko", "did you mean echo?"),
        ("vsp.stall@device=1", "is not a GUID"),
        ("vsp.stall@nth=0", "nth: 0 is not between 1 and"),
    ],
)
def test_mistake_has_its_line(text: str, what: str) -> None:
    """One line, with what is wrong and the cure."""
    with pytest.raises(UserError) as caught:
        parse(text, classes=())

    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("text", "struck"),
    [
        ("vsp.complete_zero", range(1, 10)),
        ("vsp.complete_zero@nth=3", [3]),
        ("vsp.complete_zero@times=2", [1, 2]),
        ("vsp.complete_zero@nth=3,times=2", [3, 4]),
        ("guest.die", [1]),
        ("guest.die@times=2", [1, 2]),
    ],
)
def test_nth_and_times_say_at_which_occasions(text: str, struck: list[int]) -> None:
    """Every time; this one; the first so many; so many from this one on. A guest dies once unless more is said."""
    fault = parse(text)

    assert [n for n in takewhile(lambda n: n < 10, count(1)) if fault.strikes(n)] == list(struck)


def test_numbers_and_keys_of_the_table_are_whole() -> None:
    """Each kind has one row, whose keys are known and whose needs are among them; messages are the host's."""
    assert [spec.kind for spec in FAULTS] == list(FaultKind)
    assert all(spec_of(spec.kind) is spec for spec in FAULTS)
    assert all(set(spec.keys) <= KEYS.keys() and set(spec.needs) <= set(spec.keys) for spec in FAULTS)
    assert message_kinds()["rescind_channeloffer"] == MessageType.RESCIND_CHANNELOFFER
    assert "openchannel" not in message_kinds()


def test_scenario_has_faults_and_flags_come_to_them(tmp_path: Any) -> None:
    """Tables of a file and texts of flags are one list, and survive the way to the machine's processes."""
    path = tmp_path / "one.toml"
    path.write_text('[[fault]]\nname = "delay_irq"\nvalue = "2ms"\nrelid = 3\n[[fault]]\nname = "host.dup_rescind"\n')
    scenario = Scenario.load(path).with_overrides(faults=["vsp.stall=1s"])

    texts = [fault.text for fault in scenario.faults]
    assert texts == ["delay_irq=2ms@relid=3", "host.dup_rescind", "vsp.stall=1s"]
    assert Scenario.from_config(scenario.to_config()).faults == scenario.faults


@pytest.mark.parametrize(
    ("toml", "what"),
    [
        ('fault = "x"', 'fault: "x" is a string, not an array of tables; write it as [[fault]]'),
        ("[[fault]]\nvalue = 1", "fault#1: name is missing"),
        ('[[fault]]\nname = "vsp.stall"\nrelid = 1.5', "fault#1: relid is neither a string nor a whole number"),
        ('[[fault]]\nname = "vsp.stall"\nsint = 2', "fault#1: vsp.stall takes no sint"),
        (
            '[[fault]]\nname = "vsp.stall"\n' * (MAX_FAULTS + 1),
            "65 faults are more than the 64 that a machine has",
        ),
    ],
)
def test_wrong_table_has_its_line(tmp_path: Any, toml: str, what: str) -> None:
    """The file, the table, the cure."""
    path = tmp_path / "one.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as caught:
        Scenario.load(path)

    assert what in str(caught.value) and str(path) in str(caught.value)
