"""Ready files for schedulers that exist: what a job is, and a module for each of them."""
