"""Conversion of Hugging Face checkpoints, in both directions."""
