"""Serving: requests in, events out, as token ids."""
