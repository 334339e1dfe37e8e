"""`python -m convert`: the command `qwen-jax convert`."""

import sys

import typer

from convert.verbs import convert
from qwen_jax.config import ConfigError
from qwen_jax.storage.manifest import CheckpointError


def main() -> None:
    """Run the command; errors of the user end it with one line and status 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(convert)
    try:
        app()
    except (CheckpointError, ConfigError) as error:
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
