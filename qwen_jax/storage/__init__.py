"""Storage: checkpoints, KV sessions and results on disk."""
