"""Versions are numbers that people read as "major.minor"."""

from __future__ import annotations

import pytest

from emu.wire.versions import KNOWN_VERSIONS, version_from_text, version_text

TEXTS = ["0.13", "1.1", "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3", "6.0"]


def test_versions_are_said_as_the_kernel_logs_them() -> None:
    """Eleven versions, oldest first, from WS2008's 0.13 to 6.0."""
    assert [version_text(version) for version in KNOWN_VERSIONS] == TEXTS
    assert list(KNOWN_VERSIONS) == sorted(KNOWN_VERSIONS)


@pytest.mark.parametrize("text", TEXTS)
def test_version_is_read_as_it_is_said(text: str) -> None:
    """Text and number lead to each other."""
    assert version_text(version_from_text(text)) == text


@pytest.mark.parametrize("text", ["", "5", "5.4", "05.3", "5.3 ", "0x50003", "five"])
def test_text_that_is_no_version_is_refused(text: str) -> None:
    """The error names what was typed, and the versions there are."""
    with pytest.raises(ValueError, match=r"there are 0\.13, 1\.1, .*6\.0"):
        version_from_text(text)
