"""Linear layers in float8: e4m3 numbers, scaled by output of the weights and by row of the input.

For a forward pass alone. Scales take the largest magnitude to the largest e4m3 number, 448, and are
taken out of the sums again, so that a product is one float8 matrix product of the device between
two cheap passes over its input and its output.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_E4M3 = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(_E4M3).max)
# Of what is zero throughout; its scale must be a normal number too.
_SMALLEST = 1e-30


class Float8(NamedTuple):
    """A matrix: values float8 [..., outputs, inputs], and float32 [..., outputs] that scale them.

    Inputs are last, as tensor cores want float8 matrices.
    """

    values: Array
    scale: Array


def quantize(kernel: Array) -> Float8:
    """A matrix [..., inputs, outputs], or a stack of them, in float8."""
    wide = kernel.astype(jnp.float32)
    scale = _scale(wide, axis=-2)
    return Float8(jnp.swapaxes((wide / scale).astype(_E4M3), -1, -2), jnp.squeeze(scale, -2))


def product(x: Array, kernel: Float8) -> Array:
    """x [n, inputs] times the matrix, [n, outputs] in x's dtype, to which sums are rounded."""
    wide = x.astype(jnp.float32)
    scale = _scale(wide, axis=-1)
    sums = lax.dot_general(
        (wide / scale).astype(_E4M3),
        kernel.values,
        (((1,), (1,)), ((), ())),
        preferred_element_type=x.dtype,
    )
    return (sums.astype(jnp.float32) * scale * kernel.scale[None, :]).astype(x.dtype)


def quantize_layers(pairs: dict[str, Any]) -> dict[str, Any]:
    """Layers' parameters with every matrix in float8, wherever they lie; norms stay.

    Matrices are made and let go one after the other: `pairs` loses those that nobody else holds.
    """
    found: dict[str, Any] = {}
    for name in list(pairs):
        value = pairs.pop(name)
        if isinstance(value, dict):
            found[name] = quantize_layers(value)
        else:
            found[name] = _quantize(value) if name == "kernel" else value
    return found


_quantize = jax.jit(quantize)


def _scale(x: Array, axis: int) -> Array:
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    return jnp.maximum(largest, _SMALLEST) / _LARGEST
