"""Models: parameters, layers, attention, and the KV cache."""
