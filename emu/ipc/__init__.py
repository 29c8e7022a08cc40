"""What only processes may do: open, map, wait, read clocks."""
