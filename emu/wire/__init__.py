"""Values: bytes in, frozen values out, and bytes again. Nothing here keeps state, waits or does I/O."""
