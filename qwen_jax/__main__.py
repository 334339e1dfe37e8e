"""`python -m qwen_jax`: the same as `qwen-jax`."""

import sys

from qwen_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
