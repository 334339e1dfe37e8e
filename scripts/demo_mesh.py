"""Read a long document on eight virtual CPU devices and on one, densely and sparsely.

A pass key lies hidden in 12,288 tokens, half as many again as the model was trained on. Ends
with status 0 only if all four answers are the same sentence, and it names the pass key.
"""

import dataclasses
import sys
from pathlib import Path

import demo_long
import demo_model
import jax

from qwen_jax.cli.flags import ModelFlags
from qwen_jax.cli.placement import ONE
from qwen_jax.llm.model import open_model

CELL = dataclasses.replace(demo_long.CELL, length=12_288)
MESH = "seq=8"


def run(directory: Path) -> bool:
    """Runs the demo; returns True if all answers are the same and right."""
    demo_model.fetch(directory)
    jax.config.update("jax_platforms", "cpu")
    # The mesh first: it makes the devices.
    places = {f"on {MESH}": MESH, "on one device": ONE}
    return demo_long.compare(
        CELL,
        {
            name: open_model(
                directory, ModelFlags(sparse="on", sparse_config=demo_long.BUDGETS, mesh=mesh)
            )
            for name, mesh in places.items()
        },
    )


if __name__ == "__main__":
    sys.exit(demo_model.demonstrate(run, __doc__))
