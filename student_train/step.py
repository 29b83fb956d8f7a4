"""The training step and the evaluation step: plain functions to jit, and the state they change.

Both are made from static descriptions alone, so that they compile ahead of time for devices that
are not there. Labels and masks are made here, from tokens and segment ids.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma2 import attention
from gemma2 import model as gemma2
from gemma2.placement import ROW_AXES, axes_of, fsdp_dimension, partition
from schemas.manifest import TargetsManifest
from schemas.model import ModelConfig
from schemas.runs import TrainConfig
from student_train import mesh as meshes
from student_train.data import Batch
from student_train.entries import entry_positions
from student_train.loss import Head, LossSums, Targets, sparse_target_loss
from student_train.optimizer import learning_rate, make_optimizer


class State(NamedTuple):
    """All that a step changes: float32 master weights, the optimizer's state, steps done."""

    params: Any
    opt_state: Any
    step: jax.Array


class StepMetrics(NamedTuple):
    """float32 scalars of one step; all but the last two are means over predicted positions."""

    loss: jax.Array
    kd: jax.Array
    """Cross-entropy against the stored targets, m·logsumexp - Σ p̂ s, in nats."""
    ce: jax.Array
    """Cross-entropy of the next token, in nats."""
    kl: jax.Array
    """kd less the teacher's entropy: for unbiased targets of mean KL(teacher || student)."""
    teacher_entropy: jax.Array
    teacher_ce: jax.Array
    """The teacher's own cross-entropy of the next token."""
    grad_norm: jax.Array
    """Before clipping."""
    learning_rate: jax.Array


class RowScores(NamedTuple):
    """Of each row of a batch of held-out rows; the host adds them up exactly."""

    nats: jax.Array
    """float32 [B], cross-entropy of the row's labels."""
    labels: jax.Array
    """int32 [B], predicted positions."""
    label_bytes: jax.Array
    """int32 [B], UTF-8 bytes of the labels."""


def predicted(segment_ids: jax.Array) -> jax.Array:
    """bool [B, L], True where the next token is of the same document, as the store defines it."""
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, :-1] != 0)
    return jnp.pad(same, ((0, 0), (0, 1)))


def next_tokens(tokens: jax.Array) -> jax.Array:
    """int32 [B, L], the label of each position; of the last one its own token, never used."""
    return jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)


def make_head(
    config: ModelConfig, valid_vocab: int, targets: TargetsManifest | None, chunk_tokens: int
) -> Head:
    """The loss's static description for a store's targets, or for labels alone."""
    return Head(
        valid_vocab=valid_vocab,
        final_cap=config.final_cap,
        block_tokens=1 if targets is None else targets.sampler.block_tokens,
        chunk_tokens=chunk_tokens,
    )


def make_state(model: ModelConfig, config: TrainConfig, key: jax.Array) -> State:
    """The state before the first step; jit it with `out_shardings`, or take its eval_shape."""
    params = gemma2.init_params(model, key)
    return init_state(params, config)


def init_state(params: Any, config: TrainConfig) -> State:
    """The state before the first step, from given float32 parameters."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def abstract_state(model: ModelConfig, config: TrainConfig, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state. Raises ConfigError as `mesh.partition` does."""
    shapes = jax.eval_shape(partial(make_state, model, config), jax.random.key(0))
    return meshes.abstract(shapes, meshes.state_shardings(shapes, mesh))


def abstract_batch(batch: int, tokens: int, targets: TargetsManifest | None, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch."""
    entries = 0 if targets is None else targets.slots_per_sequence
    where = meshes.rows_sharding(mesh)

    def array(width: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch, width), dtype, sharding=where)

    return Batch(
        tokens=array(tokens, jnp.int32),
        segment_ids=array(tokens, jnp.int32),
        entry_id=array(entries, jnp.int32),
        entry_weight=array(entries, jnp.float32),
        head_count=array(tokens, jnp.uint16),
        tail_count=array(tokens, jnp.uint16),
        teacher_entropy=array(tokens, jnp.float32),
        label_logprob=array(tokens, jnp.float32),
    )


def make_loss(
    head: Head, mesh: Mesh, table_path: tuple[Any, ...] = ("embedding",)
) -> Callable[[jax.Array, jax.Array, Targets, Any], LossSums]:
    """`sparse_target_loss` over a mesh: (hidden, table, targets, alpha) → sums over all devices.

    Each device forms the logits of its own rows, and of its own part of the vocabulary if `model`
    cuts it, against the table gathered over fsdp in the compute dtype; logits never leave their
    device.
    """
    rows: Any = P(ROW_AXES)
    one: Any = P()

    def loss(hidden: jax.Array, table: jax.Array, targets: Targets, alpha: Any) -> LossSums:
        where = partition(table_path, table.shape, mesh)
        gathered = fsdp_dimension(where)
        local = head._replace(
            table_axis=None if gathered is None else "fsdp",
            table_dimension=gathered or 0,
            vocab_axis="model" if "model" in axes_of(where, 0) else None,
            batch_axes=ROW_AXES,
        )
        return jax.shard_map(
            partial(sparse_target_loss, head=local),
            mesh=mesh,
            in_specs=(rows, where, Targets(*[rows] * len(Targets._fields)), P()),
            out_specs=LossSums(one, one, one, rows, rows),
        )(hidden, table, targets, jnp.asarray(alpha, jnp.float32))

    return loss


def make_objective(
    model: ModelConfig, config: TrainConfig, head: Head, mesh: Mesh
) -> Callable[[Any, Batch, Any], tuple[jax.Array, StepMetrics]]:
    """(params, batch, alpha) → (mean loss, metrics without the optimizer's two); differentiable."""
    loss = make_loss(head, mesh)
    rows = meshes.rows_sharding(mesh)
    kernel = attention.resolve(config.attention, model, mesh.devices.flat[0], backward=True)

    def objective(params: Any, batch: Batch, alpha: Any) -> tuple[jax.Array, StepMetrics]:
        hidden = gemma2.hidden_states(
            params,
            model,
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.segment_ids),
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            attention=kernel,
            mesh=mesh,
        )
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        weight = predicted(jnp.asarray(batch.segment_ids)).astype(jnp.float32)
        targets = Targets(
            labels=next_tokens(jnp.asarray(batch.tokens)),
            label_weight=weight,
            entry_id=jnp.asarray(batch.entry_id),
            entry_position=entry_positions(
                jnp.asarray(batch.head_count),
                jnp.asarray(batch.tail_count),
                head.block_tokens,
                batch.entry_id.shape[1],
            ),
            entry_weight=jnp.asarray(batch.entry_weight),
            entry_scale=weight,
        )
        sums = loss(hidden, gemma2.embedding(params), targets, alpha)
        # A batch of padding alone has no predicted position, and no gradient.
        count = jnp.maximum(jnp.sum(weight), 1.0)
        entropy = jnp.sum(weight * batch.teacher_entropy) / count
        metrics = StepMetrics(
            loss=sums.loss / count,
            kd=sums.kd / count,
            ce=sums.ce / count,
            kl=sums.kd / count - entropy,
            teacher_entropy=entropy,
            teacher_ce=-jnp.sum(weight * batch.label_logprob) / count,
            grad_norm=jnp.zeros(()),
            learning_rate=jnp.zeros(()),
        )
        return metrics.loss, metrics

    return objective


def make_train_step(
    model: ModelConfig, config: TrainConfig, head: Head, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, StepMetrics]]:
    """The step, jitted with explicit shardings: (state, batch) → (state, metrics).

    The state is donated. Without stored targets in the config, alpha is 0. For compilation ahead of
    time: `make_train_step(...).lower(abstract_state(...), abstract_batch(...)).compile()`.
    """
    objective = make_objective(model, config, head, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    alpha = 0.0 if config.targets is None else config.alpha
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))
    everywhere = NamedSharding(mesh, P())

    def train_step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
        gradients, metrics = jax.grad(objective, has_aux=True)(state.params, batch, alpha)
        gradients = jax.lax.with_sharding_constraint(gradients, where.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = metrics._replace(
            grad_norm=optax.global_norm(gradients),
            learning_rate=learning_rate(config.optimizer, config.steps, state.step),
        )
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.step + 1), metrics

    return jax.jit(
        train_step,
        in_shardings=(where, meshes.rows_sharding(mesh)),
        out_shardings=(where, everywhere),
        donate_argnums=0,
    )


def make_eval_step(
    model: ModelConfig, dtype: str, head: Head, mesh: Mesh
) -> Callable[[Any, Any, Batch], RowScores]:
    """(params, int32 [V] bytes of each id, batch) → scores of each row; targets are ignored."""
    loss = make_loss(head._replace(block_tokens=1), mesh)
    rows = meshes.rows_sharding(mesh)
    kernel = attention.resolve("auto", model, mesh.devices.flat[0], backward=False)

    def eval_step(params: Any, piece_bytes: jax.Array, batch: Batch) -> RowScores:
        tokens, segment_ids = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
        hidden = gemma2.hidden_states(
            params,
            model,
            tokens,
            segment_ids,
            dtype=jnp.dtype(dtype),
            attention=kernel,
            mesh=mesh,
        )
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        labels, mask = next_tokens(tokens), predicted(segment_ids)
        weight = mask.astype(jnp.float32)
        none = jnp.zeros((tokens.shape[0], 0), jnp.int32)
        targets = Targets(labels, weight, none, none, none.astype(jnp.float32), weight)
        sums = loss(hidden, gemma2.embedding(params), targets, 0.0)
        return RowScores(
            nats=jnp.sum(weight * sums.position_ce, axis=1),
            labels=jnp.sum(mask, axis=1, dtype=jnp.int32),
            label_bytes=jnp.sum(jnp.where(mask, piece_bytes[labels], 0), axis=1),
        )

    return jax.jit(
        eval_step, in_shardings=(None, None, rows), out_shardings=NamedSharding(mesh, P())
    )
