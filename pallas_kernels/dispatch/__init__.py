"""Which backend, and which tile sizes, run an operation on a device."""
