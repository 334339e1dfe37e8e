"""The verb `batch` in a process that can be killed, with programs that others have compiled."""


def batch(compiled, *arguments) -> int:
    import jax

    from qwen_jax.cli import main

    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return main(["batch", *map(str, arguments)])
