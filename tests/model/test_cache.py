import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.random_models import smallest

from qwen_jax.models import kv_cache

PAGE, PAGES, LAYERS, K, H = 4, 9, 3, 2, 2
CONFIG = smallest(num_layers=LAYERS, num_heads=2, num_kv_heads=K, head_dim=H)


def rows(rng, count):
    return rng.standard_normal((count, K, H)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3, 4, 8, 13])
def test_slices_land_in_their_pages_and_nowhere_else(size):
    rng = np.random.default_rng(size)
    table = np.array([5, 2, 8, 1, 7], np.int32)
    write = jax.jit(kv_cache.write_slice)
    for start in range(len(table) * PAGE - 1):
        for length in {1, size - 1, size} - {0}:
            if start + length > len(table) * PAGE:
                continue
            before = kv_cache.init(CONFIG, PAGES, PAGE, jnp.float32)
            keys, values = rows(rng, size), rows(rng, size)
            after = write(
                before,
                jnp.int32(1),
                jnp.asarray(keys),
                jnp.asarray(values),
                jnp.asarray(table),
                jnp.int32(start),
                jnp.int32(length),
            )
            for array, new in ((after.keys, keys), (after.values, values)):
                expected = np.zeros((LAYERS, K, PAGES, PAGE, H), np.float32)
                for t in range(length):
                    page, row = divmod(start + t, PAGE)
                    expected[1, :, table[page], row] = new[t]
                actual = np.asarray(array).copy()
                actual[:, :, 0] = 0  # the trash page may hold anything
                np.testing.assert_array_equal(actual, expected)


def test_tokens_land_in_their_pages_and_idle_rows_in_the_trash():
    rng = np.random.default_rng(0)
    tables = np.array([[3, 4], [0, 0], [6, 1]], np.int32)
    positions = np.array([5, -1, 2], np.int32)
    keys, values = rows(rng, 3), rows(rng, 3)
    after = jax.jit(kv_cache.write_tokens)(
        kv_cache.init(CONFIG, PAGES, PAGE, jnp.float32),
        jnp.int32(2),
        jnp.asarray(keys),
        jnp.asarray(values),
        jnp.asarray(tables),
        jnp.asarray(positions),
    )
    for array, new in ((after.keys, keys), (after.values, values)):
        expected = np.zeros((LAYERS, K, PAGES, PAGE, H), np.float32)
        expected[2, :, 4, 1], expected[2, :, 6, 2] = new[0], new[2]
        actual = np.asarray(array).copy()
        actual[:, :, 0] = 0
        np.testing.assert_array_equal(actual, expected)
