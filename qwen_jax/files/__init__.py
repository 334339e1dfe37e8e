"""Untrusted files, and files in the user's cache directory."""
