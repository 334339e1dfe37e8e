"""Serving: requests in, events out, token ids only."""
