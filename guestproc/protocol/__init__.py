"""What a kernel function does between two waits: plain functions over the guest's records, without I/O."""
