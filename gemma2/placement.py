"""How the model lies on a mesh of devices: which axis cuts which array, and what crosses devices.

Axes: `replica` holds copies of the parameters (across slices), `fsdp` cuts parameters, gradients
and the optimizer's state (ZeRO-3; arXiv 1910.02054), `model` cuts heads, the MLP's width and the
vocabulary (tensor parallelism; arXiv 1909.08053). Rows of a batch lie over `replica` and `fsdp`.
Without a mesh all of this is the identity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from schemas.errors import ConfigError
from schemas.model import ModelConfig

AXES = ("replica", "fsdp", "model")
ROW_AXES = ("replica", "fsdp")

# The dimension of each matrix that `model` cuts, from the end: outputs of what is read whole,
# inputs of what then adds up.
_MODEL_DIMENSION = {
    "query": -1, "key": -1, "value": -1, "gate": -1, "up": -1,
    "output": -2, "down": -2, "embedding": -2,
}  # fmt: skip
# Parts of a first dimension that are a multiple of this are preferred. A gradient cut on its last
# dimension leaves the reduce-scatter transposed, which costs the optimizer 7 % of a step of 9B.
_PREFERRED_MULTIPLE = 128
# Assumed: below this an all-gather's latency costs more than the bytes that sharding saves.
REPLICATED_ELEMENTS = 2**12
# Assumed: above this, 4 MiB of float32, a copy on every device is a mistake to be told about.
LARGE_ELEMENTS = 2**20


def partition(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where one array of the parameters, or of the optimizer's state, lies.

    Cut by `model` as the table above says, and by `fsdp` on the first dimension if that leaves each
    device a multiple of 128, else on the largest that divides; in that order where it is the same.
    Small arrays are replicated. Raises ConfigError for a large one of which no dimension divides.
    """
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    # Layer pairs are stacked on axis 0, which the scan slices: it must be whole on each device.
    first = 1 if "pairs" in names else 0
    if math.prod(shape[first:]) < REPLICATED_ELEMENTS:
        return P()
    cuts: list[tuple[str, ...]] = [()] * len(shape)
    left = list(shape)
    known = [_MODEL_DIMENSION[name] for name in names if name in _MODEL_DIMENSION]
    if known and mesh.shape["model"] > 1:
        dimension = known[-1] % len(shape)
        left[dimension] //= mesh.shape["model"]
        cuts[dimension] = ("model",)
    parts = mesh.shape["fsdp"]
    if parts > 1:
        dividing = [axis for axis in range(first, len(shape)) if left[axis] % parts == 0]
        if dividing:
            chosen = max(dividing, key=lambda axis: left[axis])
            if left[first] % (parts * _PREFERRED_MULTIPLE) == 0:
                chosen = first
            cuts[chosen] = (*cuts[chosen], "fsdp")
        elif math.prod(shape) >= LARGE_ELEMENTS:
            raise ConfigError(
                f"mesh.fsdp must divide a dimension of every large array, but {parts} divides none "
                f"of {'.'.join(names)} {tuple(left)}; use another mesh.fsdp or mesh.replica."
            )
    while cuts and not cuts[-1]:
        cuts.pop()
    return P(*[cut[0] if len(cut) == 1 else cut or None for cut in cuts])


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Raise ConfigError unless `model` divides all that it cuts."""
    parts = mesh.shape["model"]
    divisors = math.gcd(config.num_kv_heads, config.mlp_width, config.vocab_size)
    for what, size in (
        ("num_kv_heads", config.num_kv_heads),
        ("num_heads", config.num_heads),
        ("mlp_width", config.mlp_width),
        ("vocab_size", config.vocab_size),
    ):
        if size % parts:
            raise ConfigError(
                f"mesh.model must divide the model's {what}, but {parts} does not divide {size}; "
                f"use a divisor of {divisors}."
            )


def axes_of(where: P, dimension: int) -> tuple[str, ...]:
    """The mesh axes that cut a dimension."""
    entries = tuple(where)
    found = entries[dimension] if dimension < len(entries) else None
    return (found,) if isinstance(found, str) else tuple(found or ())


def fsdp_dimension(where: P) -> int | None:
    """The dimension that `fsdp` cuts, or None."""
    found = [d for d in range(len(tuple(where))) if "fsdp" in axes_of(where, d)]
    return found[0] if found else None


@dataclass(frozen=True)
class Placement:
    """A mesh to compute on, or None for one device; hashable, so that it may key a compilation."""

    mesh: Mesh | None = None
    is_table_whole: bool = False
    """Every device holds all of the embedding."""

    def rows(self, x: Array) -> Array:
        """x [B, ...] with its rows over the devices, and all else whole."""
        return self._put(x, P(ROW_AXES))

    def product(self, name: str, rows: Array, kernel: Array) -> Array:
        """rows [N, inputs] @ a layer's matrix [inputs, outputs], gathered over `fsdp`.

        It is cast to the rows' dtype before it moves, and its gradient is scattered as the
        parameter lies: left to itself, the compiler may move float32, or sum the whole gradient on
        each device. The backward casts and gathers it again: kept, all of them would come to lie on
        each device.
        """
        return _product(self, name, rows, kernel)

    def _where(self, name: str, kernel: Array) -> P:
        """Where a layer's matrix lies."""
        if self.mesh is None:
            return P()
        return P(*partition(("pairs", name), (1, *kernel.shape), self.mesh)[1:])

    def _whole(self, name: str, kernel: Array, dtype: DTypeLike) -> Array:
        where = self._where(name, kernel)
        whole = ["model" if "model" in axes_of(where, d) else None for d in range(kernel.ndim)]
        return self._put(kernel.astype(dtype), P(*whole))

    @jax.named_scope("attention")
    def attend(
        self, run: Callable[..., Array], query: Array, key: Array, value: Array, segments: Array
    ) -> Array:
        """run(query, key, value, segments), each device on its own rows and heads."""
        if self.mesh is None:
            return run(query, key, value, segments)
        rows, heads = P(ROW_AXES), P(ROW_AXES, None, "model")
        # Kernels do not say over which axes what they make varies, so that is not checked.
        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )(query, key, value, segments)

    @jax.named_scope("embedding")
    def embed(self, table: Array, tokens: Array, dtype: DTypeLike) -> Array:
        """The table's rows [B, T, D] of tokens [B, T], in `dtype`; gradients add up in float32."""
        look_up = _Embedding(jnp.dtype(dtype))
        if self.mesh is None or self.is_table_whole:
            return _embed(look_up, table, tokens)
        where = partition(("embedding",), table.shape, self.mesh)
        look_up = _Embedding(
            jnp.dtype(dtype),
            fsdp_dimension=fsdp_dimension(where),
            is_cut="model" in axes_of(where, 0),
            row_axes=ROW_AXES,
        )
        rows = P(ROW_AXES)
        return jax.shard_map(
            partial(_embed, look_up), mesh=self.mesh, in_specs=(where, rows), out_specs=rows
        )(table, tokens)

    def spread(self, run: Callable[[Any, Any], Any], shared: Any, items: Any) -> Any:
        """run(shared, items) for items [N, ...], which the devices of `model` share out.

        `run` gives arrays [N, ...], each of one item alone. N need not divide.
        """
        if self.mesh is None:
            return run(shared, items)
        parts = self.mesh.shape["model"]
        count = len(jax.tree.leaves(items)[0])
        filled = jax.tree.map(lambda x: x[jnp.arange(-(-count // parts) * parts) % count], items)
        found = jax.shard_map(
            run, mesh=self.mesh, in_specs=(P(), P("model")), out_specs=P("model"), check_vma=False
        )(shared, filled)
        return jax.tree.map(lambda x: x[:count], found)

    def sharding(self, path: tuple[Any, ...], shape: tuple[int, ...]) -> NamedSharding | None:
        """Where a parameter, or without a path any other array, lies; None without a mesh."""
        if self.mesh is None:
            return None
        is_table = path[:1] == (jax.tree_util.DictKey("embedding"),)
        is_whole = not path or (is_table and self.is_table_whole)
        return NamedSharding(self.mesh, P() if is_whole else partition(path, shape, self.mesh))

    def _put(self, x: Array, where: P) -> Array:
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, where))


ALONE = Placement()
"""One device."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(placement: Placement, name: str, rows: Array, kernel: Array) -> Array:
    return rows @ placement._whole(name, kernel, rows.dtype)


def _product_forward(
    placement: Placement, name: str, rows: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    # Not by calling `_product`: a remat policy would see neither the product nor what it reads.
    return rows @ placement._whole(name, kernel, rows.dtype), (rows, kernel)


def _product_backward(
    placement: Placement, name: str, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    rows, kernel = residuals
    of_rows = jnp.einsum("no,io->ni", gradient, placement._whole(name, kernel, rows.dtype))
    of_kernel = placement._put(
        jnp.einsum("ni,no->io", rows, gradient), placement._where(name, kernel)
    )
    return of_rows, of_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


@dataclass(frozen=True)
class _Embedding:
    """What is static about a look-up: inside shard_map, how the table is cut."""

    dtype: jnp.dtype
    fsdp_dimension: int | None = None
    is_cut: bool = False
    """By `model`, on the vocabulary."""
    row_axes: tuple[str, ...] = ()


def _own_rows(look_up: _Embedding, tokens: Array, count: int) -> Array:
    """Tokens as rows of this device's `count`; those of others lie past the end."""
    if not look_up.is_cut:
        return tokens
    own = tokens - lax.axis_index("model") * count
    return jnp.where((own >= 0) & (own < count), own, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(look_up: _Embedding, table: Array, tokens: Array) -> Array:
    part = table.astype(look_up.dtype)
    if look_up.fsdp_dimension is not None:
        part = lax.all_gather(part, "fsdp", axis=look_up.fsdp_dimension, tiled=True)
    own = _own_rows(look_up, tokens, len(part))
    x = part.at[own].get(mode="fill", fill_value=0)
    return lax.psum(x, "model") if look_up.is_cut else x


def _embed_forward(look_up: _Embedding, table: Array, tokens: Array) -> tuple[Array, Any]:
    return _embed(look_up, table, tokens), (table[:, :0], tokens)


def _embed_backward(look_up: _Embedding, residuals: Any, gradient: Array) -> tuple[Array, Any]:
    empty, tokens = residuals
    count = len(empty)
    if look_up.fsdp_dimension == 0:
        count *= lax.axis_size("fsdp")
    own = _own_rows(look_up, tokens, count).reshape(-1)
    zeros = jnp.zeros((count, gradient.shape[-1]), jnp.float32)
    varying = (*look_up.row_axes, *(("model",) if look_up.is_cut else ()))
    if varying:
        zeros = lax.pcast(zeros, varying, to="varying")
    # A common id occurs thousands of times: in bfloat16 its sum would stop growing.
    rows = gradient.reshape(-1, gradient.shape[-1]).astype(jnp.float32)
    total = zeros.at[own].add(rows, mode="drop")
    others = look_up.row_axes
    if look_up.fsdp_dimension is not None:
        total = lax.psum_scatter(
            total, "fsdp", scatter_dimension=look_up.fsdp_dimension, tiled=True
        )
        others = tuple(axis for axis in others if axis != "fsdp")
    if others:
        total = lax.psum(total, others)
    return total.astype(empty.dtype), np.zeros(tokens.shape, jax.dtypes.float0)


_embed.defvjp(_embed_forward, _embed_backward)
