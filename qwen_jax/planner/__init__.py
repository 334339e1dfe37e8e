"""Memory, time and compiled programs for devices that need not be present."""
