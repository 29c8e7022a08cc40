"""What the guest kernel stands on: records in guest RAM, locks, waits, pages, tasklets, work queues.

Everything here is logic over memory that it is handed; what a process must do for it (block, wake,
switch interrupts off) comes through the hooks of `actors.Actor`.
"""
