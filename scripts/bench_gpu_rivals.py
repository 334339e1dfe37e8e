"""Attention of jax.nn and PyTorch, beside which scripts/bench_gpu.py times ours.

Each rival makes, of sets of queries, keys and values [1, T, heads, H], a `Rival`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Args = tuple[Any, ...]


class Rival(NamedTuple):
    """Another implementation of attention to time.

    Attributes:
        call: function to time.
        sets: sets of its inputs.
        wait: waits for the result of a call.
        rows: selects rows [R, N, H] of the result of a call.
        more: further fields of the row.
    """

    call: Callable
    sets: list[Args]
    wait: Callable
    rows: Callable
    more: dict[str, Any]


def unpaged(args: Args) -> Args:
    """Converts arguments of a prefill from position 0 to queries, keys, values [1, T, heads, H]."""
    q, cache, layer, table, _, length = args

    @functools.partial(jax.jit, static_argnames="T")
    def flat(x, layer, table, T):
        x = jax.lax.dynamic_index_in_dim(x, layer, 0, False)[:, table]
        return x.reshape(len(x), -1, x.shape[-1])[:, :T].swapaxes(0, 1)[None]

    return q[0][None], *(flat(x, layer, table, T=int(length)) for x in (cache.keys, cache.values))


def by_jax(implementation: str, sets: list[Args]) -> Rival:
    attention: Any = jax.nn.dot_product_attention
    attend = functools.partial(attention, scale=1.0, is_causal=True, implementation=implementation)
    return Rival(jax.jit(attend), sets, jax.block_until_ready, lambda out, rows: out[0, rows], {})


def by_torch(kernel: str, sets: list[Args]) -> Rival:
    """Builds PyTorch's scaled dot product attention, restricted to one of its kernels.

    Heads are grouped if the kernel supports that, else keys are repeated for each head.
    """
    torch, _, wait = pytorch()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = getattr(SDPBackend, kernel)
    sets = [tuple(torch.from_dlpack(x).transpose(1, 2) for x in args) for args in sets]

    def attend(q, k, v):
        with torch.inference_mode(), sdpa_kernel(only):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=1.0, enable_gqa=k.shape[1] != q.shape[1]
            )

    repeated = False
    try:
        attend(*sets[0])
    except RuntimeError:
        repeated = True
        groups = sets[0][0].shape[1] // sets[0][1].shape[1]
        sets = [(q, *(x.repeat_interleave(groups, 1) for x in (k, v))) for q, k, v in sets]

    def rows_of(out, rows):
        return out[0][:, rows.tolist()].transpose(0, 1).float().cpu().numpy()

    return Rival(attend, sets, wait, rows_of, {"heads_repeated": repeated})


def pytorch() -> tuple[Any, str, Callable]:
    """Imports PyTorch; returns it, its device, and the function that waits for the device.

    Raises:
        ImportError: where it is not installed.
    """
    import torch

    if torch.cuda.is_available():
        return torch, "cuda", lambda _: torch.cuda.synchronize()
    return torch, "cpu", lambda _: None


RIVALS: dict[str, Callable[[list[Args]], Rival]] = {
    "jax cuDNN": functools.partial(by_jax, "cudnn"),
    "jax XLA": functools.partial(by_jax, "xla"),
    "torch flash": functools.partial(by_torch, "FLASH_ATTENTION"),
    "torch cuDNN": functools.partial(by_torch, "CUDNN_ATTENTION"),
}
