"""Job files for schedulers: the description of a job, and a module for each scheduler."""
