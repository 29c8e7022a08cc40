"""The guest's VMBus bus driver, function by function under the kernel's names."""
