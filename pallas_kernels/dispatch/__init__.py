"""Choice of backend and tile sizes for an operation on a device."""
