"""Sparse prefill: budgets of every head, the recall that they reach, their calibration."""
