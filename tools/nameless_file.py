"""A file that lasts as long as a block, has no name in any folder, and is found by other processes all the same.

What a machine's programs measure, and recordings that nobody asked for, go into such files: kill -9 of a launcher
leaves no folder of them in the temporary directory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def nameless_file() -> Iterator[Path]:
    """An empty file; the path by which processes of this user find it for as long as the block runs."""
    with tempfile.TemporaryFile() as file:
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
