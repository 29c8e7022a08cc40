"""The machine: wire formats, shared memory, SynIC, rings, interrupts. Imports nothing of ours outside itself."""
