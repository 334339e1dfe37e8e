"""The error of storage, in a module that imports nothing, for callers that only catch it."""


class CheckpointError(ValueError):
    """Error of a checkpoint that cannot be used; names the file and the tensor at fault."""
