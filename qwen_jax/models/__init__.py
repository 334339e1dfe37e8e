"""The model: parameters, layers, attention, and its key and value cache."""
