"""Drivers of the guest, one a module; `guestproc.drivers.table` lists them."""
