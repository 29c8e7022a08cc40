"""The guest: a kernel's VMBus side in Python, its state in guest RAM, its processors separate processes."""
