import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support.random_models import smallest

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.models import rope

CONFIG = smallest(
    head_dim=128,
    rope_theta=1e7,
    max_len=1010000,
    dual_chunk=ChunkGeometry(262144, 8192),
    original_len=262144,
)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("theta", "head_dim", "length"),
    [
        (1e7, 128, 262145),
        (1e5, 64, 262145),
        (1e6, 64, 262145),
        # One of PyTorch's 64 frequencies is an ulp off the correctly rounded one, which
        # shows at large angles.
        (1e6, 128, 4096),
    ],
)
def test_angles_are_those_of_transformers(theta, head_dim, length):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    theirs = Qwen2RotaryEmbedding(
        Qwen2Config(
            hidden_size=head_dim,
            num_attention_heads=1,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
        )
    )
    config = dataclasses.replace(CONFIG, rope_theta=theta, head_dim=head_dim, dual_chunk=None)
    cos, sin = theirs(torch.zeros(1, 1, 1), torch.arange(length)[None])
    turns = rope.table(config, length).at(jnp.arange(length))
    for ours, expected in ((turns.cos, cos), (turns.sin, sin)):
        expected = expected[0, :, : head_dim // 2].numpy()
        assert np.abs(np.asarray(ours) - expected).max() <= 5e-7


def test_the_table_covers_every_rotary_position_and_no_more():
    geometry = ChunkGeometry(chunk_size=17, local_size=4)
    config = dataclasses.replace(CONFIG, dual_chunk=geometry, head_dim=4)
    for max_len in (1, 13, 14, 40, 1000):
        rows = rope.table(config, max_len).rows.shape[0]
        positions = np.arange(max_len)
        used = [geometry.key_position(positions).max()]
        view = np.minimum(positions // geometry.chunk_len, 2)
        for index, rotated in enumerate(geometry.query_positions(positions)):
            used.extend(rotated[view >= index])
        assert max(used) < rows <= max(geometry.chunk_size + 1, max_len)


def test_rotation_turns_half_split_pairs():
    x = np.random.default_rng(0).standard_normal((5, 2, 8)).astype(np.float32)
    angle = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    turned = rope.rotate(jnp.asarray(x), rope.Rotary(jnp.cos(angle), jnp.sin(angle)))
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(turned, np.concatenate([pairs.real, pairs.imag], -1), atol=2e-6)


def test_successive_and_older_views_coincide_beyond_the_local_size():
    geometry = ChunkGeometry(chunk_size=64, local_size=16)
    config = dataclasses.replace(CONFIG, dual_chunk=geometry, head_dim=8)
    positions = jnp.arange(3 * geometry.chunk_len, dtype=jnp.int32)
    angles = rope.angles(config, rope.table(config, 1000), positions)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((len(positions), 1, 8)), jnp.float32)
    _, succ, inter = rope.rotate_views(x, angles.query, jnp.float32(1))
    same = np.asarray(positions % geometry.chunk_len >= geometry.local_size)
    np.testing.assert_array_equal(succ[same], inter[same])
    assert (np.asarray(succ != inter).any((1, 2)) == ~same).all()


@pytest.mark.parametrize(
    ("length", "factor"),
    [(1, 1.0), (262144, 1.0), (524288, 1.069315), (1000000, 1.133886), (1048576, 1.138629)],
)
def test_temperature_of_the_million_token_models(length, factor):
    assert CONFIG.temperature(length) == pytest.approx(factor, abs=1e-6)


def test_temperature_multiplies_logits_by_its_square():
    config = dataclasses.replace(CONFIG, original_len=4)
    assert config.temperature(16) ** 2 == pytest.approx(1.296477, abs=1e-6)
    assert dataclasses.replace(CONFIG, original_len=0).temperature(10**6) == 1
