"""The commands: launching, looking, measuring. The only package that knows a terminal."""
