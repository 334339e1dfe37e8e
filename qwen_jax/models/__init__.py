"""Qwen2 decoder: parameters, layers, attention, and the KV cache."""
