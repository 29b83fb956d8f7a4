"""Steps of a teacher, compiled so that every process on one kind of machine gets the same bits."""

from collections.abc import Callable
from typing import Any

import jax

# Otherwise XLA times kernels for a GPU against each other and takes what was fastest that once: of
# two processes each would have its own last bits, and a shard computed again would be another.
ON_GPU: dict[str, bool | int] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Step:
    """A function under `jax.jit`, for whatever platform this process computes on."""

    def __init__(self, run: Callable[..., Any], static_argnames: tuple[str, ...]):
        self._run, self._static_argnames = run, static_argnames
        self._compiled: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.jitted(jax.default_backend())(*arguments, **named)

    def jitted(self, platform: str) -> Any:
        """The function of `jax.jit` for a platform: cpu, gpu or tpu."""
        if platform not in self._compiled:
            self._compiled[platform] = jax.jit(
                self._run,
                static_argnames=self._static_argnames,
                compiler_options=ON_GPU if platform == "gpu" else None,
            )
        return self._compiled[platform]


def step(*static_argnames: str) -> Callable[[Callable[..., Any]], Step]:
    """Decorates a function whose named arguments are static."""
    return lambda run: Step(run, static_argnames)
