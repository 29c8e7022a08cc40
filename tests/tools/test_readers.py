"""Other people's readers of our exports, and transports that we compare with, where they were promised."""

from __future__ import annotations

import os

from tests.tools.conftest import NEEDS, PEERS, READERS


def test_promised_readers_are_there() -> None:
    """Under VMBUS_EMU_TEST_READERS=required no test that needs a reader or a transport is left out."""
    promised = {*READERS, *PEERS} if os.environ.get("VMBUS_EMU_TEST_READERS") == "required" else set()

    assert {need: cure for need, (there, cure) in NEEDS.items() if need in promised and not there()} == {}
