"""Which steps are skipped: those whose loss or gradient is not finite or suddenly large.

The verdict is a pure function of a small state, which is part of the run's state: a run that is
continued skips the steps that it would have skipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HISTORY = 64
"""Good steps whose gradient norms are remembered; assumed."""
LEAST_HISTORY = 16
"""Good steps before a norm is called a spike; assumed: the first ones fall fast by themselves."""


class Guard(NamedTuple):
    """What a verdict needs to know of the steps before."""

    norms: jax.Array
    """float32 [HISTORY], gradient norms of the last good steps, infinite where there are none."""
    good_steps: jax.Array
    """int32 []."""
    bad_in_a_row: jax.Array
    """int32 [], steps skipped since the last good one."""


def new_guard() -> Guard:
    """Before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.full((HISTORY,), jnp.inf, jnp.float32), zero, zero)


def norm_limit(guard: Guard, spike_factor: float | None) -> jax.Array:
    """float32 []: the largest gradient norm of a good step.

    `spike_factor` times the (lower) median of those remembered; infinite while these are too few.
    A median, so that a spike under the limit does not raise it.
    """
    if spike_factor is None:
        return jnp.asarray(jnp.inf, jnp.float32)
    known = jnp.minimum(guard.good_steps, HISTORY)
    median = jnp.sort(guard.norms)[jnp.maximum(known - 1, 0) // 2]
    return jnp.where(known >= LEAST_HISTORY, spike_factor * median, jnp.inf)


def judge(
    guard: Guard, loss: jax.Array, norm: jax.Array, limit: jax.Array
) -> tuple[jax.Array, Guard]:
    """(bool [], whether the step is good; the guard after it) of float32 [] loss and norm."""
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit)
    slot = guard.good_steps % HISTORY
    return is_good, Guard(
        norms=jnp.where(is_good, guard.norms.at[slot].set(norm), guard.norms),
        good_steps=guard.good_steps + is_good.astype(jnp.int32),
        bad_in_a_row=jnp.where(is_good, 0, guard.bad_in_a_row + 1),
    )
