"""What a pcapng file says of the recording that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from emu.recording import Recording
from tests.conftest import RunCli
from tools.export.pcapng import section_block


@pytest.mark.parametrize(
    ("dropped", "seed", "comment"),
    [
        (0, None, b"machine one"),
        (0, 0, b"machine one, seed 0"),
        (3, 7, b"machine one, seed 7; 3 records were overwritten before they were drained"),
    ],
)
def test_section_says_machine_seed_and_what_is_missing(dropped: int, seed: int | None, comment: bytes) -> None:
    """In its first option, a comment (1); a recording of before says no seed."""
    block = section_block("one", dropped, seed)

    length = int.from_bytes(block[26:28], "little")
    assert (block[24:26], block[28 : 28 + length]) == (b"\1\0", comment)


def test_recording_has_the_seed_of_its_run(run_cli: RunCli, tmp_path: Path) -> None:
    """And what is exported of it."""
    recorded, exported = tmp_path / "r.rec", tmp_path / "r.pcapng"
    run_cli("run", "--seed", "4711", "--duration", "0", "--record", str(recorded)).check_returncode()
    run_cli("trace", str(recorded), "--to", "pcapng", "-o", str(exported)).check_returncode()

    with Recording(recorded) as recording:
        assert recording.seed == 4711
    assert b", seed 4711" in exported.read_bytes()[:200]
