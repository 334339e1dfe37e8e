"""Attention operations for long contexts: Dual Chunk Attention on a paged cache."""
