"""The hypervisor process: partition, ports, message queues, the VMBus server and its devices."""
