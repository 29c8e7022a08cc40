"""The VMBus server as logic without I/O: messages and devices' answers in, effects out."""
