"""How much a model still knows at a length and depth."""
