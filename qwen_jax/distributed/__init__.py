"""Meshes of devices, and multi-process jobs."""
