"""One way to write and call a Pallas Mosaic GPU kernel, whichever jax is installed.

`Warpgroup` has what its interpreter cannot do, which has no tensor cores and no layouts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

WARPGROUP = "warpgroup"
"""Name of the axis of the warpgroups of a block."""
BLOCK = "block"
"""Name of the axis of the blocks of a grid."""
LAYOUT = plgpu.Layout.WGMMA
ROWS, COLUMNS = LAYOUT.reduce(1), LAYOUT.reduce(0)
"""Layouts of a vector along the rows, and along the columns, of a product."""
TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
"""Transforms of 16-bit matrices in shared memory, as tensor cores read them."""


def interpreter(**options: Any) -> Any:
    """Return the `interpret` argument that runs a kernel on a CPU: `InterpretGPUParams`."""
    public = getattr(plgpu, "InterpretGPUParams", None)  # since jax 0.11.2
    if public is not None:
        return public(**options)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)


def launch(
    kernel: Callable[..., None],
    *args: Array,
    outputs: list[jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    blocks: int,
    warpgroups: int,
    name: str,
    interpret: Any = None,
) -> list[Array]:
    """Launch a kernel that gets the references of inputs and outputs, and scratch by name."""
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=(BLOCK,),
        num_threads=warpgroups,
        thread_name=WARPGROUP,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*args)


@dataclasses.dataclass(frozen=True, slots=True)
class Warpgroup:
    """Operations of a warpgroup, on a GPU or in the interpreter."""

    interpreted: bool

    def cast(self, x: Array, layout: Any = LAYOUT) -> Array:
        """Cast an array to a layout."""
        return x if self.interpreted else plgpu.layout_cast(x, layout)

    def full(
        self, shape: tuple[int, ...], value: float, layout: Any = LAYOUT
    ) -> Float[Array, "*B"]:
        """An array of one number in a layout."""
        return self.cast(jnp.full(shape, value, jnp.float32), layout)

    def iota(self, shape: tuple[int, ...], axis: int = 0, layout: Any = LAYOUT) -> Int[Array, "*B"]:
        """Indices along an axis in a layout."""
        return self.cast(jax.lax.broadcasted_iota(jnp.int32, shape, axis), layout)

    def vector(self, ref, layout: Any = COLUMNS) -> Array:
        """A vector of global memory in a layout."""
        if self.interpreted:
            return ref[...]
        return plgpu.load(ref, (), layout=layout, optimized=False)

    def logits(
        self, a_ref, b_ref, issued: Callable[[], None] = lambda: None
    ) -> Float[Array, "M S"]:
        """Product [M, S] of matrices [M, H] and [S, H] in shared memory.

        Args:
            issued: runs while the product is made.
        """
        if self.interpreted:
            issued()
            a, b = self._read(a_ref), self._read(b_ref)
            return jnp.dot(a, b.T, preferred_element_type=jnp.float32)

        def product(acc_ref):
            plgpu.wgmma(acc_ref, a_ref, plgpu.transpose_ref(b_ref, (1, 0)))
            issued()
            return acc_ref[...]

        shape = a_ref.shape[0], b_ref.shape[0]
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def accumulate(
        self, acc: Float[Array, "M H"], weights: Array, ref, issued: Callable[[], None]
    ) -> Float[Array, "M H"]:
        """`acc` and the product of weights [M, S] with a matrix [S, H] in shared memory.

        Args:
            issued: runs while the product is made.
        """
        if self.interpreted:
            issued()
            return acc + jnp.dot(weights, self._read(ref), preferred_element_type=jnp.float32)

        def product(acc_ref):
            plgpu.wgmma(acc_ref, weights, ref)
            issued()

        start: Any = plgpu.ACC.init(acc)
        return pl.run_state(product)(start)

    def _read(self, ref) -> Array:
        """A matrix in the interpreter, as if tensor cores had read it: through TMA's proxy."""
        found = ref[...]
        plgpu.commit_smem()
        return found
