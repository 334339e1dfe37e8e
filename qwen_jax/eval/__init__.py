"""Long-context evaluation: retrieval tasks by prompt length and depth, scores, pictures."""
