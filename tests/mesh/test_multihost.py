"""Settings that processes of a job compare, and the addresses at which they meet."""

import pytest

from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost


def test_what_differs_is_named_with_all_values():
    same = {"jax": "0.10.2", "--dtype": "f32"}
    assert multihost.differences({0: same, 1: same}) == ""
    assert (
        multihost.differences({0: same, 1: same | {"--dtype": "bf16"}, 2: {"jax": "0.10.2"}})
        == "--dtype is f32 on process 0 and bf16 on process 1 and missing on process 2"
    )


def test_what_peers_say_is_printed_with_escapes():
    found = multihost.differences({0: {"a\n": "\x1b"}, 1: {"a\n": "x" * 100}})
    assert found.isprintable()
    assert found.startswith("a\\n is \\x1b on process 0 and xxx")


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "10.0.0.1:", ":80", "host:0", "host:70000", "h:" + "9" * 5000, "h:²"]
)
def test_an_address_needs_host_and_port(address):
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        multihost.split_address(address)
