"""What a schedule may ask of user space is what the guest's user space does."""

from __future__ import annotations

import inspect
import re

import pytest

from emu.user_calls import USER_CALLS
from guestproc.user import CALLS

ASKED = re.compile(r'asked(?:\["(\w+)"\]|\.get\("(\w+)")')


def test_every_call_is_named() -> None:
    """None is missing, none is too many."""
    assert set(USER_CALLS) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_reads_what_it_is_given(name: str) -> None:
    """Its code asks for what it needs and may be given, and for nothing else."""
    source = inspect.getsource(CALLS[name].run)
    found = {one or other for one, other in ASKED.findall(source)}
    found |= set(re.findall(r'for name in \("(\w+)", "(\w+)"\)', source)[0] if name == "connect" else ())
    found |= {"device", "index"} if "_channel(current, asked)" in source else set()

    assert found == {*USER_CALLS[name].needs, *USER_CALLS[name].may}
