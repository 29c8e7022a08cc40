"""The page allocator's ledger on a machine that records: a record for each run of pages, by the thread that has it."""

from __future__ import annotations

import threading

from emu.tracing import E_PAGE_ALLOC, E_PAGE_FREE, Recorder
from guestproc.kernel.page_records import PageRun
from guestproc.kernel.pages import PageAllocator


class PageTrace:
    """A ledger for all threads of a process: each records into its own ring."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def enlist(self, recorder: Recorder) -> None:
        """The calling thread records here."""
        self._mine.record = recorder.record

    def __call__(self, what: str, run: PageRun, owner: int) -> None:
        """Pages were handed out ("alloc") or given back ("free")."""
        record = getattr(self._mine, "record", None)
        if record is None:
            return
        if what == "alloc":
            record(E_PAGE_ALLOC, run.pfn, run.count, owner)
        else:
            record(E_PAGE_FREE, run.pfn, run.count)


def record_pages(pages: PageAllocator, recorder: Recorder) -> None:
    """Have the pages that the calling thread takes and gives back recorded."""
    if pages.ledger is None:
        pages.ledger = PageTrace()
    if isinstance(pages.ledger, PageTrace):
        pages.ledger.enlist(recorder)
