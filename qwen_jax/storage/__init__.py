"""Checkpoints, KV sessions and results on disk."""
