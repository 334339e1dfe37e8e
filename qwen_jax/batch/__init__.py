"""Batch files: requests answered with continuous batching, in runs that can be resumed."""
