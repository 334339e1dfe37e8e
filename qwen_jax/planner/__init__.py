"""Memory, time and compiled programs of devices that need not be there."""
