"""Sparse prefill: budgets of every head, their recall, and their calibration."""
