"""Models, oracles, children and damage that tests share."""
