"""The control page of a ring (`hv_ring_buffer`): where each word lies, and who writes it.

A ring is one control page and a whole number of data pages behind it. Producer: `write_index`,
`pending_send_sz`, `feature_bits`. Consumer: `read_index`, `interrupt_mask`. Indices are byte offsets in
the data.
"""

from __future__ import annotations

from typing import Final

WRITE_INDEX: Final = 0
READ_INDEX: Final = 4
INTERRUPT_MASK: Final = 8
PENDING_SEND_SZ: Final = 12
FEATURE_BITS: Final = 64
DATA: Final = 4096

CONTROL_PAGE_SIZE: Final = 4096
FEAT_PENDING_SEND_SZ: Final = 1
"""Bit 0 of `feature_bits`: its owner sets `pending_send_sz` here and honours that of the other ring."""

ALIGNMENT: Final = 8
"""Packets begin and end at multiples of this; so do both indices."""

MIN_RING_SIZE: Final = 2 * 4096
"""A control page and one page of data."""


def vmbus_ring_size(payload_size: int) -> int:
    """Round a wished size up to pages, and add the control page to small ones (`VMBUS_RING_SIZE`)."""
    pages = (payload_size + 4095) // 4096 * 4096
    return pages + (4096 if payload_size < 8 * 4096 else 0)
