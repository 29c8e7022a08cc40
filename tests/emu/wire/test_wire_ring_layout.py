"""Ring sizes as Linux rounds them; the control page's offsets are compared in test_wire_layouts.py."""

from __future__ import annotations

import pytest

from emu.wire.ring_layout import MIN_RING_SIZE, vmbus_ring_size


@pytest.mark.parametrize(
    ("payload_size", "size"),
    [
        (1, 8192),
        (4096, 8192),
        (4097, 12288),
        (12 * 1024, 16 * 1024),
        (7 * 4096, 8 * 4096),
        (8 * 4096, 8 * 4096),
        (8 * 4096 + 1, 9 * 4096),
        (128 * 1024, 128 * 1024),
    ],
)
def test_small_rings_get_their_control_page_on_top(payload_size: int, size: int) -> None:
    """Below eight pages the control page is added, above it is taken out of the size."""
    assert vmbus_ring_size(payload_size) == size >= MIN_RING_SIZE
